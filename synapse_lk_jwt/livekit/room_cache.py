# SPDX-License-Identifier: Apache-2.0
"""Ensures that a LiveKit room exists before a user gets a token for it."""

from collections.abc import Awaitable, Callable

from synapse_lk_jwt import metrics
from synapse_lk_jwt.compat.caches import ResponseCacheContext
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.livekit.client import RoomService

# How long a room counts as existing after LiveKit has confirmed it. Must be well below
# `DEPARTURE_TIMEOUT_SEC`.
REMEMBER_MS = 10_000


class RoomCache:
    """Remembers which LiveKit rooms exist."""

    def __init__(
        self,
        homeserver: Homeserver,
        rooms: RoomService,
        note_call: Callable[[str, str], Awaitable[None]],
    ) -> None:
        """
        Args:
            homeserver: provides the clock and the cache.
            rooms: creates and deletes rooms.
            note_call: called with the LiveKit room and the Matrix room before a room is created.
        """
        self._clock = homeserver.clock
        self._rooms = rooms
        self._note_call = note_call
        self._existing = homeserver.caches.response_cache("synapse_lk_jwt_rooms", REMEMBER_MS)

    async def ensure_room(self, livekit_room: str, room_id: str) -> None:
        """Ensures that a LiveKit room exists.

        Calls for one room share the request in flight.

        Args:
            livekit_room: the LiveKit room name.
            room_id: the Matrix room that it belongs to.

        Raises:
            SfuError: if LiveKit rejects the request, or does not answer within ten seconds.
        """
        await self._existing.wrap(
            livekit_room, self._create, livekit_room, room_id, cache_context=True
        )
        metrics.rooms_ensured.inc()

    def forget(self, livekit_room: str) -> None:
        """Forgets that a LiveKit room exists, because LiveKit reported its end."""
        self._existing.unset(livekit_room)

    async def delete_room(self, livekit_room: str) -> None:
        """Ends a call for all of its participants.

        Raises:
            SfuError: if LiveKit rejects the request, or does not answer within ten seconds.
        """
        await self._rooms.delete_room(livekit_room)
        self.forget(livekit_room)

    async def _create(
        self, livekit_room: str, room_id: str, cache_context: ResponseCacheContext[str]
    ) -> None:
        # Older versions of Synapse would remember failures as well.
        cache_context.should_cache = False
        await self._note_call(livekit_room, room_id)
        room = await self._rooms.create_room(livekit_room)
        # LiveKit returns an existing room unchanged. If its last participant left 19 seconds ago,
        # LiveKit deletes it a second later. So only some answers allow to remember a room.
        age_ms = self._clock.time_msec() - room.creation_time * 1000
        # LiveKit counts whole seconds. A creation time in the future shows that the clocks differ,
        # so that the age is unknown.
        is_young = -1000 < age_ms < REMEMBER_MS
        cache_context.should_cache = room.num_participants > 0 or is_young
