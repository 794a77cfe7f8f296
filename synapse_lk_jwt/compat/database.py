# SPDX-License-Identifier: Apache-2.0
"""The homeserver's database."""

from collections.abc import Callable, Collection
from typing import Any, Protocol, TypeVar

from synapse.module_api import DatabasePool, LoggingTransaction, ModuleApi
from synapse.storage.database import make_in_list_sql_clause
from synapse.storage.engines import PostgresEngine, Sqlite3Engine
from synapse.storage.engines._base import IsolationLevel
from synapse.util.iterutils import batch_iter

__all__ = [
    "Database",
    "IsolationLevel",
    "PostgresEngine",
    "Sqlite3Engine",
    "make_in_list_sql_clause",
]

T = TypeVar("T")


class DatabaseDriver(Protocol):
    """The parts of the database's driver (PEP 249) that this file uses."""

    @property
    def Error(self) -> type[Exception]: ...


class DatabaseEngine(Protocol):
    """The parts of Synapse's database engine that this file uses."""

    @property
    def module(self) -> DatabaseDriver: ...


class DatabaseStore(Protocol):
    """The parts of Synapse's store that this file uses."""

    @property
    def database_engine(self) -> DatabaseEngine: ...

    @property
    def db_pool(self) -> DatabasePool: ...


class Database:
    """Runs transactions.

    Attributes:
        error: the base class of the exceptions that the database driver raises.
        pool: Synapse's pool of connections.
    """

    def __init__(self, api: ModuleApi, store: DatabaseStore) -> None:
        self._api = api
        self.error = store.database_engine.module.Error
        self.pool = store.db_pool

    async def run_interaction(
        self, desc: str, func: Callable[..., T], *args: Any, **more: Any
    ) -> T:
        """Runs a function in a transaction.

        Synapse runs it up to five times if PostgreSQL reports a conflict with another transaction.

        Args:
            desc: a name for Synapse's metrics and log.
            func: the function, which takes the transaction first.
            args: the function's other arguments.
            more: keyword arguments of Synapse's `runInteraction`, such as `isolation_level`.
        """
        return await self._api.run_db_interaction(desc, func, *args, **more)

    async def select_matching(self, sql: str, column: str, values: Collection[str]) -> set[str]:
        """The subset of many values that a query finds.

        One query replaces thousands of reads of Synapse's caches, which would delay other work on
        the reactor.

        Args:
            sql: a query of that column, which ends in WHERE or AND.
            column: the column.
            values: the values to search for.
        """

        def select(txn: LoggingTransaction) -> set[str]:
            found: set[str] = set()
            for batch in batch_iter(values, 1000):
                clause, args = make_in_list_sql_clause(txn.database_engine, column, batch)
                txn.execute(f"{sql} {clause}", args)
                found.update(value for (value,) in txn)
            return found

        if not values:
            return set()
        return await self.run_interaction(f"synapse_lk_jwt_{column}", select)
