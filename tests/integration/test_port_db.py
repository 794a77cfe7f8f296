# SPDX-License-Identifier: Apache-2.0
"""The module's tables when an admin moves to PostgreSQL, or returns to an older module."""

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from synapse_lk_jwt.compat.module_database import SCHEMA_VERSION
from testbed import service
from testbed.livekit import LiveKit
from testbed.postgres import Postgres
from testbed.process import MissingTool, wait_until
from testbed.sets import module_config, running
from testbed.skips import missing_tool
from testbed.synapse import Synapse

ROOM = "!room:example.org"
DELEGATION: dict[str, object] = {
    "delay_id": "syd_one",
    "user_id": "@alice:example.org",
    "room_id": ROOM,
    "livekit_room": "call",
    "member_identity": "@alice:example.org:DEVICE",
    "event_type": "org.matrix.msc3401.call.member",
    "state_key": "_@alice:example.org_DEVICE",
    "delay_ms": 3_600_000,
    "created_ts": 1,
    "has_multiple_identities": 1,
    "phase": "connected",
    "due_ts": 2**53,
    "restarted_ts": 2,
    "connected_ts": 2,
    "suspected_gone_ts": 0,
    "attempts": 0,
}


@pytest.fixture(scope="module")
def livekit(tmp_path_factory: pytest.TempPathFactory) -> LiveKit:
    try:
        # It is not started: nothing here needs it.
        return LiveKit(tmp_path_factory.mktemp("livekit"))
    except MissingTool as e:
        missing_tool(e)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    try:
        server = Postgres(tmp_path_factory.mktemp("postgres"))
    except MissingTool as e:
        missing_tool(e)
    with running(server):
        yield server


@pytest.fixture(scope="module")
def source(livekit: LiveKit, tmp_path_factory: pytest.TempPathFactory) -> Synapse:
    """A homeserver on SQLite that has ended, with one delegation."""
    synapse = Synapse(
        "source",
        tmp_path_factory.mktemp("source"),
        module_config(livekit),
        {"background_updates": {"sleep_enabled": False}},
    )
    with running(synapse):
        wait_until(lambda: has_tables(synapse), "tables")
        # Without these the script refuses to start.
        query = "SELECT 1 FROM background_updates"
        wait_until(lambda: not synapse.select(query), "background updates", 120)
        synapse.insert("synapse_lk_jwt_delegations", [DELEGATION])
    return synapse


def has_tables(synapse: Synapse) -> bool:
    query = "SELECT 1 FROM sqlite_master WHERE name = 'synapse_lk_jwt_processes'"
    return bool(synapse.select(query))


def select(postgres: Postgres, database: str, query: str) -> list[tuple[Any, ...]]:
    with closing(postgres.connect(database)) as connection, connection.cursor() as cursor:
        cursor.execute(query)
        rows: list[tuple[Any, ...]] = cursor.fetchall()
        return rows


def port(source: Synapse, target: Synapse) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "synapse_port_db"
    return subprocess.run(
        [
            program,
            *("--sqlite-database", source.directory / "homeserver.db"),
            *("--postgres-config", target.directory / "homeserver.json"),
        ],
        cwd=target.directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("has_module", [True, False])
def test_synapse_port_db_with_the_tables_in_the_target_or_not_succeeds(
    has_module: bool,
    source: Synapse,
    livekit: LiveKit,
    postgres: Postgres,
    tmp_path: Path,
) -> None:
    name = "with_tables" if has_module else "without_tables"
    target = Synapse(
        name, tmp_path, module_config(livekit) if has_module else None, postgres=postgres
    )
    tables = "SELECT table_name FROM information_schema.tables WHERE table_name LIKE '%lk_jwt_p%'"
    with running(target):
        wait_until(lambda: not has_module or bool(select(postgres, name, tables)), "tables")
    ported = port(source, target)
    assert ported.returncode == 0, ported.stdout[-2000:] + ported.stderr[-2000:]
    if has_module:
        columns = ", ".join(DELEGATION)
        rows = select(postgres, name, f"SELECT {columns} FROM synapse_lk_jwt_delegations")
        assert rows == [tuple(DELEGATION.values())]
    else:
        # Synapse's script copies no table that the target lacks.
        assert select(postgres, name, tables) == []


@pytest.mark.parametrize("is_postgres", [False, True])
def test_module_with_newer_tables_is_off_and_says_why(
    is_postgres: bool, livekit: LiveKit, postgres: Postgres, tmp_path: Path
) -> None:
    # The first start lets Synapse create its own tables.
    synapse = Synapse("newer", tmp_path, postgres=postgres if is_postgres else None)
    with running(synapse):
        pass
    synapse.module_config = module_config(livekit)
    database = synapse.directory / "homeserver.db"
    with closing(
        postgres.connect("newer") if is_postgres else sqlite3.connect(database)
    ) as connection:
        cursor = connection.cursor()
        cursor.execute("CREATE TABLE synapse_lk_jwt_schema (version INTEGER NOT NULL)")
        cursor.execute(f"INSERT INTO synapse_lk_jwt_schema VALUES ({SCHEMA_VERSION + 1})")
        connection.commit()
    with running(synapse):
        user = synapse.register("alice")
        body = service.get_token_body(user, ROOM)
        assert service.post(synapse.client_url, "/get_token", body).status == 404
    log = synapse.log_text()
    errors = [line for line in log.splitlines() if " - ERROR - " in line]
    assert [f"version {SCHEMA_VERSION + 1}" in line for line in errors] == [True], errors
    assert "Install the newer synapse-lk-jwt" in errors[0]
    assert "Traceback" not in log
