# SPDX-License-Identifier: Apache-2.0
"""The poll: compares the LiveKit rooms with what the module knows, at regular intervals.

It lists rooms and passes each listing to delegations and enforcement. A failure in one room does
not prevent the check of the others.
"""

import logging
import math
from collections.abc import Collection, Mapping

import attr
from synapse.util.async_helpers import concurrently_execute

from synapse_lk_jwt import metrics
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.delegation.service import DelegationService
from synapse_lk_jwt.delegation.tables import Tracked
from synapse_lk_jwt.enforcement.owners import ParticipantOwners
from synapse_lk_jwt.enforcement.participants import ParticipantEnforcer, Reason
from synapse_lk_jwt.livekit.client import RoomService
from synapse_lk_jwt.livekit.errors import NoNode, SfuError
from synapse_lk_jwt.livekit.participants import Listing, is_shared, matrix_room
from synapse_lk_jwt.livekit.room_cache import RoomCache
from synapse_lk_jwt.livekit.tables import CallTable
from synapse_lk_jwt.lost_rooms import LostRooms
from synapse_lk_jwt.poll_schedule import ListedRoom, PollSchedule
from synapse_lk_jwt.process_registry import ProcessRegistry

logger = logging.getLogger(__name__)

# How many rooms are checked at a time.
CONCURRENT_ROOMS = 10

# Delegated delayed leaves need a poll even if the admin turned polling off. Otherwise the module
# would restart a leave forever after a lost webhook.
SAFETY_MS = 300_000

# The poll forgets a call that LiveKit does not list, if no process has noted it for this long.
FORGET_CALLS_MS = 600_000

# One request costs as much as this many participants in a listing.
PARTICIPANTS_FOR_A_REQUEST = 20


@attr.s(auto_attribs=True, slots=True)
class _Poll:
    """What one poll knows, and what it has found.

    Attributes:
        began_ts: when it began, in milliseconds since the epoch.
        listed: the rooms that LiveKit lists, with the number of their participants.
        calls: the Matrix room of each LiveKit room that was noted.
        tracked: the delegations of each LiveKit room.
        joined_sec: when the listed participants joined, in seconds since the epoch.
        without_node: rooms that no node of LiveKit answers for.
        unknown: rooms whose participants LiveKit did not name.
        has_failed: whether the check of a room has failed for another reason.
    """

    began_ts: int
    listed: Mapping[str, int]
    calls: Mapping[str, str]
    tracked: Mapping[str, list[Tracked]]
    joined_sec: list[int] = attr.Factory(list)
    without_node: set[str] = attr.Factory(set)
    unknown: set[str] = attr.Factory(set)
    has_failed: bool = False

    @property
    def occupied(self) -> dict[str, int]:
        """The noted calls that have participants, with the number of their participants."""
        return {name: n for name, n in self.listed.items() if n and name in self.calls}

    @property
    def missing(self) -> dict[str, str]:
        """The Matrix rooms of the noted calls that LiveKit does not list, by LiveKit room."""
        return {name: room for name, room in self.calls.items() if name not in self.listed}

    @property
    def connected(self) -> set[str]:
        """The LiveKit rooms of delegations whose participant is certainly connected."""
        return {name for name, ds in self.tracked.items() if any(d.is_settled for d in ds)}


class Monitor:
    """Polls LiveKit.

    Attributes, all private:
        _schedule: what was listed, and what to list next.
        _lost_rooms: recreates rooms that LiveKit lost.
        _is_polling: whether a poll is running.
    """

    def __init__(
        self,
        homeserver: Homeserver,
        calls: CallTable,
        rooms: RoomService,
        room_cache: RoomCache,
        delegations: DelegationService,
        enforcer: ParticipantEnforcer,
        owners: ParticipantOwners,
        processes: ProcessRegistry,
        interval_ms: int,
    ) -> None:
        """
        Args:
            homeserver: runs the polls.
            calls: the calls that were noted.
            rooms: the SFU.
            room_cache: recreates rooms that LiveKit lost.
            delegations: follows the participants whose leaves are delegated.
            enforcer: removes participants who may not be in a call.
            owners: forgets the owners of identities that are no longer in a call.
            processes: finds out whether webhooks arrive.
            interval_ms: milliseconds between two polls, 0 for none.
        """
        self._homeserver = homeserver
        self._calls = calls
        self._rooms = rooms
        self._delegations = delegations
        self._enforcer = enforcer
        self._owners = owners
        self._processes = processes
        self._is_off = interval_ms == 0
        self._interval_ms = interval_ms or SAFETY_MS
        self._schedule = PollSchedule(self._interval_ms)
        self._lost_rooms = LostRooms(room_cache)
        self._is_polling = False

    def start(self) -> None:
        """Starts the polls, on the process that runs background tasks."""
        self._homeserver.background.repeat(
            self._interval_ms, "synapse_lk_jwt_poll", self.poll, at_once=not self._is_off
        )

    async def poll(self) -> None:
        """Checks the whole SFU once, unless a poll is running."""
        if self._is_polling:
            return
        self._is_polling = True
        try:
            await self._poll()
        except SfuError:
            # The client has logged the failure. Without an answer, the participants are unknown.
            metrics.set_unknown()
        finally:
            self._is_polling = False

    async def _poll(self) -> None:
        for phase, number in (await self._delegations.count()).items():
            metrics.delegations.labels(phase.value).set(number)
        await self._owners.forget_unseen()
        tracked: dict[str, list[Tracked]] = {}
        for delegation in await self._delegations.tracked():
            tracked.setdefault(delegation.livekit_room, []).append(delegation)
        if self._is_off and not tracked and not await self._calls.all():
            self._set_metrics({})
            return
        began_ts = self._homeserver.clock.time_msec()
        listed = await self._rooms.list_rooms()
        # The calls are read after the listing. A room that LiveKit closed in between is not noted
        # any more, so it does not count as lost.
        poll = _Poll(began_ts, listed, await self._calls.all(), tracked)
        await self._lost_rooms.recreate_missing(poll.missing, poll.connected)
        await self._check_rooms(poll)
        await self._check_missing_rooms(poll)
        await self._finish(poll)

    async def _finish(self, poll: _Poll) -> None:
        occupied = {name for name in poll.occupied if self._schedule.is_ours(name)}
        await self._lost_rooms.recreate_without_node(poll.calls, poll.without_node, occupied)
        await self._processes.check_webhooks(poll.joined_sec)
        await self._calls.forget(poll.missing.keys(), FORGET_CALLS_MS)
        unknown = dict.fromkeys(poll.unknown & poll.calls.keys(), math.nan)
        self._set_metrics({**poll.occupied, **unknown})

    def _set_metrics(self, numbers: Mapping[str, float]) -> None:
        """Sets the metrics to the number of participants that a poll found in each room."""
        metrics.rooms.set(len(numbers))
        metrics.participants.set(sum(numbers.values()))
        metrics.last_poll.set(self._homeserver.clock.time())

    async def _check_missing_rooms(self, poll: _Poll) -> None:
        """Applies the absence of whole rooms to the delegations of their participants."""
        empty = Listing(poll.began_ts, ())
        for livekit_room in poll.tracked.keys() - poll.listed.keys():
            await self._delegations.on_poll(poll.tracked[livekit_room], empty)

    async def _check_rooms(self, poll: _Poll) -> None:
        """Checks the rooms in which something may have changed, and some of the others."""
        to_list = await self._rooms_to_list(poll)

        async def check(livekit_room: str) -> None:
            try:
                if livekit_room in to_list:
                    await self._check_room(livekit_room, poll)
                else:
                    await self._check_delegations(livekit_room, poll)
            except SfuError as e:
                # The client has logged the failure. The next poll tries again.
                self._schedule.forget(livekit_room)
                poll.unknown.add(livekit_room)
                if isinstance(e, NoNode):
                    poll.without_node.add(livekit_room)
            except Exception:
                # A bug or a database error with one room must not prevent the check of the others.
                self._schedule.forget(livekit_room)
                if not poll.has_failed:
                    # One traceback for each poll: the database may fail for all rooms.
                    logger.exception("Could not check the LiveKit room %r", livekit_room)
                poll.has_failed = True

        names = to_list | (poll.tracked.keys() & poll.listed.keys())
        await concurrently_execute(check, names, CONCURRENT_ROOMS)

    async def _rooms_to_list(self, poll: _Poll) -> set[str]:
        schedule = self._schedule
        schedule.keep(poll.listed)
        inactive = await self._homeserver.users.select_inactive(schedule.users)
        blocked = await self._homeserver.rooms.select_blocked(set(poll.calls.values()))
        to_list = schedule.changed(poll.listed, inactive)
        to_list |= self._lost_rooms.without_node & poll.listed.keys()
        to_list |= {
            name
            for name, number in poll.listed.items()
            if _is_listing_cheaper(poll.tracked.get(name, ()), number)
        }
        # While LiveKit's nodes die, any of the quiet rooms may have lost its node.
        quiet = poll.listed.keys() - to_list
        to_list |= schedule.share_of_quiet(
            quiet, poll.began_ts, all_of_them=bool(self._lost_rooms.without_node)
        )
        return to_list | {name for name in schedule.listed() if poll.calls.get(name) in blocked}

    async def _check_delegations(self, livekit_room: str, poll: _Poll) -> None:
        """Queries only the participants of delegations, in a room that is otherwise quiet."""
        await self._delegations.poll_participants(livekit_room, poll.tracked[livekit_room])

    async def _check_room(self, livekit_room: str, poll: _Poll) -> None:
        """Lists one room, and passes the listing to delegations and enforcement."""
        listing = await self._enforcer.list_participants(livekit_room)
        await self._delegations.on_poll(poll.tracked.get(livekit_room, ()), listing)
        poll.joined_sec.extend(participant.joined_at for participant in listing.participants)
        await self._owners.keep(livekit_room, listing.participants)
        room_id = poll.calls.get(livekit_room)
        if room_id is None:
            room_id = matrix_room(listing.participants, self._homeserver.server_name)
            if room_id is not None:
                await self._calls.note(livekit_room, room_id)
        if room_id is not None:
            reason = Reason("poll", listing.requested_ts)
            try:
                await self._enforcer.check_participants(livekit_room, room_id, listing, reason)
            except SfuError:
                # The client has logged the failure. The number of participants is still known.
                self._schedule.forget(livekit_room)
                return
        if listing.is_complete:
            self._schedule.note(livekit_room, self._listed_room(livekit_room, poll, listing))

    def _listed_room(self, livekit_room: str, poll: _Poll, listing: Listing) -> ListedRoom:
        server_name = self._homeserver.server_name
        users = {p.user_id for p in listing.participants if p.user_id is not None}
        return ListedRoom(
            poll.began_ts,
            poll.listed[livekit_room],
            frozenset(filter(self._homeserver.is_mine, users)),
            is_ours=not is_shared(listing.participants, server_name)
            or any(p.owner and p.is_issued_by(server_name) for p in listing.participants),
        )


def _is_listing_cheaper(delegations: Collection[Tracked], participants: int) -> bool:
    """Whether a listing is a cheaper way to find the participants of delegations."""
    requests = sum(len(delegation.identities) for delegation in delegations)
    return requests > 1 and requests * PARTICIPANTS_FOR_A_REQUEST >= participants
