# SPDX-License-Identifier: Apache-2.0
"""Which of Synapse's processes have loaded the module, and whether LiveKit's webhooks reach them.

Each process notes that it is there, and when it was told something, in a table that all can read:
so a missing process, and webhooks that go astray, are found by any of the others.
"""

import logging
from collections.abc import Iterable

import attr

from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.livekit.naming import CHECK_ROOM
from synapse_lk_jwt.store import Process, Store

logger = logging.getLogger(__name__)

BEAT_MS = 60_000

# A process that has not been seen for so long is not there.
GONE_MS = 3 * BEAT_MS

FORGET_MS = 24 * 3_600_000

# What is written into the database because of webhooks is written so often at most.
WEBHOOK_MS = 60_000
REFUSED_MS = 1_000

# A webhook may be late by so much; LiveKit tries again for a while.
LATE_MS = 20_000


class ProcessRegistry:
    """Notes this process, and knows of the others."""

    def __init__(self, homeserver: Homeserver, store: Store) -> None:
        self._homeserver = homeserver
        self._store = store
        self._began_ms = homeserver.clock.time_msec()
        self._this = Process(
            homeserver.instance_name, homeserver.runs_background_tasks, self._began_ms, 0, 0
        )
        self._is_told = True
        self._is_looked_after = True
        homeserver.background.repeat(
            BEAT_MS, "synapse_lk_jwt_beat", self._beat, at_once=True, run_on_all_instances=True
        )

    async def present(self) -> list[Process]:
        """The processes that are there, as far as they have said so."""
        gone_ms = self._homeserver.clock.time_msec() - GONE_MS
        return [p for p in await self._store.processes() if p.seen_ms > gone_ms]

    def webhook(self, livekit_room: str) -> None:
        """Notes that LiveKit has told this process something of a room."""
        now_ms = self._homeserver.clock.time_msec()
        if now_ms >= self._this.webhook_ms + WEBHOOK_MS or livekit_room.startswith(CHECK_ROOM):
            self._this = attr.evolve(self._this, webhook_ms=now_ms)
            self._homeserver.background.run("synapse_lk_jwt_beat", self._beat)

    def refused(self) -> None:
        """Notes that this process rejected a request that may be a webhook of LiveKit's."""
        now_ms = self._homeserver.clock.time_msec()
        if now_ms >= self._this.refused_ms + REFUSED_MS:
            self._this = attr.evolve(self._this, refused_ms=now_ms)
            self._homeserver.background.run("synapse_lk_jwt_beat", self._beat)

    async def look(self, joined_sec: Iterable[int]) -> None:
        """Finds out whether webhooks have told of those who are in calls, and says so once.

        Args:
            joined_sec: when they joined, as the SFU has it, seconds since the epoch.
        """
        now_ms = self._homeserver.clock.time_msec()
        joined_ms = [
            joined
            for joined in (1000 * seconds for seconds in joined_sec)
            if self._began_ms < joined < now_ms - LATE_MS
        ]
        if not joined_ms:
            return
        told_ms = max((p.webhook_ms for p in await self._store.processes()), default=0)
        is_told = told_ms + WEBHOOK_MS >= max(joined_ms)
        if self._is_told and not is_told:
            logger.error(
                "Somebody has joined a call, and no webhook of LiveKit has told so: leaves come"
                " late. %s",
                self._homeserver.check_command,
            )
        self._is_told = is_told

    async def _beat(self) -> None:
        now_ms = self._homeserver.clock.time_msec()
        self._this = attr.evolve(self._this, seen_ms=now_ms)
        await self._store.note_process(self._this, now_ms - FORGET_MS)
        if self._this.is_background or now_ms < self._began_ms + GONE_MS:
            return
        is_looked_after = any(process.is_background for process in await self.present())
        if self._is_looked_after and not is_looked_after:
            logger.error(
                "The process that runs background tasks is not there, or has not loaded this"
                " module: delayed leaves are not restarted, nobody is removed from calls. %s",
                self._homeserver.check_command,
            )
        self._is_looked_after = is_looked_after
