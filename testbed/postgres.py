# SPDX-License-Identifier: Apache-2.0
"""A temporary PostgreSQL cluster."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

from testbed.process import MissingTool, Process, free_port

USER = "postgres"


class Postgres:
    """A PostgreSQL server with the superuser `postgres`, which needs no password."""

    def __init__(self, directory: Path) -> None:
        """
        Args:
            directory: for the log.

        Raises:
            MissingTool
        """
        self._initdb = _find("initdb")
        self._psql = _find("psql")
        postgres = _find("postgres")
        if importlib.util.find_spec("psycopg2") is None:
            raise MissingTool("Synapse's PostgreSQL driver is missing: pip install psycopg2-binary")
        self.port = free_port()
        # Not below `directory`, which the user of the PostgreSQL process cannot read.
        self._home = Path(tempfile.mkdtemp(prefix="testbed-postgres-"))
        self._data = self._home / "data"
        # PostgreSQL does not run as root.
        self._run_as = USER if os.geteuid() == 0 else None
        self.process = Process(
            "PostgreSQL",
            [
                postgres,
                *("-D", self._data),
                *("-p", str(self.port)),
                *("-h", "127.0.0.1"),
                *("-k", ""),
                # The data need not survive a crash.
                *("-c", "fsync=off"),
                *("-c", "full_page_writes=off"),
                *("-c", "synchronous_commit=off"),
                *("-c", "max_connections=200"),
            ],
            directory / "postgres.log",
            user=self._run_as,
            # After SIGTERM, PostgreSQL would wait for its clients to disconnect.
            stop_signal=signal.SIGINT,
        )

    def start(self) -> None:
        """Create the cluster if it does not exist, and start the server without waiting for it."""
        if not self._data.exists():
            if self._run_as is not None:
                try:
                    shutil.chown(self._home, self._run_as, self._run_as)
                except LookupError:
                    raise MissingTool(
                        f"PostgreSQL does not run as root: make a user {USER!r} for it"
                    ) from None
            _run(
                [
                    self._initdb,
                    *("-D", self._data),
                    *("-U", USER),
                    *("--auth", "trust"),
                    *("--encoding", "UTF8"),
                    *("--locale", "C"),
                    "--no-sync",
                ],
                self._run_as,
            )
        self.process.start()

    def wait_ready(self) -> None:
        """Wait until PostgreSQL accepts connections."""
        self.process.wait_until(
            lambda: "database system is ready to accept connections" in self.process.log_text(),
            "PostgreSQL ready",
        )

    def create_database(self, name: str) -> None:
        """Create a database with the encoding and collation that Synapse requires."""
        self.execute(
            f"CREATE DATABASE {name} ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
        )

    def execute(self, statement: str) -> None:
        """Run a statement outside of a transaction."""
        _run(
            [
                self._psql,
                *("-h", "127.0.0.1", "-p", str(self.port), "-U", USER),
                *("--no-psqlrc", "-v", "ON_ERROR_STOP=1", "-c", statement),
            ]
        )

    def connection(self, database: str) -> dict[str, str | int]:
        """The arguments for psycopg2, which are also Synapse's `database.args`."""
        return {"host": "127.0.0.1", "port": self.port, "user": USER, "dbname": database}

    def connect(self, database: str) -> Any:
        """A connection of psycopg2. The caller closes it."""
        # Not every environment has psycopg2. `__init__` checks that.
        import psycopg2

        return psycopg2.connect(**cast(Any, self.connection(database)))

    def insert(self, database: str, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        """Insert many rows. The statement has `%s` in the place of the rows."""
        from psycopg2.extras import execute_values

        with (
            closing(self.connect(database)) as connection,
            connection,
            closing(connection.cursor()) as cursor,
        ):
            execute_values(cursor, statement, rows, page_size=1_000)

    def stop(self) -> None:
        """Stop the server and delete the cluster."""
        self.process.stop()
        shutil.rmtree(self._home, ignore_errors=True)


def _run(command: Sequence[str | Path], user: str | None = None) -> None:
    done = subprocess.run(
        command,
        cwd="/",
        user=user,
        group=user,
        extra_groups=None if user is None else [],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")


def _find(program: str) -> Path:
    """A program on the PATH, or the newest one in Debian's directory for PostgreSQL."""
    found = shutil.which(program)
    if found is not None:
        return Path(found)
    versions = Path("/usr/lib/postgresql").glob(f"*/bin/{program}")
    newest = max(versions, key=lambda path: float(path.parts[4]), default=None)
    if newest is None:
        raise MissingTool("PostgreSQL is missing: apt-get install postgresql")
    return newest
