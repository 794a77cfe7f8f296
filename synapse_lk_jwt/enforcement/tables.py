# SPDX-License-Identifier: Apache-2.0
"""The stored position in the stream of state changes, so that a restart misses no change."""

from synapse.module_api import DatabasePool, LoggingTransaction

from synapse_lk_jwt.compat.module_database import ModuleDatabase

STREAM = "synapse_lk_jwt_stream"


class StreamPosition:
    """The position in Synapse's event stream up to which changes have been processed."""

    def __init__(self, database: ModuleDatabase) -> None:
        self._database = database

    async def get(self) -> int | None:
        """The stream ordering; None before the first `set`."""

        def select(txn: LoggingTransaction) -> int | None:
            position: int | None = DatabasePool.simple_select_one_onecol_txn(
                txn, STREAM, {}, "position", allow_none=True
            )
            return position

        return await self._database.run("position", select)

    async def set(self, position: int) -> None:
        """Stores the stream ordering. Only the process that follows the stream may call this."""

        def store(txn: LoggingTransaction) -> None:
            if not DatabasePool.simple_update_txn(txn, STREAM, {}, {"position": position}):
                DatabasePool.simple_insert_txn(txn, STREAM, {"position": position})

        await self._database.write("set_position", store)
