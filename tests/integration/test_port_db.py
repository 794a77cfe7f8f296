# SPDX-License-Identifier: Apache-2.0
"""`synapse_port_db` moves a homeserver with this module from SQLite to PostgreSQL."""

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from testbed.postgres import Postgres
from testbed.process import wait_until
from testbed.sets import running
from testbed.synapse import Synapse

CONFIG = {"livekit_url": "ws://127.0.0.1:1", "livekit_key": "APIkey", "livekit_secret": "s" * 32}
CALLS = "synapse_lk_jwt_calls"


def _run(synapse: Synapse, script: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"synapse._scripts.{script}", *arguments],
        cwd=synapse.directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _calls(postgres: Postgres, database: str) -> list[Any] | None:
    """The LiveKit rooms in the module's table; None without the table."""
    with closing(postgres.connect(database)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass(%s)", (CALLS,))
        if cursor.fetchone() == (None,):
            return None
        cursor.execute(f"SELECT livekit_room FROM {CALLS}")
        return [room for (room,) in cursor.fetchall()]


def test_port_db_with_tables_on_both_sides_copies_their_rows(tmp_path: Path) -> None:
    postgres = Postgres(tmp_path)
    with running(postgres):
        synapse = Synapse("a", tmp_path, CONFIG)
        postgres.create_database("ported")
        database = {"name": "psycopg2", "args": {**postgres.connection("ported"), "cp_max": 5}}
        with running(synapse):
            wait_until(
                lambda: bool(synapse.select("SELECT 1 FROM sqlite_master WHERE name = ?", [CALLS])),
                "the module's tables",
            )
        row = {"livekit_room": "a-call", "room_id": "!room:example.org", "seen_ts": 1}
        synapse.insert(CALLS, [row])
        sqlite = json.loads((synapse.directory / "homeserver.json").read_text())
        (synapse.directory / "sqlite.json").write_text(json.dumps(sqlite))

        # The start on PostgreSQL creates the module's tables there.
        synapse.extra_config = {"database": database}
        with running(synapse):
            wait_until(lambda: _calls(postgres, "ported") == [], "the module's tables")
        _run(
            synapse,
            "update_synapse_database",
            *("--database-config", "sqlite.json", "--run-background-updates"),
        )
        _run(
            synapse,
            "synapse_port_db",
            *("--sqlite-database", "homeserver.db", "--postgres-config", "homeserver.json"),
        )
        assert _calls(postgres, "ported") == ["a-call"]

        with running(synapse):
            assert synapse.register("alice").create_room()
        assert "Traceback" not in synapse.log_text()
