# SPDX-License-Identifier: Apache-2.0
"""What happens on the SFU: told by its webhooks, and looked for at regular intervals.

Webhooks can be lost, repeated or out of order, so that none of them is taken at its word when
somebody is gone. The poll finds out what no webhook has told.
"""

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Set
from contextlib import suppress

import attr
from livekit.protocol import models
from livekit.protocol.models import DisconnectReason
from synapse.util.async_helpers import concurrently_execute

from synapse_lk_jwt import metrics
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.delegation.service import DelegationService
from synapse_lk_jwt.delegation.tables import Tracked
from synapse_lk_jwt.enforcement.room_changes import Membership
from synapse_lk_jwt.livekit.client import NoNode, RoomService, SfuError
from synapse_lk_jwt.livekit.naming import possible_bases
from synapse_lk_jwt.livekit.participants import CallParticipant, Listing
from synapse_lk_jwt.livekit.tables import CallTable, OwnerTable, TooManySlots
from synapse_lk_jwt.process_registry import ProcessRegistry
from synapse_lk_jwt.work import WorkByKey

logger = logging.getLogger(__name__)

# How many rooms are looked at, at a time.
CONCURRENT_ROOMS = 10

# Where the poll is turned off, delayed leaves that were handed over need it all the same: a lost
# webhook would have one restarted for ever.
SAFETY_MS = 300_000

# Calls that nobody has noted for so long, and that the SFU does not know, are forgotten.
FORGET_CALLS_MS = 600_000

# A room in which nothing changes is listed so often. The polls share these listings among them.
SWEEP_MS = 300_000

# So many of them are listed at each poll in any case. On a small server that is all of them, so
# that a participant whose LiveKit node died is noticed at the next poll.
MIN_SWEPT = 10

# One request costs as much as this many participants in a listing.
PARTICIPANTS_FOR_A_REQUEST = 20

# From livekit-protocol 1.1.29 or so on.
RoomEndReason = getattr(models, "RoomEndReason", None)

PARTICIPANT_EVENTS = (
    "participant_joined",
    "participant_left",
    "participant_connection_aborted",
)

# A participant who goes for one of these reasons comes back: on a reconnect LiveKit ends the old
# session ahead of the new one, and when it is shut down its people have not left.
NO_LEAVE = frozenset(
    {
        DisconnectReason.DUPLICATE_IDENTITY,
        DisconnectReason.MIGRATION,
        DisconnectReason.SERVER_SHUTDOWN,
        # LiveKit asks the client to reconnect after a fault in the negotiation.
        DisconnectReason.STATE_MISMATCH,
    }
)

# The same for a room that finished. Older livekit-protocol packages do not know the reasons.
NO_LEAVE_OF_ROOM = frozenset(
    value
    for name, value in (RoomEndReason.items() if RoomEndReason is not None else ())
    if name in ("ROOM_END_SERVER_SHUTDOWN", "ROOM_END_SUPERSEDED")
)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Webhook:
    """What a webhook of LiveKit says.

    Attributes:
        event: its name.
        livekit_room: the LiveKit room.
        participant: the participant. None if it is about none, or if this one is not readable: its
            identity is too long, or the webhook is too large to be read as a whole.
        room_end_reason: why the room finished, a `RoomEndReason`; 0 if LiveKit does not say.
    """

    event: str
    livekit_room: str
    participant: CallParticipant | None
    room_end_reason: int = 0


@attr.s(auto_attribs=True, frozen=True, slots=True)
class _Seen:
    """When a room was listed, and what ListRooms said of it then.

    Attributes:
        listed_ms: when it was listed, in milliseconds since the epoch.
        participants: how many participants it had.
        users: the users of this homeserver among their owners.
        is_ours: False if all tokens of the participants were issued by another homeserver.
    """

    listed_ms: int
    participants: int
    users: frozenset[str]
    is_ours: bool


@attr.s(auto_attribs=True, slots=True)
class _Poll:
    """What one poll knows and finds out.

    Attributes:
        asked_ms: when it began, in milliseconds since the epoch.
        there: the LiveKit rooms there are, with the number of their participants.
        calls: the Matrix room of each LiveKit room that was noted.
        tracked: the delegations of each LiveKit room.
        joined_sec: when the participants joined that were listed.
        without_node: rooms that no node of LiveKit answers for.
        unknown: rooms whose participants LiveKit did not name.
        has_failed: whether the check of a room has failed for another reason.
    """

    asked_ms: int
    there: Mapping[str, int]
    calls: Mapping[str, str]
    tracked: Mapping[str, list[Tracked]]
    joined_sec: list[int] = attr.Factory(list)
    without_node: set[str] = attr.Factory(set)
    unknown: set[str] = attr.Factory(set)
    has_failed: bool = False


class Monitor:
    """Follows what happens on the SFU.

    Attributes, all private:
        _seen: the rooms that have been listed, while ListRooms names them with participants.
        _occupied: our rooms with participants of this homeserver at the last poll.
        _without_node: those that no node of LiveKit answered for at the last poll.
        _is_polling: whether a poll is under way.
        _unreadable: the rooms of webhooks that could not be read as a whole.
        _finished: the rooms that LiveKit says have finished.
    """

    def __init__(
        self,
        homeserver: Homeserver,
        calls: CallTable,
        owners: OwnerTable,
        rooms: RoomService,
        leaves: DelegationService,
        membership: Membership,
        processes: ProcessRegistry,
        interval_ms: int,
        owners_kept_ms: int | None,
    ) -> None:
        """
        Args:
            homeserver: runs the polls.
            calls: the calls that were noted.
            owners: the owners that were noted.
            rooms: the SFU.
            leaves: follows who joins and leaves.
            membership: checks who joins.
            processes: finds out whether webhooks arrive.
            interval_ms: milliseconds between two polls, 0 for none.
            owners_kept_ms: how long the owner of an identity is noted after it was last seen, in
                milliseconds; None if owners are not noted.
        """
        self._homeserver = homeserver
        self._calls = calls
        self._owners = owners
        self._rooms = rooms
        self._leaves = leaves
        self._membership = membership
        self._processes = processes
        self._owners_kept_ms = owners_kept_ms
        self._seen: dict[str, _Seen] = {}
        self._occupied: set[str] = set()
        self._without_node: set[str] = set()
        self._is_off = interval_ms == 0
        self._interval_ms = interval_ms or SAFETY_MS
        self._is_polling = False
        self._unreadable: WorkByKey[str] = WorkByKey(
            homeserver, "synapse_lk_jwt_unreadable", self._check_after_unreadable
        )
        self._finished: WorkByKey[str] = WorkByKey(
            homeserver, "synapse_lk_jwt_finished", self._check_after_finished
        )
        homeserver.background.repeat(
            self._interval_ms, "synapse_lk_jwt_poll", self.poll, at_once=interval_ms > 0
        )

    async def webhook(self, webhook: Webhook) -> None:
        """Notes what a webhook says; what follows from it is done afterwards.

        It must be verified.
        """
        livekit_room, participant = webhook.livekit_room, webhook.participant
        if webhook.event == "room_finished":
            self._rooms.forget(livekit_room)
            if webhook.room_end_reason not in NO_LEAVE_OF_ROOM:
                await self._leaves.on_room_finished(livekit_room)
                self._finished.add(livekit_room, {livekit_room: webhook.event})
        elif webhook.event not in PARTICIPANT_EVENTS:
            return
        elif participant is None:
            self._unreadable.add(livekit_room, {livekit_room: webhook.event})
        elif webhook.event == "participant_joined":
            if participant.can_be_stored:
                room_id = self._membership.room_of([participant])
                await self._leaves.on_joined(
                    livekit_room, participant.identity, participant.sid, room_id
                )
            # A duplicate connection can have any name, and is checked in any case.
            self._membership.joined(livekit_room, participant)
        elif participant.can_be_stored:
            identity, sid = participant.identity, participant.sid
            if participant.disconnect_reason in NO_LEAVE:
                await self._leaves.on_session_replaced(livekit_room, identity, sid)
            else:
                await self._leaves.on_left(livekit_room, identity, sid)

    async def _check_after_unreadable(self, livekit_room: str, _: Mapping[str, str]) -> None:
        """Finds out what a webhook said that names the room and nothing else."""
        delegations = await self._leaves.tracked(livekit_room)
        room_id = await self._calls.room_of(livekit_room)
        try:
            # Ahead of any doubt: a participant can cause many such webhooks, and to doubt all
            # delegations of the room takes a question and two writes for each.
            listing = await self._rooms.list_participants(livekit_room)
            await self._leaves.suspect_absent(delegations, listing)
            if room_id is not None:
                await self._membership.check(livekit_room, room_id, listing, "joined")
        except SfuError:
            # It has been logged. The clock asks again.
            await self._leaves.suspect_room(livekit_room)

    async def _check_after_finished(self, livekit_room: str, _: Mapping[str, str]) -> None:
        """Notes a call again if there are participants in it: LiveKit reported its end in error.

        Without that, users who leave the Matrix room would not be removed from the call until the
        poll lists it again.
        """
        # It has been logged, or there is no place for another slot. The poll lists the room.
        with suppress(SfuError, TooManySlots):
            listing = await self._rooms.list_participants(livekit_room)
            room_id = self._membership.room_of(listing.participants)
            if room_id is not None:
                await self._calls.note(livekit_room, room_id)

    async def poll(self) -> None:
        """Checks the whole SFU once, unless a poll is under way."""
        if self._is_polling:
            return
        self._is_polling = True
        try:
            await self._poll()
        except SfuError:
            # That has been logged, and says nothing about the participants.
            metrics.nobody_knows()
        finally:
            self._is_polling = False

    async def _poll(self) -> None:
        for phase, number in (await self._leaves.count()).items():
            metrics.delegations.labels(phase.value).set(number)
        if self._owners_kept_ms is not None:
            await self._owners.forget(self._owners_kept_ms)
        tracked: dict[str, list[Tracked]] = {}
        for delegation in await self._leaves.tracked():
            tracked.setdefault(delegation.livekit_room, []).append(delegation)
        if self._is_off and not tracked and not await self._calls.all():
            self._note({})
            return
        asked_ms = self._homeserver.clock.time_msec()
        there = await self._rooms.list_rooms()
        # Afterwards, so that a room that has just been closed is not in here and was lost.
        poll = _Poll(asked_ms, there, await self._calls.all(), tracked)

        await self._recreate_lost_rooms(poll)
        await self._check_rooms(poll)
        gone = Listing(asked_ms, ())
        for livekit_room in tracked.keys() - there.keys():
            await self._leaves.on_poll(tracked[livekit_room], gone)
        # A participant who comes back takes the room to another node. Until that is done here,
        # LiveKit cannot name its participants. Not at once, because an empty room may be closed.
        await self._recreate(poll, poll.without_node & self._without_node)

        ours = {name: number for name, number in there.items() if number and name in poll.calls}
        self._occupied = {
            name for name in ours if name not in self._seen or self._seen[name].is_ours
        }
        self._without_node = poll.without_node
        await self._processes.check_webhooks(poll.joined_sec)
        await self._calls.forget(poll.calls.keys() - there.keys(), FORGET_CALLS_MS)
        self._note({**ours, **dict.fromkeys(poll.unknown & poll.calls.keys(), math.nan)})

    def _note(self, numbers: Mapping[str, float]) -> None:
        """Sets the metrics to how many participants a poll has found in each room."""
        metrics.rooms.set(len(numbers))
        metrics.participants.set(sum(numbers.values()))
        metrics.last_poll.set(self._homeserver.clock.time())

    async def _check_rooms(self, poll: _Poll) -> None:
        """Checks the rooms in which something may have changed, and some of the others."""
        self._seen = {name: seen for name, seen in self._seen.items() if poll.there.get(name)}
        users = {user_id for seen in self._seen.values() for user_id in seen.users}
        inactive = await self._homeserver.users.select_inactive(users)
        blocked = await self._homeserver.rooms.select_blocked(set(poll.calls.values()))
        to_list = self._rooms_to_list(poll, inactive)
        to_list |= {name for name in self._seen if poll.calls.get(name) in blocked}

        async def check(livekit_room: str) -> None:
            try:
                if livekit_room in to_list:
                    await self._check_room(livekit_room, poll)
                else:
                    await self._check_delegations(livekit_room, poll)
            except SfuError as e:
                # It has been logged. The next poll tries again.
                self._seen.pop(livekit_room, None)
                poll.unknown.add(livekit_room)
                if isinstance(e, NoNode):
                    poll.without_node.add(livekit_room)
            except Exception:
                self._seen.pop(livekit_room, None)
                self._log_failure(livekit_room, poll)

        names = to_list | (poll.tracked.keys() & poll.there.keys())
        await concurrently_execute(check, names, CONCURRENT_ROOMS)

    @staticmethod
    def _log_failure(livekit_room: str, poll: _Poll) -> None:
        """Logs the exception in hand: a failure in one room must not keep a poll from the others.

        One traceback a poll is enough where the database fails for all of them.
        """
        if not poll.has_failed:
            logger.exception("Could not check the LiveKit room %r", livekit_room)
        poll.has_failed = True

    def _rooms_to_list(self, poll: _Poll, inactive: Set[str]) -> set[str]:
        to_list = set()
        quiet = []
        for name, number in poll.there.items():
            seen = self._seen.get(name)
            if seen is None:
                has_changed = number > 0
            else:
                has_changed = number != seen.participants or not inactive.isdisjoint(seen.users)
            if has_changed or self._is_listing_cheaper(poll.tracked.get(name, ()), number):
                to_list.add(name)
            elif seen is not None:
                quiet.append((seen.listed_ms, name))
        # Those that were listed longest ago, so many at each poll that all have their turn in time.
        quiet.sort()
        share = max(MIN_SWEPT, len(quiet) * self._interval_ms // SWEEP_MS)
        if self._without_node:
            # A node of LiveKit has died, and may have had any of them.
            share = len(quiet)
        overdue_ms = poll.asked_ms + self._interval_ms - SWEEP_MS
        to_list.update(name for _, name in quiet[:share])
        to_list.update(name for listed_ms, name in quiet[share:] if listed_ms <= overdue_ms)
        return to_list

    @staticmethod
    def _is_listing_cheaper(delegations: Collection[Tracked], participants: int) -> bool:
        """Whether a listing is a cheaper way to find the participants of delegations."""
        requests = sum(len(delegation.identities) for delegation in delegations)
        return requests > 1 and requests * PARTICIPANTS_FOR_A_REQUEST >= participants

    async def _check_delegations(self, livekit_room: str, poll: _Poll) -> None:
        """Asks for the participants of delegations alone, in a room that is otherwise quiet."""
        delegations = poll.tracked[livekit_room]
        await self._leaves.poll_participants(livekit_room, delegations)

    async def _check_room(self, livekit_room: str, poll: _Poll) -> None:
        """Lists one room, and applies what that says to delegations and membership."""
        listing = await self._rooms.list_participants(livekit_room)
        await self._leaves.on_poll(poll.tracked.get(livekit_room, ()), listing)
        poll.joined_sec.extend(participant.joined_at for participant in listing.participants)
        if self._owners_kept_ms is not None:
            bases = {base for p in listing.participants for base in possible_bases(p.identity)}
            await self._owners.keep(livekit_room, bases)
        room_id = poll.calls.get(livekit_room)
        if room_id is None:
            room_id = self._membership.room_of(listing.participants)
            if room_id is not None:
                await self._calls.note(livekit_room, room_id)
        if room_id is not None:
            try:
                await self._membership.check(livekit_room, room_id, listing, "poll")
            except SfuError:
                # It has been logged, and says nothing about the number of participants.
                self._seen.pop(livekit_room, None)
                return
        if listing.is_complete:
            users = {p.owner.user_id for p in listing.participants if p.owner}
            self._seen[livekit_room] = _Seen(
                poll.asked_ms,
                poll.there[livekit_room],
                frozenset(filter(self._homeserver.is_mine, users)),
                is_ours=self._is_ours(listing),
            )

    def _is_ours(self, listing: Listing) -> bool:
        """Whether a participant of a room needs this homeserver to recreate the room."""
        server_name = self._homeserver.server_name
        return not self._membership.is_shared(listing.participants) or any(
            p.owner and p.owner.is_issued_by(server_name) for p in listing.participants
        )

    async def _recreate_lost_rooms(self, poll: _Poll) -> None:
        """Recreates the rooms that LiveKit has lost with participants in them, as on a restart.

        Their clients are reconnecting, and while LiveKit has `auto_create: false` it answers that
        there is no such room.
        """
        lost = {
            livekit_room
            for livekit_room in poll.calls.keys() - poll.there.keys()
            if livekit_room in self._occupied
            or any(delegation.is_settled for delegation in poll.tracked.get(livekit_room, ()))
        }
        await self._recreate(poll, lost)

    async def _recreate(self, poll: _Poll, livekit_rooms: Iterable[str]) -> None:
        async def recreate(livekit_room: str) -> None:
            room_id = poll.calls[livekit_room]
            self._rooms.forget(livekit_room)
            try:
                await self._rooms.ensure_room(livekit_room, room_id)
            except SfuError:
                # It has been logged, and the next poll tries again.
                return
            except Exception:
                self._log_failure(livekit_room, poll)
                return
            logger.info("LiveKit lost the room of a call of %r; recreated it", room_id)

        ours = [name for name in livekit_rooms if name in poll.calls]
        await concurrently_execute(recreate, ours, CONCURRENT_ROOMS)
