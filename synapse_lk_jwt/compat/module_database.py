# SPDX-License-Identifier: Apache-2.0
"""The module's own tables in the homeserver's database, SQLite or PostgreSQL.

The tables hold what must survive a restart, and what Synapse's processes must know about each
other. This file has the schema, and runs the transactions of the classes for single tables.
"""

from collections.abc import Callable, Collection
from contextlib import closing
from typing import Any, TypeVar

from synapse.module_api import DatabasePool, LoggingTransaction, ModuleApi
from synapse.storage.database import make_conn

from synapse_lk_jwt.compat.database import (
    IsolationLevel,
    PostgresEngine,
    Sqlite3Engine,
    make_in_list_sql_clause,
)
from synapse_lk_jwt.compat.homeserver import Homeserver

T = TypeVar("T")

PREFIX = "synapse_lk_jwt_"

# The version of the tables below. A change to the tables increases it by one, and adds a step from
# the version before to `_create_tables`.
SCHEMA_VERSION = 1

# Columns whose names end in `_ts` are milliseconds since the epoch, with 0 for never. Truth values
# are 0 or 1 in a SMALLINT: `synapse_port_db` fails on BOOLEAN columns that it does not know.
SCHEMA = (
    """
    CREATE TABLE synapse_lk_jwt_calls (
        livekit_room TEXT NOT NULL PRIMARY KEY,
        room_id TEXT NOT NULL,
        seen_ts BIGINT NOT NULL
    )
    """,
    "CREATE INDEX synapse_lk_jwt_calls_room ON synapse_lk_jwt_calls (room_id)",
    # A hash, because identities can be longer than a key in an index of PostgreSQL.
    """
    CREATE TABLE synapse_lk_jwt_owners (
        livekit_room TEXT NOT NULL,
        identity_hash TEXT NOT NULL,
        user_id TEXT NOT NULL,
        seen_ts BIGINT NOT NULL,
        PRIMARY KEY (livekit_room, identity_hash)
    )
    """,
    """
    CREATE TABLE synapse_lk_jwt_delegations (
        delay_id TEXT NOT NULL PRIMARY KEY,
        user_id TEXT NOT NULL,
        room_id TEXT NOT NULL,
        livekit_room TEXT NOT NULL,
        member_identity TEXT NOT NULL,
        event_type TEXT NOT NULL,
        state_key TEXT,
        sticky_key TEXT,
        delay_ms BIGINT NOT NULL,
        created_ts BIGINT NOT NULL,
        has_multiple_identities SMALLINT NOT NULL,
        phase TEXT NOT NULL,
        due_ts BIGINT NOT NULL,
        restarted_ts BIGINT NOT NULL,
        connected_ts BIGINT NOT NULL,
        suspected_gone_ts BIGINT NOT NULL,
        attempts INTEGER NOT NULL,
        leave TEXT
    )
    """,
    "CREATE INDEX synapse_lk_jwt_delegations_due ON synapse_lk_jwt_delegations (due_ts)",
    "CREATE INDEX synapse_lk_jwt_delegations_room"
    " ON synapse_lk_jwt_delegations (livekit_room, user_id)",
    "CREATE INDEX synapse_lk_jwt_delegations_user ON synapse_lk_jwt_delegations (user_id)",
    """
    CREATE TABLE synapse_lk_jwt_identities (
        livekit_room TEXT NOT NULL,
        identity TEXT NOT NULL,
        delay_id TEXT NOT NULL,
        sid TEXT,
        sid_ts BIGINT NOT NULL DEFAULT 0,
        PRIMARY KEY (livekit_room, identity, delay_id)
    )
    """,
    "CREATE INDEX synapse_lk_jwt_identities_delay ON synapse_lk_jwt_identities (delay_id)",
    "CREATE TABLE synapse_lk_jwt_stream (position BIGINT NOT NULL)",
    """
    CREATE TABLE synapse_lk_jwt_processes (
        instance TEXT NOT NULL PRIMARY KEY,
        is_background SMALLINT NOT NULL,
        seen_ts BIGINT NOT NULL,
        webhook_ts BIGINT NOT NULL,
        rejected_ts BIGINT NOT NULL
    )
    """,
)


class UnsupportedSchema(Exception):
    """A version of this module with other tables has used the database."""

    def __init__(self, version: int) -> None:
        super().__init__(
            f"The tables {PREFIX}* in Synapse's database have version {version}, and this"
            f" synapse-lk-jwt supports version {SCHEMA_VERSION}. The module is off. Install the"
            " newer synapse-lk-jwt that created the tables, or stop Synapse and drop them"
        )


class ModuleDatabase:
    """Runs transactions on this module's tables. The first one creates them."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._has_tables = False
        self.error: type[Exception] = homeserver.database.error
        """The base class of the errors of the database's driver."""

    def now_ts(self) -> int:
        """The time, in milliseconds since the epoch."""
        return int(self._homeserver.clock.time_msec())

    async def run(self, desc: str, func: Callable[..., T], *args: object, **more: Any) -> T:
        """Runs a function in a transaction.

        Args:
            desc: a name for Synapse's metrics and log.
            func: gets the transaction, and then `args`. Synapse may call it again.
            args: the function's other arguments.
            more: keyword arguments of `Database.run_interaction`.

        Raises:
            UnsupportedSchema: if a newer version of the module has changed the tables.
        """
        run = self._homeserver.database.run_interaction
        if not self._has_tables:
            await run(f"{PREFIX}create_tables", _create_tables)
            self._has_tables = True
        return await run(PREFIX + desc, func, *args, **more)

    async def write(self, desc: str, func: Callable[..., T], *args: object) -> T:
        """As `run`, for a function that changes rows which other processes change as well.

        Under Synapse's REPEATABLE READ all but one of these processes would fail, and Synapse gives
        up after five attempts. Under READ COMMITTED a writer waits for the others, and then sees
        their changes.
        """
        return await self.run(desc, func, *args, isolation_level=IsolationLevel.READ_COMMITTED)


def unsupported_schema(api: ModuleApi) -> UnsupportedSchema | None:
    """Why this version of the module cannot use the database; None if it can.

    Opens a connection of its own, as Synapse does at start: modules are loaded before Synapse's
    connections can be used.

    Args:
        api: Synapse's module API.
    """
    hs = api._hs
    engine = hs.get_datastores().main.database_engine
    (config,) = (c for c in hs.config.database.databases if "main" in c.databases)
    connection = make_conn(
        db_config=config,
        engine=engine,
        default_txn_name=f"{PREFIX}startup",
        server_name=api.server_name,
    )
    with closing(connection), closing(connection.cursor(txn_name=f"{PREFIX}startup")) as txn:
        txn.execute(
            "SELECT to_regclass(?)"
            if isinstance(engine, PostgresEngine)
            else "SELECT (SELECT name FROM sqlite_master WHERE name = ?)",
            (f"{PREFIX}schema",),
        )
        (has_schema,) = txn.fetchone() or (None,)
        version = _version(txn) if has_schema else None
    return None if version in (None, SCHEMA_VERSION) else UnsupportedSchema(version or 0)


def _create_tables(txn: LoggingTransaction) -> None:
    """Creates the tables, unless another process has done so."""
    if isinstance(txn.database_engine, Sqlite3Engine):
        # Without this, each statement would be a transaction of its own.
        txn.execute("BEGIN IMMEDIATE")
    else:
        # Nothing else locks that table in this mode. The lock precedes the first read: a process
        # that has waited for it must see the tables that another process has created.
        txn.execute("LOCK TABLE schema_version IN SHARE ROW EXCLUSIVE MODE")
    txn.execute("CREATE TABLE IF NOT EXISTS synapse_lk_jwt_schema (version INTEGER NOT NULL)")
    version = _version(txn)
    if version is None:
        for statement in SCHEMA:
            txn.execute(statement)
        DatabasePool.simple_insert_txn(txn, f"{PREFIX}schema", {"version": SCHEMA_VERSION})
    elif version != SCHEMA_VERSION:
        raise UnsupportedSchema(version)


def _version(txn: LoggingTransaction) -> int | None:
    version: int | None = DatabasePool.simple_select_one_onecol_txn(
        txn, f"{PREFIX}schema", {}, "version", allow_none=True
    )
    return version


def lock_name(txn: LoggingTransaction, name: str) -> None:
    """Makes this transaction wait for transactions of other processes that locked the same name.

    A Synapse on SQLite has one process, and SQLite has one writer at a time.
    """
    if isinstance(txn.database_engine, PostgresEngine):
        txn.execute("SELECT pg_advisory_xact_lock(hashtext(?))", (f"synapse_lk_jwt {name}",))


def for_update(txn: LoggingTransaction) -> str:
    """The clause that locks the rows which a query reads; nothing on SQLite."""
    return "FOR UPDATE" if isinstance(txn.database_engine, PostgresEngine) else ""


def in_list(
    txn: LoggingTransaction, column: str, values: Collection[object]
) -> tuple[str, list[Any]]:
    """A condition that a column has one of some values, and the arguments for it."""
    return make_in_list_sql_clause(txn.database_engine, column, values)
