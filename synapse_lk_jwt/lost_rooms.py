# SPDX-License-Identifier: Apache-2.0
"""Recreates the LiveKit rooms that LiveKit has lost while participants were in them.

LiveKit loses its rooms when it restarts, and a LiveKit cluster loses the rooms of a node that dies.
The clients reconnect. With `auto_create: false` LiveKit answers that the room does not exist.
"""

import logging
from collections.abc import Mapping, Set

from synapse.util.async_helpers import concurrently_execute

from synapse_lk_jwt.livekit.errors import SfuError
from synapse_lk_jwt.livekit.room_cache import RoomCache

logger = logging.getLogger(__name__)

# How many rooms are recreated at a time.
CONCURRENT_ROOMS = 10


class LostRooms:
    """Remembers which rooms had participants at the last poll, and recreates those that are lost.

    Attributes, all private:
        _occupied: the rooms with participants of this homeserver.
        _without_node: the rooms that no node of LiveKit answered for.
    """

    def __init__(self, rooms: RoomCache) -> None:
        """
        Args:
            rooms: creates rooms.
        """
        self._rooms = rooms
        self._occupied: Set[str] = frozenset()
        self._without_node: Set[str] = frozenset()

    @property
    def without_node(self) -> Set[str]:
        """The rooms that no node of LiveKit answered for at the last poll."""
        return self._without_node

    async def recreate_missing(self, missing: Mapping[str, str], connected: Set[str]) -> None:
        """Recreates rooms that LiveKit does not list any more.

        Args:
            missing: the LiveKit rooms of calls that LiveKit does not list, with their Matrix rooms.
            connected: the LiveKit rooms of delegations whose participants were connected.
        """
        lost = {
            livekit_room: room_id
            for livekit_room, room_id in missing.items()
            if livekit_room in self._occupied or livekit_room in connected
        }
        await self._recreate(lost)

    async def recreate_without_node(
        self, calls: Mapping[str, str], without_node: Set[str], occupied: Set[str]
    ) -> None:
        """Recreates rooms whose node is dead, and remembers what a poll has found.

        When a participant reconnects, LiveKit moves the room to another node. Until then it cannot
        list the participants. The first poll that finds no node recreates nothing, because LiveKit
        may be about to close an empty room.

        Args:
            calls: the Matrix rooms of all calls, by LiveKit room.
            without_node: the LiveKit rooms that no node of LiveKit answered for at this poll.
            occupied: the LiveKit rooms with participants of this homeserver at this poll.
        """
        lost = without_node & self._without_node
        self._occupied, self._without_node = occupied, without_node
        await self._recreate({name: calls[name] for name in lost if name in calls})

    async def _recreate(self, lost: Mapping[str, str]) -> None:
        failures: list[str] = []

        async def recreate(livekit_room: str) -> None:
            self._rooms.forget(livekit_room)
            try:
                await self._rooms.ensure_room(livekit_room, lost[livekit_room])
            except SfuError:
                # The client has logged the failure, and the next poll tries again.
                return
            except Exception:
                # A bug or a database error with one room must not prevent the recreation of the
                # others. One traceback is enough, because the database may fail for all of them.
                if not failures:
                    logger.exception("Could not recreate the LiveKit room %r", livekit_room)
                failures.append(livekit_room)
                return
            logger.info("LiveKit lost the room of a call of %r; recreated it", lost[livekit_room])

        await concurrently_execute(recreate, lost, CONCURRENT_ROOMS)
