# SPDX-License-Identifier: Apache-2.0
"""The service for delegated delayed leaves: loads delegations, applies signals, and runs tasks.

Each signal takes the same path: `DelegationTable` locks and loads the delegation, `transition`
decides, `_apply` stores the result. The decision and the change to the delayed event are one
transaction. So the decision is made once, even if many processes get the signal or one of them
dies. Tasks that need LiveKit or the room run afterwards, and end with a signal of their own.
"""

from collections.abc import Collection, Iterable, Mapping

import attr
from synapse.module_api import LoggingTransaction
from synapse.util.iterutils import batch_iter

from synapse_lk_jwt import metrics
from synapse_lk_jwt.call_member import CallMember
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.compat.module_database import ModuleDatabase
from synapse_lk_jwt.delegation.creation import Creation
from synapse_lk_jwt.delegation.presence import (
    ParticipantLookup,
    by_identity,
    connected_sessions,
)
from synapse_lk_jwt.delegation.sender import CLOCK_MS, LeaveSender, SendLeave
from synapse_lk_jwt.delegation.state_machine import Action, Phase, Signal, transition, trigger
from synapse_lk_jwt.delegation.tables import BATCH, DelegationTable, Leave, Record, Tracked
from synapse_lk_jwt.livekit.client import RoomService
from synapse_lk_jwt.livekit.errors import SfuError
from synapse_lk_jwt.livekit.participants import Listing
from synapse_lk_jwt.livekit.tables import CallTable
from synapse_lk_jwt.work import WorkByKey

# If a call was noted this recently, its LiveKit room was recreated before LiveKit reported it as
# finished. A token request does not note a call again within NOTE_AGAIN_MS, so this must be well
# above that.
RECREATED_MS = 10_000


@attr.s(auto_attribs=True, frozen=True, slots=True, kw_only=True)
class QuerySfu:
    """A task: query the SFU for the participant of a delegation.

    Attributes:
        delay_id: the delegation.
        livekit_room: the LiveKit room.
        identities: the participant identities that the delegation follows.
        was_connected: whether one of them has been connected.
    """

    delay_id: str
    livekit_room: str
    identities: Collection[str]
    was_connected: bool


Task = QuerySfu | SendLeave


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Observed:
    """What LiveKit reported about the participant of a delegation.

    Attributes:
        signal: the signal.
        sessions: the connected identities with their sessions; empty except for SEEN.
    """

    signal: Signal
    sessions: Mapping[str, str] = attr.Factory(dict)


class DelegationService:
    """Follows the participants of delegations, and acts for them.

    Queries to LiveKit, and leaves, are sent room by room: a room that hangs delays no other one.
    """

    def __init__(
        self,
        homeserver: Homeserver,
        database: ModuleDatabase,
        table: DelegationTable,
        calls: CallTable,
        rooms: RoomService,
    ) -> None:
        self._homeserver = homeserver
        self._database = database
        self._table = table
        self._calls = calls
        self._creation = Creation(homeserver, table)
        self._lookup = ParticipantLookup(homeserver, rooms)
        self._sender = LeaveSender(homeserver, self.apply_signal)
        self._queries: WorkByKey[QuerySfu] = WorkByKey(
            homeserver, "synapse_lk_jwt_query", self._query_sfu
        )

    def start(self) -> None:
        """Starts the clock, on the process that runs background tasks."""
        if self._homeserver.delayed_events.are_enabled:
            self._homeserver.background.repeat(CLOCK_MS, "synapse_lk_jwt_due", self.process_due)
            self._homeserver.background.run_at_shutdown(
                "synapse_lk_jwt_shutdown", self._restart_connected
            )

    async def _restart_connected(self) -> None:
        """Restarts the delayed leave of each connected participant, so that its full delay remains.

        Synapse may be down for a long time, or start without the module. Then no process restarts
        these events, and Synapse sends them while the participants are still connected.
        """

        def restart(txn: LoggingTransaction) -> int:
            return self._homeserver.delayed_events.restart_all(txn, *self._table.connected())

        await self._database.write("restart_connected", restart)

    async def delegate(self, member: CallMember, delay_id: str) -> bool:
        """Delegates a delayed leave. This does not depend on the SFU, and may be repeated.

        Args:
            member: a local user's membership of a call, verified. Its first identity distinguishes
                it from the user's other members.
            delay_id: the delayed event.

        Returns:
            False if the user has no such delayed event in that room, or may not delegate it.
        """
        is_new = await self._database.write("delegate", self._creation.create, member, delay_id)
        if is_new:
            metrics.delegations_accepted.inc()
            query = QuerySfu(
                delay_id=delay_id,
                livekit_room=member.livekit_room,
                identities=member.identities,
                was_connected=False,
            )
            self.run_tasks([query])
        return is_new is not None

    # What LiveKit reports

    async def on_joined(
        self, livekit_room: str, identity: str, sid: str, room_id: str | None
    ) -> None:
        """Applies a webhook that reports that a participant has joined.

        Args:
            livekit_room: the LiveKit room.
            identity: the participant identity.
            sid: LiveKit's ID of this session.
            room_id: the Matrix room if it is known, to note the call.
        """

        def joined(txn: LoggingTransaction) -> list[Task]:
            records = self._table.lock_of_identity(txn, livekit_room, identity)
            if room_id is not None:
                # The number of slots is not limited here, because this room already exists.
                self._calls.note_txn(txn, livekit_room, room_id, max_slots=None)
            now_ts = self._database.now_ts()
            for record in records:
                self._table.note_session(txn, record, identity, sid, now_ts)
            return self._apply_to_all(txn, records, Signal.SEEN)

        self.run_tasks(await self._database.write("joined", joined))

    async def on_session_replaced(self, livekit_room: str, identity: str, sid: str) -> None:
        """Applies a webhook about a session that has ended because the client reconnects.

        The next session can have any ID. If it is never set up, LiveKit still reports its end.
        """

        def replaced(txn: LoggingTransaction) -> None:
            for record in self._table.lock_of_identity(txn, livekit_room, identity):
                self._table.forget_session(txn, record, identity, sid)

        await self._database.write("session_replaced", replaced)

    async def on_left(self, livekit_room: str, identity: str, sid: str) -> None:
        """Applies a webhook that reports that a session has ended.

        Delegations that have seen a later session of that identity ignore it.
        """

        def left(txn: LoggingTransaction) -> list[Task]:
            records = self._table.lock_of_session(txn, livekit_room, identity, sid)
            return self._apply_to_all(txn, records, Signal.LEFT)

        self.run_tasks(await self._database.write("left", left))

    async def on_room_finished(self, livekit_room: str) -> None:
        """Applies a webhook that reports that a LiveKit room has ended."""
        await self._calls.forget([livekit_room], RECREATED_MS)
        await self.suspect_room(livekit_room)

    async def suspect_room(self, livekit_room: str) -> None:
        """Queries the SFU for all participants of a LiveKit room: any of them may have left."""

        def suspect(txn: LoggingTransaction, after: str) -> tuple[list[Task], str | None]:
            batch = self._table.lock_of_room(txn, livekit_room, after)
            return self._apply_to_all(txn, batch.records, Signal.LEFT), batch.last

        # One query answers for all of them, so it runs after the last batch.
        tasks: list[Task] = []
        after: str | None = ""
        while after is not None:
            more, after = await self._database.write("suspect_room", suspect, after)
            tasks += more
        self.run_tasks(tasks)

    async def suspect_absent(self, delegations: Iterable[Tracked], listing: Listing) -> None:
        """Queries the SFU again for connected participants that a listing lacks.

        Args:
            delegations: those of one LiveKit room, as they were before the listing.
            listing: the participants of that room.
        """
        listed = by_identity(listing)
        absent = {
            delegation.delay_id: Observed(Signal.LEFT)
            for delegation in delegations
            if delegation.is_connected
            and not connected_sessions(listed, delegation.identities, was_connected=True)
        }
        await self._apply_observed(absent)

    # The poll

    async def tracked(self, livekit_room: str | None = None) -> list[Tracked]:
        """The delegations whose participants a poll must find, of one LiveKit room or of all."""
        return await self._table.tracked(livekit_room)

    async def count(self) -> dict[Phase, int]:
        """The number of delegations in each phase."""
        return await self._table.count()

    async def on_poll(self, delegations: Iterable[Tracked], listing: Listing) -> None:
        """Applies what a poll has found.

        Args:
            delegations: those of one LiveKit room, as they were before the poll.
            listing: the participants of that room. If it is not complete, participants that it
                lacks may be connected.
        """
        listed = by_identity(listing)
        observed = {}
        for delegation in delegations:
            sessions = connected_sessions(
                listed, delegation.identities, was_connected=delegation.is_connected
            )
            is_known = delegation.is_settled and sessions.items() <= delegation.identities.items()
            if sessions and not is_known:
                observed[delegation.delay_id] = Observed(Signal.SEEN, sessions)
            elif not sessions and delegation.is_connected and listing.is_complete:
                observed[delegation.delay_id] = Observed(Signal.ABSENT_AT_POLL)
        await self._apply_observed(observed, listing.requested_ts)

    async def poll_participants(self, livekit_room: str, delegations: Collection[Tracked]) -> None:
        """Queries the SFU for only the participants of delegations, and applies the answer.

        Raises:
            SfuError: if LiveKit rejects the request, or does not answer in time.
        """
        identities = {i for delegation in delegations for i in delegation.identities}
        await self.on_poll(delegations, await self._lookup.find(livekit_room, identities))

    # Load, transition, apply

    async def process_due(self) -> None:
        """Applies DUE to all delegations that are overdue.

        It processes all of them: a remainder for the next call could grow with each call.
        """

        def due(txn: LoggingTransaction) -> tuple[list[Task], str | None]:
            batch = self._table.lock_due(txn)
            return self._apply_to_all(txn, batch.records, Signal.DUE), batch.last

        last: str | None = ""
        while last is not None:
            tasks, last = await self._database.write("due", due)
            self.run_tasks(tasks)

    async def apply_signal(self, delay_id: str, signal: Signal) -> None:
        """Applies a signal to one delegation."""
        await self._apply_observed({delay_id: Observed(signal)})

    async def _apply_observed(
        self, observed: Mapping[str, Observed], queried_ts: int | None = None
    ) -> None:
        """Applies what LiveKit reported about delegations, a batch in each transaction.

        Args:
            observed: what it reported, by delay IDs.
            queried_ts: when the module queried LiveKit; None if LiveKit reported by itself.
        """

        def apply(txn: LoggingTransaction, delay_ids: Collection[str]) -> list[Task]:
            records = self._table.lock(txn, delay_ids)
            # The answer may be older than the last webhook about the same identity.
            seen_ts = self._database.now_ts() if queried_ts is None else queried_ts
            for record in records:
                for identity, sid in observed[record.delay_id].sessions.items():
                    self._table.note_session(txn, record, identity, sid, seen_ts)
            signals = [(record, observed[record.delay_id].signal) for record in records]
            return self._apply(txn, signals, queried_ts)

        for delay_ids in batch_iter(sorted(observed), BATCH):
            self.run_tasks(await self._database.write("apply_signals", apply, delay_ids))

    def _apply_to_all(
        self, txn: LoggingTransaction, records: Iterable[Record], signal: Signal
    ) -> list[Task]:
        return self._apply(txn, [(record, signal) for record in records], None)

    def _apply(
        self,
        txn: LoggingTransaction,
        signals: Iterable[tuple[Record, Signal]],
        queried_ts: int | None,
    ) -> list[Task]:
        """Applies signals to locked delegations; returns the tasks that remain."""
        applied = [
            (record, *self._apply_one(txn, record, signal, queried_ts))
            for record, signal in signals
        ]
        queries = [record.delay_id for record, action, _ in applied if action is Action.QUERY]
        identities = self._table.identities(txn, queries)
        tasks = (
            _task(record, action, leave, identities.get(record.delay_id, ()))
            for record, action, leave in applied
        )
        return [task for task in tasks if task is not None]

    def _apply_one(
        self, txn: LoggingTransaction, record: Record, signal: Signal, queried_ts: int | None
    ) -> tuple[Action, Leave | None]:
        """Applies a signal to one locked delegation; returns what to do, and its leave."""
        now_ts = self._database.now_ts()
        leave = record.leave
        if signal is Signal.DUE:
            signal = self._signal_when_due(txn, record)
        after, action = transition(record.delegation, signal, now_ts, queried_ts)
        has_event = True
        if action is Action.RESTART:
            has_event = self._homeserver.delayed_events.restart(
                txn, record.delay_id, record.user_id
            )
        elif action is Action.TAKE_AND_SEND:
            leave = self._take(txn, record)
            has_event = leave is not None
        if not has_event and after is not None:
            after, action = transition(after, Signal.EVENT_GONE, now_ts)
        self._table.save(txn, record, after, leave)
        return action, leave

    def _signal_when_due(self, txn: LoggingTransaction, record: Record) -> Signal:
        """DUE, or another signal if the database shows that a due delegation has ended."""
        phase, leave = record.delegation.phase, record.leave
        if phase is Phase.WAITING:
            event = self._homeserver.delayed_events.get(txn, record.delay_id, record.user_id)
            return Signal.DUE if event is not None else Signal.EVENT_GONE
        # A process that sends a leave may die before it stores the result.
        if leave is not None and self._homeserver.events.has_sent(txn, leave.event, leave.since):
            return Signal.ALREADY_SENT
        return Signal.DUE

    def _take(self, txn: LoggingTransaction, record: Record) -> Leave | None:
        """Takes the delayed event from Synapse, so that nothing else can send it or lose it.

        Returns:
            None if Synapse does not have it.
        """
        event = self._homeserver.delayed_events.get(txn, record.delay_id, record.user_id)
        if event is None or not self._homeserver.delayed_events.remove(
            txn, record.delay_id, record.user_id
        ):
            return None
        return Leave(
            event=event.event,
            since=self._homeserver.events.newest_position(txn),
            gone_ts=record.delegation.suspected_gone_ts or self._database.now_ts(),
        )

    # Tasks

    def run_tasks(self, tasks: Iterable[Task]) -> None:
        """Runs tasks in the background."""
        for task in tasks:
            if isinstance(task, QuerySfu):
                self._queries.add(task.livekit_room, {task.delay_id: task})
                continue
            if task.trigger is not None:
                metrics.leaves.labels(task.trigger.value).inc()
            self._sender.add(task)

    async def _query_sfu(self, livekit_room: str, tasks: Mapping[str, QuerySfu]) -> None:
        """Queries LiveKit for participants of one room, and applies the answer."""
        identities = {identity for task in tasks.values() for identity in task.identities}
        try:
            listing = await self._lookup.find(livekit_room, identities)
        except SfuError:
            # The client has logged the failure. It does not mean that a participant is absent. The
            # delegations become due again.
            return
        listed = by_identity(listing)
        observed = {}
        for delay_id, task in tasks.items():
            sessions = connected_sessions(listed, task.identities, was_connected=task.was_connected)
            if sessions:
                observed[delay_id] = Observed(Signal.SEEN, sessions)
            elif listing.is_complete:
                observed[delay_id] = Observed(Signal.ABSENT)
        await self._apply_observed(observed, listing.requested_ts)


def _task(
    record: Record, action: Action, leave: Leave | None, identities: Collection[str]
) -> Task | None:
    """The task for an action that needs LiveKit or the room; None for other actions."""
    if action is Action.QUERY:
        return QuerySfu(
            delay_id=record.delay_id,
            livekit_room=record.livekit_room,
            identities=identities,
            was_connected=record.delegation.phase is not Phase.WAITING,
        )
    if action in (Action.TAKE_AND_SEND, Action.SEND):
        assert leave is not None
        return SendLeave(
            delay_id=record.delay_id,
            livekit_room=record.livekit_room,
            leave=leave,
            trigger=trigger(record.delegation) if action is Action.TAKE_AND_SEND else None,
        )
    return None
