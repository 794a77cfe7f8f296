# SPDX-License-Identifier: Apache-2.0
"""What happens on the SFU: told by its webhooks, and looked for at regular intervals.

Webhooks can be lost, repeated or out of order, so that none of them is taken at its word when
somebody is gone. The poll finds out what no webhook has told.
"""

import logging
import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress

from livekit.protocol.models import DisconnectReason
from livekit.protocol.webhook import WebhookEvent
from synapse.util.async_helpers import concurrently_execute

from synapse_lk_jwt import metrics
from synapse_lk_jwt.homeserver import Homeserver
from synapse_lk_jwt.identifiers import is_clean
from synapse_lk_jwt.leaves import DelayedLeaves
from synapse_lk_jwt.membership import Membership
from synapse_lk_jwt.processes import Processes
from synapse_lk_jwt.sfu.rooms import Listing, NoNode, RoomService, SfuError
from synapse_lk_jwt.store import Store, Tracked

logger = logging.getLogger(__name__)

# How many rooms are looked at, at a time.
CONCURRENT_ROOMS = 10

# Where the poll is turned off, delayed leaves that were handed over need it all the same: a lost
# webhook would have one restarted for ever.
SAFETY_MS = 300_000

# Calls that nobody has noted for so long, and that the SFU does not know, are forgotten.
FORGET_CALLS_MS = 600_000

# A participant who goes for one of these reasons comes back: on a reconnect LiveKit ends the old
# session ahead of the new one, and when it is shut down its people have not left.
NO_LEAVE = frozenset(
    {
        DisconnectReason.DUPLICATE_IDENTITY,
        DisconnectReason.MIGRATION,
        DisconnectReason.SERVER_SHUTDOWN,
    }
)


class Watch:
    """Follows what happens on the SFU."""

    def __init__(
        self,
        homeserver: Homeserver,
        store: Store,
        rooms: RoomService,
        leaves: DelayedLeaves,
        membership: Membership,
        processes: Processes,
        interval_ms: int,
        *,
        note_owners: bool,
    ) -> None:
        """
        Args:
            homeserver: runs the polls.
            store: where what is learnt is noted.
            rooms: the SFU.
            leaves: told who has come and gone.
            membership: told who has come.
            processes: told when those who are in calls have joined.
            interval_ms: milliseconds between two polls, 0 for none.
            note_owners: whether participants can change what the SFU says of them.
        """
        self._homeserver = homeserver
        self._store = store
        self._rooms = rooms
        self._leaves = leaves
        self._membership = membership
        self._processes = processes
        self._note_owners = note_owners
        # LiveKit rooms with somebody in them at the last poll.
        self._occupied: set[str] = set()
        # Those that no node of the SFU answered for at the last poll.
        self._without_node: set[str] = set()
        self._is_off = interval_ms == 0
        self._is_polling = False
        homeserver.repeat(
            interval_ms or SAFETY_MS, "synapse_lk_jwt_poll", self.poll, at_once=interval_ms > 0
        )

    async def webhook(self, event: WebhookEvent) -> None:
        """Notes what a webhook says; what follows from it is done afterwards.

        It must be verified.
        """
        livekit_room, participant = event.room.name, event.participant
        identity, sid = participant.identity, participant.sid
        if event.event == "participant_joined":
            if is_clean(identity):
                owner = self._membership.owner(livekit_room, participant)
                await self._store.joined(
                    livekit_room, identity, sid, owner, note_owner=self._note_owners
                )
            # Whoever has a token can put anything behind a '#' in the identity, and is looked at
            # whatever it is.
            self._homeserver.run_in_background(
                "synapse_lk_jwt_joined", self._membership.joined, livekit_room, participant
            )
        elif event.event in ("participant_left", "participant_connection_aborted"):
            if not is_clean(identity):
                return
            if participant.disconnect_reason in NO_LEAVE:
                await self._store.evicted(livekit_room, identity, sid)
            else:
                self._leaves.begin(await self._store.left(livekit_room, identity, sid))
        elif event.event == "room_finished":
            self._rooms.forget(livekit_room)
            self._leaves.begin(await self._store.finished(livekit_room))

    async def poll(self) -> None:
        """Looks at the whole SFU once, unless somebody is at it."""
        if self._is_polling:
            return
        self._is_polling = True
        try:
            await self._poll()
        except SfuError:
            # That has been logged, and tells nothing of anybody.
            metrics.nobody_knows()
        finally:
            self._is_polling = False

    async def _poll(self) -> None:
        for phase, number in (await self._store.count_delegations()).items():
            metrics.delegations.labels(phase.value).set(number)
        tracked: dict[str, list[Tracked]] = {}
        for delegation in await self._store.tracked():
            tracked.setdefault(delegation.livekit_room, []).append(delegation)
        if self._is_off and not tracked and not await self._store.calls():
            self._note({})
            return
        asked_ms = self._homeserver.clock.time_msec()
        there = {room.name: room.num_participants > 0 for room in await self._rooms.list_rooms()}
        # Afterwards, so that a room that has just been closed is not in here and was lost.
        calls = await self._store.calls()

        await self._make_again(calls, tracked, there)

        # LiveKit tells the number of participants late, so that it is no word on those who were
        # there a moment ago.
        looked_at = {name for name, is_occupied in there.items() if is_occupied or name in tracked}
        occupied = set()
        joined_sec: list[int] = []
        # How many participants there are in our own rooms.
        numbers: dict[str, float] = {}
        without_node = set()

        async def look(livekit_room: str) -> None:
            try:
                listing = await self._rooms.list_participants(livekit_room)
            except SfuError as e:
                if isinstance(e, NoNode):
                    without_node.add(livekit_room)
                occupied.update(self._occupied & {livekit_room})
                numbers[livekit_room] = math.nan
                return
            await self._leaves.polled(tracked.get(livekit_room, ()), listing)
            if listing.participants:
                occupied.add(livekit_room)
                joined_sec.extend(participant.joined_at for participant in listing.participants)
                if livekit_room in calls:
                    numbers[livekit_room] = len(listing.participants)
                with suppress(SfuError):
                    await self._look(livekit_room, calls.get(livekit_room), listing)

        await concurrently_execute(look, looked_at, CONCURRENT_ROOMS)
        for livekit_room in tracked.keys() - there.keys():
            await self._leaves.polled(tracked[livekit_room], Listing(asked_ms, ()))
        # Whoever comes back takes the room to another node. Where nobody does, nobody can tell who
        # is in it until that is done here; not at once, because an empty room may be closed.
        await concurrently_execute(
            lambda livekit_room: self._make_one_again(livekit_room, calls[livekit_room]),
            without_node & self._without_node & calls.keys(),
            CONCURRENT_ROOMS,
        )
        self._occupied, self._without_node = occupied, without_node
        await self._processes.look(joined_sec)
        await self._store.forget_calls(calls.keys() - there.keys(), FORGET_CALLS_MS)
        self._note(numbers)

    def _note(self, numbers: Mapping[str, float]) -> None:
        """Tells the metrics how many participants a poll has found in each room."""
        metrics.rooms.set(len(numbers))
        metrics.participants.set(sum(numbers.values()))
        metrics.last_poll.set(self._homeserver.clock.time())

    async def _make_again(
        self,
        calls: Mapping[str, str],
        tracked: Mapping[str, Iterable[Tracked]],
        there: Collection[str],
    ) -> None:
        """Makes the rooms again that LiveKit has lost with people in them, as on a restart.

        They are trying to come back, and while it has `auto_create: false` they are told that there
        is no such room.
        """
        for livekit_room in calls.keys() - there:
            if livekit_room in self._occupied or any(
                delegation.is_settled for delegation in tracked.get(livekit_room, ())
            ):
                await self._make_one_again(livekit_room, calls[livekit_room])

    async def _make_one_again(self, livekit_room: str, room_id: str) -> None:
        self._rooms.forget(livekit_room)
        with suppress(SfuError):
            await self._rooms.make_sure_of(livekit_room, room_id)
            logger.info("LiveKit has lost a call of %s: made it again", room_id)

    async def _look(self, livekit_room: str, room_id: str | None, listing: Listing) -> None:
        """Looks at those who are in one room, and notes who joined without a webhook."""
        noted = await self._store.owners(livekit_room) if self._note_owners else {}
        for participant in listing.participants:
            is_new = self._note_owners and participant.identity not in noted
            if (room_id is None or is_new) and is_clean(participant.identity):
                owner = self._membership.owner(livekit_room, participant)
                if owner is not None:
                    room_id = owner.room_id
                    await self._store.joined(
                        livekit_room,
                        participant.identity,
                        participant.sid,
                        owner,
                        note_owner=self._note_owners,
                    )
        if room_id is not None:
            await self._membership.look(
                livekit_room, room_id, listing.participants, "poll", listing.asked_ms
            )
