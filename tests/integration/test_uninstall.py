# SPDX-License-Identifier: Apache-2.0
"""Removing the module: the homeserver keeps working, and `uninstall` drops the tables."""

import contextlib
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from testbed.postgres import Postgres
from testbed.process import wait_until
from testbed.sets import running
from testbed.synapse import Synapse

COMMAND = (sys.executable, "-m", "synapse_lk_jwt", "uninstall")
PREFIX = "synapse_lk_jwt_"
HOUR_MS = 3_600_000


@dataclass(frozen=True)
class Removal:
    """A homeserver that runs the module, and its database."""

    synapse: Synapse
    postgres: Postgres | None

    def rows(self, table: str) -> int:
        """How many rows a table of the module has; 0 without the table."""
        tables = "sqlite_master WHERE type = 'table' AND name"
        if self.postgres is not None:
            tables = "pg_tables WHERE tablename"
        if not self._select(f"SELECT 1 FROM {tables} = '{PREFIX}{table}'"):
            return 0
        ((rows,),) = self._select(f"SELECT COUNT(*) FROM {PREFIX}{table}")
        return int(rows)

    def age_heartbeats(self) -> None:
        """As if the processes had stopped an hour ago."""
        with closing(self._connect()) as connection, connection:
            connection.cursor().execute(
                f"UPDATE {PREFIX}processes SET seen_ts = seen_ts - {HOUR_MS}"
            )

    def wait_for_heartbeat(self) -> None:
        wait_until(lambda: self.rows("processes") > 0, "heartbeat in the database")

    def uninstall(self, *options: str, answer: str = "") -> tuple[int, str]:
        """Runs the command; its exit status and what it printed."""
        done = subprocess.run(
            [*COMMAND, "-c", "homeserver.json", *options],
            cwd=self.synapse.directory,
            input=answer,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout + done.stderr

    def _select(self, query: str) -> list[tuple[Any, ...]]:
        with closing(self._connect()) as connection, closing(connection.cursor()) as cursor:
            cursor.execute(query)
            return list(cursor.fetchall())

    def _connect(self) -> Any:
        if self.postgres is not None:
            return self.postgres.connect(self.synapse.name)
        return sqlite3.connect(self.synapse.directory / "homeserver.db", timeout=30)


@pytest.fixture(params=["sqlite", "postgres"])
def removal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Removal]:
    with contextlib.ExitStack() as servers:
        postgres = None
        if request.param == "postgres":
            postgres = Postgres(tmp_path)
            servers.enter_context(running(postgres))
        # LiveKit need not answer: the tables are created at start.
        config = {
            "livekit_url": "ws://127.0.0.1:1",
            "livekit_key": "APIkey",
            "livekit_secret": "s" * 32,
        }
        synapse = Synapse("a", tmp_path, config, postgres=postgres)
        servers.enter_context(running(synapse))
        homeserver = Removal(synapse, postgres)
        homeserver.wait_for_heartbeat()
        yield homeserver


def test_uninstall_while_synapse_runs_the_module_keeps_the_tables(removal: Removal) -> None:
    status, text = removal.uninstall("--yes")
    assert status == 1
    assert "these Synapse processes have loaded the module: master (last heartbeat" in text
    assert removal.rows("processes") == 1


def test_homeserver_without_the_block_works_and_uninstall_drops_the_tables(
    removal: Removal,
) -> None:
    removal.synapse.module_config = None
    removal.synapse.restart()
    removal.age_heartbeats()
    alice = removal.synapse.register("alice")
    room_id = alice.create_room()

    status, text = removal.uninstall(answer="n\n")
    assert (status, removal.rows("processes")) == (1, 1)
    assert f"{PREFIX}processes: 1 row\n" in text

    # Without a terminal there is no answer.
    assert removal.uninstall(answer="")[0] == 1
    assert removal.rows("processes") == 1

    status, text = removal.uninstall(answer="y\n")
    assert status == 0, text
    assert "Dropped" in text

    status, text = removal.uninstall("--yes")
    assert status == 0
    assert "has no tables of synapse-lk-jwt. Nothing to do." in text

    removal.synapse.restart()
    assert alice.send_text(room_id, "still here")
    assert "Traceback" not in removal.synapse.log_text()


def test_uninstall_then_reinstall_creates_the_tables_again(removal: Removal) -> None:
    removal.synapse.stop()
    removal.age_heartbeats()
    assert removal.uninstall("--yes")[0] == 0
    assert removal.rows("processes") == 0
    removal.synapse.restart()
    removal.wait_for_heartbeat()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("server_name: a\nreport_stats: false\n", "has no `database` section"),
        (
            "server_name: a\nreport_stats: false\n"
            "database: {name: sqlite3, args: {database: missing.db}}\n",
            "Cannot open the SQLite database",
        ),
        ("server_name: [a", "it is not valid YAML"),
    ],
)
def test_uninstall_with_an_unusable_configuration_says_what_to_do(
    content: str, error: str, tmp_path: Path
) -> None:
    (tmp_path / "homeserver.yaml").write_text(content)
    done = subprocess.run(
        [*COMMAND, "-c", "homeserver.yaml", "--yes"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert error in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "missing.db").exists()
