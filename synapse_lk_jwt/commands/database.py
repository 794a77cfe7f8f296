# SPDX-License-Identifier: Apache-2.0
"""A plain connection to Synapse's database, for commands that run next to Synapse.

The commands need no more of `homeserver.yaml` than the database, so they also work when Synapse
rejects another part of it.
"""

import contextlib
import sqlite3
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from synapse.module_api.errors import ConfigError

from synapse_lk_jwt.compat.config import find_config_files, read_config_files

# How long a statement waits for a lock of another process, in seconds.
LOCK_TIMEOUT_SEC = 10


class DatabaseUnavailable(Exception):
    """Synapse's database cannot be opened. The text names the cause, and what to do."""


class Database:
    """One transaction at a time on Synapse's main database.

    Attributes:
        name: the database as an admin names it. It contains no password.
        error: the base class of the driver's errors.
    """

    def __init__(self, connection: Any, name: str, error: type[Exception], mark: str) -> None:
        self.name = name
        self.error = error
        self._connection = connection
        self._mark = mark

    def select(self, sql: str, args: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Rows of a SELECT with `?` for each argument."""
        with closing(self._connection.cursor()) as cursor:
            cursor.execute(sql.replace("?", self._mark), tuple(args))
            return [tuple(row) for row in cursor.fetchall()]

    def tables(self, prefix: str) -> list[str]:
        """The names of the tables that begin with a prefix, in alphabetical order."""
        if isinstance(self._connection, sqlite3.Connection):
            sql = "SELECT name FROM sqlite_master WHERE type = 'table'"
        else:
            # The schemas in which an unqualified name finds a table, as Synapse's own statements.
            sql = "SELECT tablename FROM pg_tables WHERE schemaname = ANY (current_schemas(false))"
        return sorted(name for (name,) in self.select(sql) if name.startswith(prefix))

    def drop(self, tables: Sequence[str]) -> None:
        """Drops tables in one transaction: all of them, or none."""
        with closing(self._connection.cursor()) as cursor:
            # Both drivers are in autocommit mode, because sqlite3 begins no transaction for DDL.
            cursor.execute("BEGIN")
            for table in tables:
                cursor.execute(f'DROP TABLE "{table}"')
            cursor.execute("COMMIT")


@contextlib.contextmanager
def connect(config_paths: Sequence[str]) -> Iterator[Database]:
    """Connects to the database that Synapse's configuration names.

    Args:
        config_paths: files, and directories of `.yaml` files. Later ones win, as for Synapse.

    Raises:
        DatabaseUnavailable: if the configuration names none, or it cannot be opened.
    """
    settings = _settings(config_paths)
    args = {k: v for k, v in settings.get("args", {}).items() if not k.startswith("cp_")}
    if settings.get("name", "sqlite3") == "sqlite3":
        database = _open_sqlite(str(args.get("database")))
    else:
        database = _open_postgres(args)
    with closing(database._connection):
        yield database


def _settings(config_paths: Sequence[str]) -> Mapping[str, Any]:
    """The section of `homeserver.yaml` for the database with Synapse's main tables."""
    try:
        # Synapse prints the names of the files that it ignores.
        with contextlib.redirect_stdout(sys.stderr):
            config = read_config_files(find_config_files(list(config_paths)))
    except OSError as e:
        raise DatabaseUnavailable(
            f"Cannot read {e.filename!r}: {e.strerror}. Run this command as Synapse's user"
        ) from None
    except yaml.YAMLError as e:
        # The text of the error quotes lines, and these may contain secrets.
        mark = getattr(e, "problem_mark", None)
        place = f"{mark.name!r}, line {mark.line + 1}" if mark else "the configuration"
        raise DatabaseUnavailable(f"Cannot read {place}: it is not valid YAML") from None
    except ConfigError as e:
        raise DatabaseUnavailable(f"Cannot read Synapse's configuration: {e.msg}") from None
    if path := config.get("database_path"):
        return {"args": {"database": path}}
    candidates = [config["database"]] if config.get("database") else []
    candidates += (config.get("databases") or {}).values()
    for settings in candidates:
        if "main" in (settings.get("data_stores") or ["main", "state"]):
            found: Mapping[str, Any] = settings
            return found
    raise DatabaseUnavailable(
        "Synapse's configuration has no `database` section. Repeat -c for each file and directory"
        " that Synapse is started with"
    )


def _open_sqlite(path: str) -> Database:
    file = Path(path).resolve()
    try:
        # Without `mode=rw` a wrong path would create an empty database.
        connection = sqlite3.connect(
            f"{file.as_uri()}?mode=rw", uri=True, timeout=LOCK_TIMEOUT_SEC, isolation_level=None
        )
        connection.execute("SELECT name FROM sqlite_master LIMIT 1")
    except sqlite3.Error as e:
        raise DatabaseUnavailable(
            f"Cannot open the SQLite database {file}: {e}. Run this command as Synapse's user, and"
            " in Synapse's working directory if `database` in homeserver.yaml is a relative path"
        ) from None
    return Database(connection, f"SQLite database {file}", sqlite3.Error, "?")


def _open_postgres(args: Mapping[str, Any]) -> Database:
    # Synapse on SQLite may have no driver for PostgreSQL installed.
    psycopg2 = import_module("psycopg2")
    name = f"PostgreSQL database {args.get('dbname', args.get('database'))!r}"
    try:
        connection = psycopg2.connect(**args)
        connection.autocommit = True
        with closing(connection.cursor()) as cursor:
            cursor.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_SEC}s'")
    except psycopg2.Error as e:
        raise DatabaseUnavailable(
            f"Cannot connect to the {name}: {' '.join(str(e).split())}. Run this command as"
            " Synapse's user, with the environment that Synapse has"
        ) from None
    return Database(connection, name, psycopg2.Error, "%s")
