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

from synapse_lk_jwt import metrics
from synapse_lk_jwt.homeserver import Homeserver
from synapse_lk_jwt.issuer import Issuer, NotInRoom
from synapse_lk_jwt.sfu.names import livekit_room_name, twin_of, user_of_device_identity
from synapse_lk_jwt.sfu.rooms import RoomService, SfuError
from synapse_lk_jwt.sfu.seal import Owner, Sealer
from synapse_lk_jwt.store import Store

logger = logging.getLogger(__name__)

# How many rooms are dealt with at a time.
CONCURRENT_ROOMS = 10

# How often to try again what could not be done, and to store how far the stream was followed.
TRY_AGAIN_MS = 5_000

# Stands for all users of a room.
EVERYBODY = "*"


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
        # Who is still to be looked for because the SFU did not do as it was told, by Matrix room,
        # and since when.
        self._left_over: dict[str, dict[str, int]] = {}
        if homeserver.runs_background_tasks:
            homeserver.on_new_data(self._on_new_data)
            # What happened while this process was down.
            homeserver.run_in_background("synapse_lk_jwt_follow", self._follow)
            homeserver.repeat(TRY_AGAIN_MS, "synapse_lk_jwt_follow", self._follow_and_store)

    def owner(self, livekit_room: str, participant: ParticipantInfo) -> Owner | None:
        """Whose participant it is, as the token says; None if it is not one of ours."""
        owner = self._sealer.open(participant.attributes, participant.identity)
        if owner is None or livekit_room_name(owner.room_id, owner.slot_id) != livekit_room:
            return None
        return owner

    async def joined(self, livekit_room: str, participant: ParticipantInfo) -> None:
        """Looks at somebody who has just joined: their token may be older than their leave."""
        now_ms = self._homeserver.clock.time_msec()
        owner = self.owner(livekit_room, participant)
        room_id = owner.room_id if owner else await self._store.room_of(livekit_room)
        if room_id is None:
            return
        # That has been logged, and the poll looks again.
        with suppress(SfuError):
            await self.look(livekit_room, room_id, [participant], "joined", now_ms)

    async def look(
        self,
        livekit_room: str,
        room_id: str,
        participants: Collection[ParticipantInfo],
        cause: metrics.RemovalCause,
        since_ms: int,
    ) -> None:
        """Removes those of the participants who would not get a token any more.

        Args:
            livekit_room: the LiveKit room.
            room_id: the Matrix room.
            participants: as the SFU lists them.
            cause: why they are looked at.
            since_ms: since when there was a reason to, milliseconds since the epoch.

        Raises:
            SfuError: if the SFU could not be told.
        """
        unwanted = [
            (participant, user_id, since_ms)
            for participant, user_id in await self._users(livekit_room, participants)
            if not await self._may_be_in(user_id, room_id)
        ]
        await self._remove(livekit_room, room_id, unwanted, cause)

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
            user_id = next(
                (noted[name] for name in twin_of(participant.identity) if name in noted), None
            )
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
        self,
        livekit_room: str,
        room_id: str,
        unwanted: Iterable[tuple[ParticipantInfo, str, int]],
        cause: metrics.RemovalCause,
    ) -> None:
        """Removes participants: all that can be, whatever one of them does.

        Args:
            livekit_room: the LiveKit room.
            room_id: the Matrix room.
            unwanted: the participants, each with its user, and since when there is a reason.
            cause: what that is.

        Raises:
            SfuError: if one of them could not be removed.
        """
        failure = None
        for participant, user_id, since_ms in unwanted:
            try:
                if await self._rooms.remove_participant(livekit_room, participant.identity):
                    logger.info("Removed %s from a call of %s", user_id, room_id)
                    taken_ms = self._homeserver.clock.time_msec() - since_ms
                    metrics.removal_seconds.labels(cause).observe(max(0, taken_ms) / 1000)
            except SfuError as e:
                failure = e
        if failure is not None:
            raise failure

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
            now_ms = self._homeserver.clock.time_msec()
            changed: dict[str, dict[str, int]] = {}
            for room_id, event_type, state_key in changes:
                if event_type == EventTypes.Member:
                    changed.setdefault(room_id, {})[state_key] = now_ms
                elif event_type == EventTypes.ServerACL:
                    changed.setdefault(room_id, {})[EVERYBODY] = now_ms
            await self._deal_with(changed)
            self._position = reached
            newest = self._homeserver.stream_position()

    async def _follow_and_store(self) -> None:
        """As `_follow`. To look at a change twice does no harm, so not every step is stored."""
        await self._follow()
        left_over, self._left_over = self._left_over, {}
        await self._deal_with(left_over)
        # What is left over still would be forgotten with this process.
        if self._position not in (None, self._stored) and not self._left_over:
            assert self._position is not None
            await self._store.set_position(self._position)
            self._stored = self._position

    async def _deal_with(self, changed: Mapping[str, Mapping[str, int]]) -> None:
        """Removes who is not in Matrix rooms any more, of those in which something has changed.

        What cannot be done now is done later: one call, or one node of the SFU, that does not do as
        it is told must not hold up all others.

        Args:
            changed: users, or EVERYBODY, by Matrix room, and since when.
        """
        calls = await self._store.calls_in(changed.keys())

        async def deal_with(room_id: str) -> None:
            try:
                await self._deal_with_room(room_id, calls[room_id], changed[room_id])
            except SfuError:
                # It has been logged.
                # What has been left for longer keeps its time.
                left_over = self._left_over.get(room_id, {})
                self._left_over[room_id] = {**changed[room_id], **left_over}

        await concurrently_execute(deal_with, calls, CONCURRENT_ROOMS)

    async def _deal_with_room(
        self, room_id: str, livekit_rooms: Collection[str], changed: Mapping[str, int]
    ) -> None:
        homeserver = self._homeserver
        if not await homeserver.is_in_room(homeserver.server_name, room_id):
            for livekit_room in livekit_rooms:
                await self._rooms.delete_room(livekit_room)
                logger.info("Ended a call of %s, which this homeserver has left", room_id)
            await self._store.forget_calls(livekit_rooms)
            return
        gone = {user for user in changed if await self._is_gone(user, room_id)}
        if not gone and EVERYBODY not in changed:
            return
        failure = None
        for livekit_room in livekit_rooms:
            try:
                listing = await self._rooms.list_participants(livekit_room)
                unwanted = [
                    (participant, user_id, changed[user_id])
                    for participant, user_id in await self._users(
                        livekit_room, listing.participants
                    )
                    if user_id in gone
                ]
                await self._remove(livekit_room, room_id, unwanted, "left")
                if EVERYBODY in changed:
                    since_ms = changed[EVERYBODY]
                    await self.look(
                        livekit_room, room_id, listing.participants, "server_acl", since_ms
                    )
            except SfuError as e:
                failure = e
        if failure is not None:
            raise failure

    async def _is_gone(self, user_id: str, room_id: str) -> bool:
        """Whether a user has left a room; somebody who was invited to it has not."""
        if user_id == EVERYBODY or await self._homeserver.is_joined(user_id, room_id):
            return False
        membership = await self._homeserver.membership(user_id, room_id)
        return membership not in ("invite", "knock")
