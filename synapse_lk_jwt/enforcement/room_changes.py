# SPDX-License-Identifier: Apache-2.0
"""Removes participants from calls when their users leave the Matrix room.

The stream of state changes drives this, from a stored position on, so that nothing is missed while
the homeserver is down. A self-hosted LiveKit does not revoke tokens. So the module checks every
participant that joins. For as long as tokens live after a removal it also lists the rooms every two
seconds: LiveKit sends no webhook for a participant that brings up no media. Each removal starts
that time anew, because LiveKit sends a new token with every connection.
"""

import logging
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress

import attr
from synapse.api.constants import EventTypes
from synapse.util.async_helpers import concurrently_execute

from synapse_lk_jwt import metrics
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.delegation.tables import DelegationTable
from synapse_lk_jwt.enforcement.tables import StreamPosition
from synapse_lk_jwt.issuer import Issuer, NotInRoom
from synapse_lk_jwt.livekit.client import RoomService, SfuError
from synapse_lk_jwt.livekit.naming import (
    device_identity,
    hash_of_identity,
    possible_bases,
    user_of_device_identity,
)
from synapse_lk_jwt.livekit.participants import CallParticipant, Listing
from synapse_lk_jwt.livekit.tables import CallTable, OwnerTable
from synapse_lk_jwt.work import NotDone, WorkByKey

logger = logging.getLogger(__name__)

# How many participants of one call are removed at a time.
CONCURRENT_REQUESTS = 10

# How many calls of one Matrix room are listed at a time. Each answer takes about a millisecond of
# Synapse's main thread, for which everything else waits. A room can have very many calls.
CONCURRENT_CALLS = 3

# How often to store how far the stream was followed.
STORE_MS = 5_000

# How often to retry what could not be done, and to list the calls of a Matrix room for as long as
# tokens live after a removal.
RECHECK_MS = 2_000

# A room that has more participants, or longer names, than one listing can hold is listed so often.
MAX_LISTINGS = 5

# Stands for all users of a room.
ALL_USERS = "*"


@attr.s(auto_attribs=True, frozen=True, slots=True)
class _Change:
    """Why a user is looked for in the calls of a Matrix room.

    Attributes:
        since_ms: when that was noticed, in milliseconds since the epoch.
        position: up to where the stream was followed before.
    """

    since_ms: int
    position: int


class Membership:
    """Removes participants who must not be in a call any more.

    Attributes, all private:
        _position: up to where the stream has been read.
        _stored: what of that is stored.
        _is_following: whether the stream is being read.
        _changes: the users to look for, by Matrix room.
        _joined: the participants to check, by LiveKit room.
        _recheck_until_ms: the Matrix rooms to list every other second, and until when.
    """

    def __init__(
        self,
        homeserver: Homeserver,
        calls: CallTable,
        owners: OwnerTable,
        position: StreamPosition,
        delegations: DelegationTable,
        rooms: RoomService,
        issuer: Issuer,
    ) -> None:
        self._homeserver = homeserver
        self._calls = calls
        self._owners = owners
        self._position_table = position
        self._delegations = delegations
        self._rooms = rooms
        self._issuer = issuer
        self._position: int | None = None
        self._stored: int | None = None
        self._is_following = False
        self._changes: WorkByKey[_Change] = WorkByKey(
            homeserver, "synapse_lk_jwt_remove", self._process_room, postpone_failures=True
        )
        self._joined: WorkByKey[tuple[CallParticipant, int]] = WorkByKey(
            homeserver, "synapse_lk_jwt_joined", self._check_joined
        )
        self._rechecks: WorkByKey[int] = WorkByKey(
            homeserver, "synapse_lk_jwt_recheck", self._recheck_room
        )
        self._recheck_until_ms: dict[str, int] = {}
        if homeserver.runs_background_tasks:
            if homeserver.state_changes.are_available:
                homeserver.state_changes.on_new_data(self._on_new_data)
                # What happened while this process was down.
                homeserver.background.run("synapse_lk_jwt_follow", self._follow)
                homeserver.background.repeat(
                    STORE_MS, "synapse_lk_jwt_follow", self._follow_and_store
                )
            homeserver.background.repeat(RECHECK_MS, "synapse_lk_jwt_recheck", self._recheck)

    def joined(self, livekit_room: str, participant: CallParticipant) -> None:
        """Checks a participant that has just joined: its token may be older than its leave."""
        now_ms = self._homeserver.clock.time_msec()
        self._joined.add(livekit_room, {participant.identity: (participant, now_ms)})

    async def _check_joined(
        self, livekit_room: str, joined: dict[str, tuple[CallParticipant, int]]
    ) -> None:
        room_id = self.room_of(participant for participant, _ in joined.values())
        if room_id is None:
            room_id = await self._calls.room_of(livekit_room)
        if room_id is None:
            return
        listing = Listing(
            min(since_ms for _, since_ms in joined.values()),
            [participant for participant, _ in joined.values()],
        )
        # That has been logged, and the poll checks again.
        with suppress(SfuError):
            await self.check(livekit_room, room_id, listing, "joined")

    def room_of(self, participants: Iterable[CallParticipant]) -> str | None:
        """The Matrix room of a call, as the participants of this homeserver have it."""
        server_name = self._homeserver.server_name
        owners = (participant.owner for participant in participants)
        return next((o.room_id for o in owners if o and o.concerns(server_name)), None)

    def is_shared(self, participants: Iterable[CallParticipant]) -> bool:
        """Whether a call is another homeserver's as well, which uses the same LiveKit."""
        server_name = self._homeserver.server_name
        return any(p.owner and not p.owner.is_issued_by(server_name) for p in participants)

    async def check(
        self,
        livekit_room: str,
        room_id: str,
        listing: Listing,
        cause: metrics.RemovalCause,
    ) -> None:
        """Removes those of the participants whose users would not get a token any more.

        Args:
            livekit_room: the LiveKit room.
            room_id: the Matrix room.
            listing: the participants.
            cause: why they are checked.

        Raises:
            SfuError: if LiveKit did not remove one of them.
        """
        may_stay: dict[tuple[str, bool], bool] = {}
        unwanted = []
        for participant, user_id in await self._users(livekit_room, listing.participants):
            who = user_id, self._is_of_another(participant, user_id)
            if who not in may_stay:
                may_stay[who] = await self._may_be_in(user_id, room_id, is_of_another=who[1])
            if not may_stay[who]:
                unwanted.append((participant.identity, user_id, listing.asked_ms))
        if unwanted:
            # Each connection has brought the participant another token of LiveKit's.
            self._recheck_while_tokens_live(room_id)
        await self._remove(livekit_room, room_id, unwanted, cause)
        await self.remove_too_long(livekit_room, room_id, listing)

    async def remove_too_long(self, livekit_room: str, room_id: str, listing: Listing) -> None:
        """Removes participants with a longer identity than any client has, regardless of the user.

        Raises:
            SfuError: if LiveKit did not remove one of them.
        """
        unwanted = [
            (identity, "a participant with too long an identity", listing.asked_ms)
            for identity in listing.too_long
        ]
        await self._remove(livekit_room, room_id, unwanted, "identity_too_long")

    async def _users(
        self, livekit_room: str, participants: Iterable[CallParticipant]
    ) -> list[tuple[CallParticipant, str]]:
        """The participants whose users are known, with these."""
        noted: Mapping[str, str] = {}
        if self._issuer.can_update_own_metadata:
            # LiveKit lets participants replace their attributes before the first webhook.
            noted = await self._owners.in_room(livekit_room)
        found = []
        for participant in participants:
            user_id = None
            if noted:
                hashes = map(hash_of_identity, possible_bases(participant.identity))
                user_id = next((noted[h] for h in hashes if h in noted), None)
            if user_id is None:
                owner = participant.owner
                # Tokens of the stand-alone service have nothing sealed in them.
                user_id = owner.user_id if owner else user_of_device_identity(participant.identity)
            if user_id is not None:
                found.append((participant, user_id))
        return found

    def _is_of_another(self, participant: CallParticipant, user_id: str) -> bool:
        """Whether another homeserver issued the token, to a user who is not of this one."""
        homeserver = self._homeserver
        return (
            participant.owner is not None
            and not participant.owner.is_issued_by(homeserver.server_name)
            and not homeserver.is_mine(user_id)
        )

    async def _may_be_in(self, user_id: str, room_id: str, *, is_of_another: bool) -> bool:
        homeserver = self._homeserver
        if is_of_another:
            return not await self._issuer.is_known_to_be_out(user_id, room_id)
        if homeserver.is_mine(user_id) and not await homeserver.users.is_active(user_id):
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
        unwanted: Collection[tuple[str, str, int]],
        cause: metrics.RemovalCause,
    ) -> None:
        """Removes participants: all that can be, even if LiveKit does not remove one of them.

        Args:
            livekit_room: the LiveKit room.
            room_id: the Matrix room.
            unwanted: identities, each with its user, and since when there is a reason.
            cause: what that is.

        Raises:
            SfuError: if one of them could not be removed.
        """
        failures = []
        # A participant can have hundreds of duplicate connections: one line for all of them.
        removed: dict[str, int] = {}

        async def remove(one: tuple[str, str, int]) -> None:
            identity, user_id, since_ms = one
            try:
                was_there = await self._rooms.remove_participant(livekit_room, identity)
            except SfuError as e:
                failures.append(e)
                return
            if was_there:
                removed[user_id] = removed.get(user_id, 0) + 1
                taken_ms = self._homeserver.clock.time_msec() - since_ms
                metrics.removal_seconds.labels(cause).observe(max(0, taken_ms) / 1000)

        await concurrently_execute(remove, unwanted, CONCURRENT_REQUESTS)
        for user_id, number in removed.items():
            times = f" ({number} connections)" if number > 1 else ""
            logger.info("Removed %r from a call of %r%s", user_id, room_id, times)
        if failures:
            raise failures[0]

    def _on_new_data(self) -> None:
        # Called for every event there is, so that nothing may be done here for most of them.
        if self._is_following or self._position is None:
            return
        try:
            newest = self._homeserver.state_changes.position()
            if self._homeserver.state_changes.any_since(self._position):
                self._homeserver.background.run("synapse_lk_jwt_follow", self._follow)
            else:
                self._position = max(self._position, newest)
        except Exception:
            # Synapse calls this in a loop with callbacks of its own, which must not suffer if a
            # newer Synapse has other internals. `_follow_and_store` goes on without being woken.
            logger.exception("Could not find out whether the state of a room has changed")

    async def _follow(self) -> None:
        """Reads all changes of state since the position that was reached last."""
        if self._is_following:
            return
        self._is_following = True
        try:
            await self._catch_up()
        finally:
            self._is_following = False

    async def _catch_up(self) -> None:
        newest = self._homeserver.state_changes.position()
        if self._position is None:
            self._position = self._stored = await self._position_table.get()
            if self._position is None or self._position > newest:
                # The first start; or events were removed, as Synapse itself has it too.
                self._position = newest
        while self._position < newest:
            reached, changes = await self._homeserver.state_changes.between(self._position, newest)
            change = _Change(self._homeserver.clock.time_msec(), self._position)
            changed: dict[str, dict[str, _Change]] = {}
            for room_id, event_type, state_key in changes:
                if event_type == EventTypes.Member:
                    changed.setdefault(room_id, {})[state_key] = change
                elif event_type == EventTypes.ServerACL:
                    changed.setdefault(room_id, {})[ALL_USERS] = change
            # Most rooms have no call, and no work.
            for room_id in await self._calls.in_rooms(changed.keys()):
                self._changes.add(room_id, changed[room_id])
            self._position = reached
            newest = self._homeserver.state_changes.position()

    async def _follow_and_store(self) -> None:
        """As `_follow`. Work that is repeated does no harm, so not every step is stored."""
        await self._follow()
        if self._position is None:
            return
        # What is not done yet would be forgotten with this process.
        begun = (change.position for change in self._changes.unfinished())
        done = min(begun, default=self._position)
        if done != self._stored:
            await self._position_table.set(done)
            self._stored = done

    async def _process_room(self, room_id: str, changed: Mapping[str, _Change]) -> None:
        """Removes users who are not in a Matrix room any more from its calls.

        Args:
            room_id: the Matrix room.
            changed: users, or ALL_USERS, and why.

        Raises:
            NotDone: if LiveKit did not do all of it. The work is retried later.
        """
        try:
            await self._process_room_or_fail(room_id, changed)
        except SfuError:
            raise NotDone() from None

    async def _process_room_or_fail(self, room_id: str, changed: Mapping[str, _Change]) -> None:
        homeserver = self._homeserver
        livekit_rooms = (await self._calls.in_rooms([room_id])).get(room_id, [])
        if not await homeserver.rooms.is_host_joined(homeserver.server_name, room_id):
            for livekit_room in livekit_rooms:
                await self._end(livekit_room, room_id)
            return
        gone = {user for user in changed if await self._is_gone(user, room_id)}
        if not gone and ALL_USERS not in changed:
            return
        self._recheck_while_tokens_live(room_id)
        failures: list[SfuError] = []

        async def process(livekit_room: str) -> None:
            try:
                await self._remove_gone(livekit_room, room_id, gone, changed)
            except SfuError as e:
                failures.append(e)

        await concurrently_execute(process, livekit_rooms, CONCURRENT_CALLS)
        if failures:
            raise failures[0]

    async def _end(self, livekit_room: str, room_id: str) -> None:
        """Ends a call of a Matrix room that this homeserver has left.

        A call that is another homeserver's as well goes on there, without the users of this one.
        """
        homeserver = self._homeserver
        listing = await self._rooms.list_participants(livekit_room)
        if not self.is_shared(listing.participants):
            await self._rooms.delete_room(livekit_room)
            await self._calls.forget([livekit_room])
            logger.info("Ended a call of %r, which this homeserver has left", room_id)
            return
        # Their tokens still work, and LiveKit's room stays.
        self._recheck_while_tokens_live(room_id)
        unwanted = [
            (participant.identity, user_id, listing.asked_ms)
            for participant, user_id in await self._users(livekit_room, listing.participants)
            if homeserver.is_mine(user_id)
            or (participant.owner and participant.owner.is_issued_by(homeserver.server_name))
        ]
        await self._remove(livekit_room, room_id, unwanted, "left")

    async def _remove_gone(
        self,
        livekit_room: str,
        room_id: str,
        gone: Collection[str],
        changed: Mapping[str, _Change],
    ) -> None:
        """Removes users from one call of a Matrix room, however large its listing is."""
        for _ in range(MAX_LISTINGS):
            listing = await self._rooms.list_participants(livekit_room)
            unwanted = [
                (participant.identity, user_id, changed[user_id].since_ms)
                for participant, user_id in await self._users(livekit_room, listing.participants)
                if user_id in gone
            ]
            await self._remove(livekit_room, room_id, unwanted, "left")
            if ALL_USERS in changed:
                since = attr.evolve(listing, asked_ms=changed[ALL_USERS].since_ms)
                await self.check(livekit_room, room_id, since, "server_acl")
            else:
                await self.remove_too_long(livekit_room, room_id, listing)
            if listing.is_complete:
                return
            if not unwanted and not listing.too_long:
                break
        await self._remove_unlisted(livekit_room, room_id, gone)

    async def _remove_unlisted(
        self, livekit_room: str, room_id: str, gone: Collection[str]
    ) -> None:
        """Removes users from a call that cannot be listed as a whole.

        First by the identities that are known without a listing. If the rest of the call still
        cannot be listed, the call ends: a call that a user cannot be removed from must not go on.
        """
        for user_id in gone:
            known = set(await self._delegations.identities_of_user(livekit_room, user_id))
            for device_id in await self._homeserver.users.device_ids(user_id):
                known.add(device_identity(user_id, device_id))
            now_ms = self._homeserver.clock.time_msec()
            unwanted = [(identity, user_id, now_ms) for identity in known]
            await self._remove(livekit_room, room_id, unwanted, "left")
        listing = await self._rooms.list_participants(livekit_room)
        await self.remove_too_long(livekit_room, room_id, listing)
        if not listing.is_complete and not listing.too_long:
            if self.is_shared(listing.participants):
                logger.warning(
                    "LiveKit's list of the participants of a call of %r is too long to find those"
                    " who have left the room. The call goes on: it is another homeserver's as well",
                    room_id,
                )
                return
            await self._rooms.delete_room(livekit_room)
            logger.warning(
                "Ended a call of %r: LiveKit's list of its participants is too long to find those"
                " who have left the room",
                room_id,
            )

    async def _is_gone(self, user_id: str, room_id: str) -> bool:
        """Whether a user has left a room. A user who is only invited to it has not."""
        if user_id == ALL_USERS or await self._homeserver.rooms.is_joined(user_id, room_id):
            return False
        membership = await self._homeserver.rooms.membership(user_id, room_id)
        return membership not in ("invite", "knock")

    def _recheck_while_tokens_live(self, room_id: str) -> None:
        """Has the calls of a Matrix room listed for as long as a removed user may hold a token."""
        # Other processes remove participants as well, but do not list their rooms.
        if self._homeserver.runs_background_tasks:
            now_ms = self._homeserver.clock.time_msec()
            self._recheck_until_ms[room_id] = now_ms + self._issuer.usable_after_removal_ms

    async def _recheck(self) -> None:
        """Lists the calls that a removed user may still have a token for."""
        self._changes.retry()
        now_ms = self._homeserver.clock.time_msec()
        for room_id, until_ms in list(self._recheck_until_ms.items()):
            if until_ms <= now_ms:
                del self._recheck_until_ms[room_id]
        calls = await self._calls.in_rooms(self._recheck_until_ms.keys())
        for room_id, livekit_rooms in calls.items():
            # The removal itself lists them, too.
            if room_id not in self._changes:
                self._rechecks.add(room_id, dict.fromkeys(livekit_rooms, now_ms))

    async def _recheck_room(self, room_id: str, livekit_rooms: Collection[str]) -> None:
        for livekit_room in livekit_rooms:
            # That has been logged, and the next round tries again.
            with suppress(SfuError):
                listing = await self._rooms.list_participants(livekit_room)
                await self.check(livekit_room, room_id, listing, "recheck")
