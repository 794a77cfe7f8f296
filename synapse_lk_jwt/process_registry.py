# SPDX-License-Identifier: Apache-2.0
"""Which of Synapse's processes have loaded the module, and whether LiveKit's webhooks reach them.

Each process writes a heartbeat into a table that all processes read, together with the times of the
webhooks that it received. So any of them notices that the background worker lacks the module, or
that webhooks do not arrive.
"""

import logging
from collections.abc import Iterable

import attr
from synapse.module_api import DatabasePool, LoggingTransaction

from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.compat.module_database import ModuleDatabase
from synapse_lk_jwt.livekit.naming import CHECK_ROOM

logger = logging.getLogger(__name__)

HEARTBEAT_MS = 60_000

# A process without a heartbeat for this long is not running.
GONE_MS = 3 * HEARTBEAT_MS

FORGET_MS = 24 * 3_600_000

# A process writes at most this often because of a webhook, or because of a rejected request.
WEBHOOK_MS = 60_000
REJECTED_MS = 1_000

# How late a webhook may arrive. LiveKit retries some times.
LATE_MS = 20_000


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Process:
    """One of Synapse's processes that has loaded the module.

    Times are milliseconds since the epoch, 0 for never.

    Attributes:
        instance: its name.
        is_background: whether it runs background tasks.
        seen_ts: when it wrote its last heartbeat.
        webhook_ts: when it received a webhook of LiveKit.
        rejected_ts: when it rejected a request that may be a webhook with another signature.
    """

    instance: str
    is_background: bool
    seen_ts: int
    webhook_ts: int
    rejected_ts: int


class ProcessTable:
    """The rows of all processes."""

    def __init__(self, database: ModuleDatabase) -> None:
        self._database = database

    async def note(self, process: Process, forget_before_ts: int) -> None:
        """Writes the row of one process, and deletes old ones.

        Args:
            process: the process.
            forget_before_ts: rows with an older heartbeat are deleted; milliseconds since the
                epoch.
        """

        def note(txn: LoggingTransaction) -> None:
            txn.execute(
                "DELETE FROM synapse_lk_jwt_processes WHERE seen_ts < ?", (forget_before_ts,)
            )
            txn.execute(
                "INSERT INTO synapse_lk_jwt_processes AS old"
                " (instance, is_background, seen_ts, webhook_ts, rejected_ts)"
                " VALUES (?, ?, ?, ?, ?) ON CONFLICT (instance) DO UPDATE SET"
                " is_background = EXCLUDED.is_background, seen_ts = EXCLUDED.seen_ts,"
                # A restarted process does not know the webhooks that it received before.
                " webhook_ts = CASE WHEN EXCLUDED.webhook_ts > old.webhook_ts"
                " THEN EXCLUDED.webhook_ts ELSE old.webhook_ts END,"
                " rejected_ts = CASE WHEN EXCLUDED.rejected_ts > old.rejected_ts"
                " THEN EXCLUDED.rejected_ts ELSE old.rejected_ts END",
                (
                    process.instance,
                    int(process.is_background),
                    process.seen_ts,
                    process.webhook_ts,
                    process.rejected_ts,
                ),
            )

        await self._database.write("note_process", note)

    async def all(self) -> list[Process]:
        """All processes that have a row."""

        def select(txn: LoggingTransaction) -> list[Process]:
            columns = [field.name for field in attr.fields(Process)]
            rows = DatabasePool.simple_select_list_txn(
                txn, "synapse_lk_jwt_processes", None, columns
            )
            return [Process(name, bool(is_background), *ts) for name, is_background, *ts in rows]

        return await self._database.run("processes", select)


class ProcessRegistry:
    """Registers this process, and watches the others.

    Attributes, all private:
        _this: the row of this process.
        _has_webhooks: False once a join without a webhook has been logged.
        _has_background_process: False once its absence has been logged.
    """

    def __init__(self, homeserver: Homeserver, table: ProcessTable) -> None:
        self._homeserver = homeserver
        self._table = table
        self._started_ts = homeserver.clock.time_msec()
        self._this = Process(
            homeserver.instance_name, homeserver.runs_background_tasks, self._started_ts, 0, 0
        )
        self._has_webhooks = True
        self._has_background_process = True

    def start(self) -> None:
        """Starts the heartbeat."""
        self._homeserver.background.repeat(
            HEARTBEAT_MS,
            "synapse_lk_jwt_heartbeat",
            self._heartbeat,
            at_once=True,
            run_on_all_instances=True,
        )

    async def present(self) -> list[Process]:
        """The processes with a recent heartbeat."""
        gone_ts = self._homeserver.clock.time_msec() - GONE_MS
        return [process for process in await self._table.all() if process.seen_ts > gone_ts]

    def note_webhook(self, livekit_room: str) -> None:
        """Notes that this process received a webhook of LiveKit about a room."""
        now_ts = self._homeserver.clock.time_msec()
        if now_ts >= self._this.webhook_ts + WEBHOOK_MS or livekit_room.startswith(CHECK_ROOM):
            self._this = attr.evolve(self._this, webhook_ts=now_ts)
            self._homeserver.background.run("synapse_lk_jwt_heartbeat", self._heartbeat)

    def note_rejected(self) -> None:
        """Notes that this process rejected a request that may be a webhook of LiveKit."""
        now_ts = self._homeserver.clock.time_msec()
        if now_ts >= self._this.rejected_ts + REJECTED_MS:
            self._this = attr.evolve(self._this, rejected_ts=now_ts)
            self._homeserver.background.run("synapse_lk_jwt_heartbeat", self._heartbeat)

    async def check_webhooks(self, joined_sec: Iterable[int]) -> None:
        """Logs once if participants have joined and no process received a webhook.

        Args:
            joined_sec: when the participants joined, by LiveKit's clock, in seconds since the
                epoch.
        """
        now_ts = self._homeserver.clock.time_msec()
        joined_ts = [
            joined
            for joined in (1000 * seconds for seconds in joined_sec)
            if self._started_ts < joined < now_ts - LATE_MS
        ]
        if not joined_ts:
            return
        webhook_ts = max((p.webhook_ts for p in await self._table.all()), default=0)
        has_webhooks = webhook_ts + WEBHOOK_MS >= max(joined_ts)
        if self._has_webhooks and not has_webhooks:
            logger.error(
                "A participant joined a call but no LiveKit webhook arrived. Leaves will be"
                " detected late. %s",
                self._homeserver.check_command,
            )
        self._has_webhooks = has_webhooks

    async def _heartbeat(self) -> None:
        now_ts = self._homeserver.clock.time_msec()
        self._this = attr.evolve(self._this, seen_ts=now_ts)
        await self._table.note(self._this, now_ts - FORGET_MS)
        if self._this.is_background or now_ts < self._started_ts + GONE_MS:
            return
        has_background_process = any(process.is_background for process in await self.present())
        if self._has_background_process and not has_background_process:
            logger.error(
                "The background worker is not running or has not loaded this module. Delayed leave"
                " events are not being restarted and participants are not being removed. %s",
                self._homeserver.check_command,
            )
        self._has_background_process = has_background_process
