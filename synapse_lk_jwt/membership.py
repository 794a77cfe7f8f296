# SPDX-License-Identifier: Apache-2.0
"""Participants follow the Matrix room: who is not in the room any more is removed from its calls.

Driven by the stream of state changes, from a stored position on, so that nothing is missed while
the homeserver is down. A self-hosted LiveKit does not revoke tokens, so that everybody who joins is
looked at again.
"""

import logging
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress

from livekit.protocol.models import ParticipantInfo
from synapse.api.constants import EventTypes
from synapse.util.async_helpers import concurrently_execute

from synapse_lk_jwt.homeserver import Homeserver
from synapse_lk_jwt.issuer import Issuer, NotInRoom
from synapse_lk_jwt.sfu.names import livekit_room_name, user_of_device_identity
from synapse_lk_jwt.sfu.rooms import RoomService, SfuError
from synapse_lk_jwt.sfu.seal import Owner, Sealer
from synapse_lk_jwt.store import Store

logger = logging.getLogger(__name__)

# How many rooms are dealt with at a time.
CONCURRENT_ROOMS = 10

# After the SFU could not be asked.
TRY_AGAIN_MS = 5_000


class Membership:
    """Removes participants who must not be in a call any more."""

    def __init__(
        self,
        homeserver: Homeserver,
        store: Store,
        rooms: RoomService,
        issuer: Issuer,
        sealer: Sealer,
    ) -> None:
        self._homeserver = homeserver
        self._store = store
        self._rooms = rooms
        self._issuer = issuer
        self._sealer = sealer
        # Up to where the stream has been dealt with, and what of that is stored.
        self._position: int | None = None
        self._stored: int | None = None
        self._is_following = False
        if homeserver.runs_background_tasks:
            homeserver.on_new_data(self._on_new_data)
            # What happened while this process was down.
            homeserver.run_in_background("synapse_lk_jwt_follow", self._follow)
            homeserver.repeat(TRY_AGAIN_MS, "synapse_lk_jwt_follow", self._follow_and_store)

    def owner(self, livekit_room: str, participant: ParticipantInfo) -> Owner | None:
        """Whose participant it is, as the token says; None if it is not one of ours."""
        owner = self._sealer.open(participant.attributes)
        if owner is None or livekit_room_name(owner.room_id, owner.slot_id) != livekit_room:
            return None
        return owner

    async def joined(self, livekit_room: str, participant: ParticipantInfo) -> None:
        """Looks at somebody who has just joined: their token may be older than their leave."""
        owner = self.owner(livekit_room, participant)
        room_id = owner.room_id if owner else await self._store.room_of(livekit_room)
        if room_id is None:
            return
        # That has been logged, and the poll looks again.
        with suppress(SfuError):
            await self.look(livekit_room, room_id, [participant])

    async def look(
        self, livekit_room: str, room_id: str, participants: Collection[ParticipantInfo]
    ) -> None:
        """Removes those of the participants who would not get a token any more.

        Args:
            livekit_room: the LiveKit room.
            room_id: the Matrix room.
            participants: as the SFU lists them.

        Raises:
            SfuError: if the SFU could not be told.
        """
        for participant, user_id in await self._users(livekit_room, participants):
            if not await self._may_be_in(user_id, room_id):
                await self._remove(livekit_room, room_id, participant, user_id)

    async def _users(
        self, livekit_room: str, participants: Iterable[ParticipantInfo]
    ) -> list[tuple[ParticipantInfo, str]]:
        """The participants whose users are known, with these."""
        noted: Mapping[str, str] = {}
        if self._issuer.can_update_own_metadata:
            # What was sealed when they joined counts, and not what they have made of it.
            noted = await self._store.owners(livekit_room)
        found = []
        for participant in participants:
            user_id = noted.get(participant.identity)
            if user_id is None:
                owner = self.owner(livekit_room, participant)
                # Tokens of older versions of this module have nothing sealed in them.
                user_id = owner.user_id if owner else user_of_device_identity(participant.identity)
            if user_id is not None:
                found.append((participant, user_id))
        return found

    async def _may_be_in(self, user_id: str, room_id: str) -> bool:
        homeserver = self._homeserver
        if homeserver.is_mine(user_id) and not await homeserver.is_active(user_id):
            return False
        try:
            await self._issuer.check_membership(user_id, room_id)
        except NotInRoom:
            return False
        return True

    async def _remove(
        self, livekit_room: str, room_id: str, participant: ParticipantInfo, user_id: str
    ) -> None:
        await self._rooms.remove_participant(livekit_room, participant.identity)
        logger.info("Removed %s from a call of %s", user_id, room_id)

    def _on_new_data(self) -> None:
        # Called for every event there is, so that nothing may be done here for most of them.
        if self._is_following or self._position is None:
            return
        newest = self._homeserver.stream_position()
        if self._homeserver.has_state_changed(self._position):
            self._homeserver.run_in_background("synapse_lk_jwt_follow", self._follow)
        else:
            self._position = max(self._position, newest)

    async def _follow(self) -> None:
        """Deals with all changes of state since the position that was reached last."""
        if self._is_following:
            return
        self._is_following = True
        try:
            await self._catch_up()
        finally:
            self._is_following = False

    async def _catch_up(self) -> None:
        newest = self._homeserver.stream_position()
        if self._position is None:
            self._position = self._stored = await self._store.position()
            if self._position is None or self._position > newest:
                # The first start; or events were removed, as Synapse itself has it too.
                self._position = newest
        while self._position < newest:
            reached, changes = await self._homeserver.state_changes(self._position, newest)
            try:
                await self._deal_with(changes)
            except SfuError:
                # It has been logged. Nothing is lost: the position stays.
                return
            self._position = reached
            newest = self._homeserver.stream_position()

    async def _follow_and_store(self) -> None:
        """As `_follow`. To look at a change twice does no harm, so not every step is stored."""
        await self._follow()
        if self._position is not None and self._position != self._stored:
            await self._store.set_position(self._position)
            self._stored = self._position

    async def _deal_with(self, changes: Iterable[tuple[str, str, str]]) -> None:
        changed: dict[str, set[str]] = {}
        reshaped: set[str] = set()
        for room_id, event_type, state_key in changes:
            if event_type == EventTypes.Member:
                changed.setdefault(room_id, set()).add(state_key)
            elif event_type == EventTypes.ServerACL:
                reshaped.add(room_id)
        calls = await self._store.calls_in(changed.keys() | reshaped)
        failures: list[SfuError] = []

        async def deal_with(room_id: str) -> None:
            try:
                await self._deal_with_room(
                    room_id, calls[room_id], changed.get(room_id, set()), room_id in reshaped
                )
            except SfuError as e:
                failures.append(e)

        await concurrently_execute(deal_with, calls, CONCURRENT_ROOMS)
        if failures:
            raise failures[0]

    async def _deal_with_room(
        self, room_id: str, livekit_rooms: Collection[str], changed: Collection[str], all_: bool
    ) -> None:
        homeserver = self._homeserver
        if not await homeserver.is_in_room(homeserver.server_name, room_id):
            for livekit_room in livekit_rooms:
                await self._rooms.delete_room(livekit_room)
                logger.info("Ended a call of %s, which this homeserver has left", room_id)
            await self._store.forget_calls(livekit_rooms)
            return
        gone = {user for user in changed if not await homeserver.is_joined(user, room_id)}
        if not gone and not all_:
            return
        for livekit_room in livekit_rooms:
            participants = await self._rooms.list_participants(livekit_room)
            for participant, user_id in await self._users(livekit_room, participants):
                if user_id in gone or (all_ and not await self._may_be_in(user_id, room_id)):
                    await self._remove(livekit_room, room_id, participant, user_id)
