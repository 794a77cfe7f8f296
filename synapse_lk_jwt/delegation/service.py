# SPDX-License-Identifier: Apache-2.0
"""Delegated delayed leaves at work: asks the SFU, sends the leaves, and looks at the clock.

What to do when is decided in `state_machine.py`, and kept in the database by `store.py`.
"""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence

from livekit.protocol.models import ParticipantInfo
from synapse.api.errors import SynapseError
from synapse.util.async_helpers import concurrently_execute

from synapse_lk_jwt import metrics
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.delegation.state_machine import SENDING_MS, Action, Signal
from synapse_lk_jwt.livekit.client import RoomService, SfuError
from synapse_lk_jwt.livekit.participants import CallParticipant, Listing
from synapse_lk_jwt.store import Store, Task, Tracked
from synapse_lk_jwt.work import WorkByKey

logger = logging.getLogger(__name__)

CLOCK_MS = 1_000

# Up to so many participants of one room are asked for one by one, which no other participant can
# slow down. Beyond, one listing of the whole room is less work.
MAX_ASKED_ONE_BY_ONE = 10

# How many leaves are sent to one room at a time.
CONCURRENT_SENDS = 10


class DelegationService:
    """Looks after the delayed leaves that clients have handed over.

    LiveKit is asked, and leaves are sent, room by room: one that hangs delays none of the others.
    """

    def __init__(self, homeserver: Homeserver, store: Store, rooms: RoomService) -> None:
        self._homeserver = homeserver
        self._store = store
        self._rooms = rooms
        self._questions: WorkByKey[Task] = WorkByKey(homeserver, "synapse_lk_jwt_ask", self._ask)
        # The delayed leaves that this process is sending, or about to, and until when no other
        # process is asked to, in milliseconds since the epoch.
        self._sending: dict[str, int] = {}
        self._sends: WorkByKey[Task] = WorkByKey(homeserver, "synapse_lk_jwt_send", self._send_all)
        if homeserver.delayed_events.are_enabled:
            homeserver.background.repeat(CLOCK_MS, "synapse_lk_jwt_due", self._do_what_is_due)

    async def delegate(
        self,
        user_id: str,
        room_id: str,
        livekit_room: str,
        identities: Sequence[str],
        delay_id: str,
    ) -> bool:
        """Takes on a delayed leave. Never depends on the SFU, and may be asked again.

        Args:
            user_id: a local user, verified.
            room_id: the Matrix room.
            livekit_room: the LiveKit room that the user takes part in.
            identities: the participant identities that the user may have there; the first one
                tells this member from the user's others.
            delay_id: the delayed event.

        Returns:
            False if the user has no such delayed event in that room.
        """
        is_there, tasks = await self._store.delegate(
            user_id, room_id, livekit_room, identities, delay_id
        )
        if tasks:
            # It was not there before.
            metrics.delegations_taken_on.inc()
        self.begin(tasks)
        return is_there

    def begin(self, tasks: Iterable[Task]) -> None:
        """Does what is to be done, in the background."""
        for task in tasks:
            if task.trigger is not None:
                metrics.leaves.labels(task.trigger.value).inc()
            work = self._questions
            if task.action is Action.SEND:
                # While a room is slow the clock asks for the same leave again.
                if task.delay_id in self._sending:
                    continue
                now_ms = self._homeserver.clock.time_msec()
                self._sending[task.delay_id] = now_ms + SENDING_MS - CLOCK_MS
                work = self._sends
            work.add(task.livekit_room, {task.delay_id: task})

    async def polled(self, delegations: Iterable[Tracked], listing: Listing) -> None:
        """Takes notice of what a poll has found.

        Args:
            delegations: those of one LiveKit room, as they were ahead of the poll.
            listing: who is in that room. A participant that an incomplete one lacks may be there.
        """
        listed = {p.identity: p for p in listing.participants}
        for delegation in delegations:
            sids = connected(
                [listed[identity] for identity in delegation.identities if identity in listed],
                delegation.identities,
                is_known=delegation.is_connected,
            )
            delay_id, asked_ms = delegation.delay_id, listing.asked_ms
            if not sids:
                if delegation.is_connected and listing.is_complete:
                    signal = Signal.ABSENT_AT_POLL
                    self.begin(await self._store.apply_signal(delay_id, signal, asked_ms))
            elif not delegation.is_settled or not (sids.items() <= delegation.identities.items()):
                await self._store.seen(delay_id, delegation.livekit_room, sids, asked_ms)

    async def doubt_absent(self, delegations: Iterable[Tracked], listing: Listing) -> None:
        """Asks once more for the participants of delegations that a listing lacks.

        Args:
            delegations: those of one LiveKit room, as they were ahead of the listing.
            listing: the participants of that room.
        """
        listed = {p.identity: p for p in listing.participants}
        for delegation in delegations:
            there = [listed[i] for i in delegation.identities if i in listed]
            if delegation.is_connected and not connected(
                there, delegation.identities, is_known=True
            ):
                self.begin(await self._store.apply_signal(delegation.delay_id, Signal.LEFT))

    async def _do_what_is_due(self) -> None:
        # All of it: what is left for the next second would be more every second, and too late in
        # the end.
        is_all = False
        while not is_all:
            tasks, is_all = await self._store.due()
            self.begin(tasks)

    async def _ask(self, livekit_room: str, tasks: Mapping[str, Task]) -> None:
        """Asks LiveKit about the participants of one room, and applies what it answers."""
        identities = {identity for task in tasks.values() for identity in task.identities}
        try:
            listing = await self.look_for(livekit_room, identities)
        except SfuError:
            # It has been logged, and says nothing about the participants. The clock asks again.
            return
        for delay_id, task in tasks.items():
            sids = connected(listing.participants, task.identities, is_known=task.is_connected)
            if sids:
                await self._store.seen(delay_id, livekit_room, sids, listing.asked_ms)
            elif listing.is_complete:
                self.begin(
                    await self._store.apply_signal(delay_id, Signal.ABSENT, listing.asked_ms)
                )

    async def look_for(self, livekit_room: str, identities: Collection[str]) -> Listing:
        """Which of some participants are in a room, by the cheapest question.

        Raises:
            SfuError: if LiveKit refuses, or does not answer in time.
        """
        if len(identities) > MAX_ASKED_ONE_BY_ONE:
            listing = await self._rooms.list_participants(livekit_room)
            if listing.is_complete:
                return listing
        asked_ms = self._homeserver.clock.time_msec()
        found = [await self._rooms.get_participant(livekit_room, i) for i in identities]
        return Listing(asked_ms, [participant for participant in found if participant])

    async def _send_all(self, _: str, tasks: Mapping[str, Task]) -> None:
        try:
            await concurrently_execute(self._send, tasks.values(), CONCURRENT_SENDS)
        finally:
            for delay_id in tasks:
                self._sending.pop(delay_id, None)

    async def _send(self, task: Task) -> None:
        is_late = self._homeserver.clock.time_msec() >= self._sending[task.delay_id]
        if is_late and not self._homeserver.runs_background_tasks:
            # It has waited for the other leaves of a large call. By now the process with the clock
            # sends it, or is about to.
            return
        signal = await self._try_to_send(task)
        try:
            await self._store.apply_signal(task.delay_id, signal)
        except self._homeserver.database.error as e:
            # The others of the call are still being sent. The clock asks for this one again.
            logger.error("Could not note that the leave %s was sent: %s", task.delay_id, e)

    async def _try_to_send(self, task: Task) -> Signal:
        assert task.leave is not None
        try:
            await self._homeserver.events.send(task.leave)
        except SynapseError as e:
            if 400 <= e.code < 500 and e.code != 429:
                logger.info("The room rejected the delayed leave %s: %s", task.delay_id, e)
                metrics.leave_failures.labels("refused").inc()
                return Signal.OVER
            cause = str(e)
        except (self._homeserver.database.error, OSError) as e:
            cause = f"{type(e).__name__}: {e}"
        except Exception as e:
            # Not even a programming error may lose a leave.
            logger.exception("Could not send the delayed leave %s", task.delay_id)
            cause = type(e).__name__
        else:
            if task.gone_ms is not None:
                taken_ms = self._homeserver.clock.time_msec() - task.gone_ms
                metrics.leave_seconds.observe(max(0, taken_ms) / 1000)
            return Signal.OVER
        metrics.leave_failures.labels("failed").inc()
        logger.warning(
            "Could not send the delayed leave %s, the module tries again: %s", task.delay_id, cause
        )
        return Signal.NOT_SENT


def connected(
    participants: Iterable[CallParticipant], identities: Collection[str], *, is_known: bool
) -> dict[str, str]:
    """Which of the identities are connected, with their sessions.

    Args:
        participants: as the SFU lists them.
        identities: participant identities; duplicate connections of them do not count.
        is_known: whether they have been connected before. One who never was is only on its way
            until it is ACTIVE, and may still break off.
    """
    gone = ParticipantInfo.State.DISCONNECTED
    up = ParticipantInfo.State.ACTIVE
    return {
        p.identity: p.sid
        for p in participants
        if p.identity in identities and (p.state != gone if is_known else p.state == up)
    }
