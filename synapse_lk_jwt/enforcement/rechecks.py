# SPDX-License-Identifier: Apache-2.0
"""Lists the calls of a Matrix room every two seconds after a removal, while tokens are usable.

A self-hosted LiveKit does not revoke tokens, and sends no webhook for a participant without media.
Each removal restarts the time, because LiveKit sends a new token with every connection.
"""

from collections.abc import Collection
from contextlib import suppress

from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.enforcement.participants import ParticipantEnforcer, Reason
from synapse_lk_jwt.enforcement.recheck_list import RecheckList
from synapse_lk_jwt.enforcement.removals import RoomRemovals
from synapse_lk_jwt.livekit.errors import SfuError
from synapse_lk_jwt.livekit.tables import CallTable
from synapse_lk_jwt.work import WorkByKey

RECHECK_MS = 2_000


class Rechecker:
    """Checks the participants in the calls of the rooms on the recheck list."""

    def __init__(
        self,
        homeserver: Homeserver,
        calls: CallTable,
        rooms: RecheckList,
        enforcer: ParticipantEnforcer,
        removals: RoomRemovals,
    ) -> None:
        """
        Args:
            homeserver: runs the rechecks.
            calls: the calls of a Matrix room.
            rooms: the Matrix rooms to recheck.
            enforcer: checks the participants.
            removals: the unfinished removals. They list the calls of their room as well.
        """
        self._homeserver = homeserver
        self._calls = calls
        self._rooms = rooms
        self._enforcer = enforcer
        self._removals = removals
        self._work: WorkByKey[None] = WorkByKey(
            homeserver, "synapse_lk_jwt_recheck", self._recheck_room
        )

    def start(self) -> None:
        """Starts the rechecks, on the process that runs background tasks."""
        self._homeserver.background.repeat(RECHECK_MS, "synapse_lk_jwt_recheck", self._recheck)

    async def _recheck(self) -> None:
        calls = await self._calls.in_rooms(self._rooms.current())
        for room_id, livekit_rooms in calls.items():
            if room_id not in self._removals:
                self._work.add(room_id, dict.fromkeys(livekit_rooms))

    async def _recheck_room(self, room_id: str, livekit_rooms: Collection[str]) -> None:
        for livekit_room in livekit_rooms:
            # The client has logged the failure, and the next recheck lists the call again.
            with suppress(SfuError):
                listing = await self._enforcer.list_participants(livekit_room)
                reason = Reason("recheck", listing.requested_ts)
                await self._enforcer.check_participants(livekit_room, room_id, listing, reason)
