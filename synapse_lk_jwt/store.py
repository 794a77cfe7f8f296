# SPDX-License-Identifier: Apache-2.0
"""The module's own tables in the homeserver's database, SQLite or PostgreSQL.

They hold what must survive a restart and what Synapse's processes must know of each other: which
calls there are, delegated delayed leaves, and how far the event stream has been followed. What is
decided about a delegation, and what is done to its delayed event, happens in one transaction: so
however many processes hear of it at once, and whenever one of them dies, it is done once.
"""

import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import attr
from synapse.module_api import LoggingTransaction
from synapse.types import JsonDict
from synapse.util.iterutils import batch_iter

from synapse_lk_jwt.compat.database import (
    IsolationLevel,
    PostgresEngine,
    Sqlite3Engine,
    make_in_list_sql_clause,
)
from synapse_lk_jwt.compat.delayed_events import DelayedEvent
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.delegation.state_machine import (
    ENCRYPTED_TYPE,
    MAX_DELEGATIONS,
    MAX_ENCRYPTED,
    MAX_IDENTITIES,
    Action,
    Delegation,
    Phase,
    Signal,
    Trigger,
    can_be_delegated,
    delegate,
    follow_more,
    sticky_key,
    transition,
    trigger,
)
from synapse_lk_jwt.livekit.naming import DEFAULT_SLOT, hash_of_identity, livekit_room_name

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Each entry takes the tables from one schema version to the next, the first one from nothing.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE synapse_lk_jwt_calls (
            livekit_room TEXT NOT NULL PRIMARY KEY,
            room_id TEXT NOT NULL,
            seen_ms BIGINT NOT NULL
        )
        """,
        "CREATE INDEX synapse_lk_jwt_calls_room ON synapse_lk_jwt_calls (room_id)",
        """
        CREATE TABLE synapse_lk_jwt_owners (
            livekit_room TEXT NOT NULL,
            identity TEXT NOT NULL,
            user_id TEXT NOT NULL,
            PRIMARY KEY (livekit_room, identity)
        )
        """,
        """
        CREATE TABLE synapse_lk_jwt_delegations (
            delay_id TEXT NOT NULL PRIMARY KEY,
            user_id TEXT NOT NULL,
            livekit_room TEXT NOT NULL,
            member TEXT NOT NULL,
            event_type TEXT NOT NULL,
            state_key TEXT,
            delay_ms BIGINT NOT NULL,
            taken_ms BIGINT NOT NULL,
            several BOOLEAN NOT NULL,
            phase TEXT NOT NULL,
            next_ms BIGINT NOT NULL,
            restarted_ms BIGINT NOT NULL,
            connected_ms BIGINT NOT NULL,
            doubted_ms BIGINT NOT NULL,
            tries INTEGER NOT NULL,
            leave TEXT
        )
        """,
        "CREATE INDEX synapse_lk_jwt_delegations_next ON synapse_lk_jwt_delegations (next_ms)",
        "CREATE INDEX synapse_lk_jwt_delegations_room"
        " ON synapse_lk_jwt_delegations (livekit_room, user_id)",
        """
        CREATE TABLE synapse_lk_jwt_identities (
            livekit_room TEXT NOT NULL,
            identity TEXT NOT NULL,
            delay_id TEXT NOT NULL,
            sid TEXT,
            sid_ms BIGINT NOT NULL DEFAULT 0,
            PRIMARY KEY (livekit_room, identity, delay_id)
        )
        """,
        "CREATE INDEX synapse_lk_jwt_identities_delay ON synapse_lk_jwt_identities (delay_id)",
        "CREATE TABLE synapse_lk_jwt_stream (position BIGINT NOT NULL)",
    ),
    (
        """
        CREATE TABLE synapse_lk_jwt_processes (
            instance TEXT NOT NULL PRIMARY KEY,
            is_background BOOLEAN NOT NULL,
            seen_ms BIGINT NOT NULL,
            webhook_ms BIGINT NOT NULL,
            refused_ms BIGINT NOT NULL
        )
        """,
    ),
    (
        # Identities can be longer than PostgreSQL's indexes take, so it has a hash of them. Nobody
        # needs the rows of before: those who are in a call get a new one with their next token.
        "DROP TABLE synapse_lk_jwt_owners",
        """
        CREATE TABLE synapse_lk_jwt_owners (
            livekit_room TEXT NOT NULL,
            identity_hash TEXT NOT NULL,
            user_id TEXT NOT NULL,
            seen_ms BIGINT NOT NULL,
            PRIMARY KEY (livekit_room, identity_hash)
        )
        """,
    ),
    (
        # Both are NULL for delegations that an older version has noted.
        "ALTER TABLE synapse_lk_jwt_delegations ADD COLUMN room_id TEXT",
        "ALTER TABLE synapse_lk_jwt_delegations ADD COLUMN sticky_key TEXT",
        "CREATE INDEX synapse_lk_jwt_delegations_user ON synapse_lk_jwt_delegations (user_id)",
    ),
)

# How many delegations or calls one transaction changes at most.
BATCH = 100

# How many identities of one user in one call are noted.
MAX_OWNED = 100

# How many live slots of one Matrix room are created, and when a client may ask again for another.
MAX_SLOTS = 20
SLOTS_RETRY_AFTER_MS = 60_000

# A call that was noted less than this ago is not noted again: hundreds of participants, on many
# processes, would write the same row.
NOTE_AGAIN_MS = 5_000

# A room that is reported as finished has been created anew if it was noted this recently. A token
# request may have found the call noted already, and so this must be well above NOTE_AGAIN_MS.
CREATED_ANEW_MS = 10_000

# When a delegation that cannot be read is looked up again.
UNREADABLE_PAUSE_MS = 3_600_000


class TooManySlots(Exception):
    """A Matrix room has as many live slots as one room may have."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Task:
    """What is left to be done for a delegation outside of the database.

    Attributes:
        action: ASK or SEND.
        delay_id: the delegation.
        livekit_room: the LiveKit room.
        identities: the participant identities that it follows.
        is_connected: whether one of them has been seen.
        leave: the event to send.
        trigger: why, if that has just been decided.
        gone_ms: when there was the first sign that the participant is gone, if the leave is to be
            sent; milliseconds since the epoch.
    """

    action: Action
    delay_id: str
    livekit_room: str
    identities: frozenset[str]
    is_connected: bool
    leave: JsonDict | None
    trigger: Trigger | None = None
    gone_ms: int | None = None


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Tracked:
    """What a poll of the SFU needs to know of a delegation.

    Attributes:
        delay_id: the delegation.
        livekit_room: the LiveKit room.
        is_connected: whether one of its identities has been seen.
        is_settled: whether it is connected and nobody doubts that.
        identities: the participant identities that it follows, with the last seen session of each.
    """

    delay_id: str
    livekit_room: str
    is_connected: bool
    is_settled: bool
    identities: dict[str, str | None]


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Process:
    """One of Synapse's processes that has loaded the module. Times are milliseconds, 0 for never.

    Attributes:
        instance: its name.
        is_background: whether it runs background tasks.
        seen_ms: when it was there.
        webhook_ms: when LiveKit told it something.
        refused_ms: when somebody did, with another signature.
    """

    instance: str
    is_background: bool
    seen_ms: int
    webhook_ms: int
    refused_ms: int


class Store:
    """The tables of one homeserver. Every method makes sure of them first."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._has_tables = False
        # The delegations that could not be read, so that each is logged once.
        self._unreadable: set[str] = set()

    async def _run(self, desc: str, func: Callable[..., T], *args: object, **more: Any) -> T:
        run = self._homeserver.database.run_interaction
        if not self._has_tables:
            await run("synapse_lk_jwt_migrate", _migrate)
            self._has_tables = True
        return await run(f"synapse_lk_jwt_{desc}", func, *args, **more)

    async def _write(self, desc: str, func: Callable[..., T], *args: object) -> T:
        """Runs a function that changes rows which other processes change as well.

        Under Synapse's REPEATABLE READ all but one of them would fail, and after five attempts for
        good. Here a writer waits for the others and then sees what they have done.
        """
        return await self._run(desc, func, *args, isolation_level=IsolationLevel.READ_COMMITTED)

    # Which calls there are

    async def note_call(self, livekit_room: str, room_id: str) -> None:
        """Notes that a LiveKit room, which may have to be created, belongs to a Matrix room.

        Raises:
            TooManySlots: if that room has too many calls already and this is not one of them. The
                slot that most clients use is always allowed, so that a member of the room cannot
                block its call with other slots.
        """

        def note_call(txn: LoggingTransaction) -> None:
            is_capped = livekit_room != livekit_room_name(room_id, DEFAULT_SLOT)
            self._note_call(txn, livekit_room, room_id, MAX_SLOTS if is_capped else None)

        try:
            await self._write("note_call", note_call)
        except self._homeserver.database.error:
            # All who share the CreateRoom would fail. The connection may have been an old one.
            await self._write("note_call", note_call)

    def _note_call(
        self, txn: LoggingTransaction, livekit_room: str, room_id: str, max_slots: int | None
    ) -> None:
        now_ms = self._homeserver.clock.time_msec()
        txn.execute(
            "SELECT seen_ms FROM synapse_lk_jwt_calls WHERE livekit_room = ?", (livekit_room,)
        )
        row = txn.fetchone()
        if row is not None and row[0] > now_ms - NOTE_AGAIN_MS:
            return
        if row is None and max_slots is not None:
            self._lock(txn, room_id)
            txn.execute(
                "SELECT COUNT(*) FROM synapse_lk_jwt_calls WHERE room_id = ? AND livekit_room <> ?",
                (room_id, livekit_room),
            )
            (number,) = txn.fetchone() or (0,)
            if number >= max_slots:
                raise TooManySlots()
        txn.execute(
            "INSERT INTO synapse_lk_jwt_calls AS old (livekit_room, room_id, seen_ms)"
            " VALUES (?, ?, ?) ON CONFLICT (livekit_room)"
            " DO UPDATE SET seen_ms = EXCLUDED.seen_ms WHERE old.seen_ms <= ?",
            (livekit_room, room_id, now_ms, now_ms - NOTE_AGAIN_MS),
        )

    def _lock(self, txn: LoggingTransaction, name: str) -> None:
        """Has this transaction wait for those of other processes that have locked the same name."""
        if isinstance(txn.database_engine, PostgresEngine):
            txn.execute("SELECT pg_advisory_xact_lock(hashtext(?))", (f"synapse_lk_jwt {name}",))

    async def calls(self) -> dict[str, str]:
        """All LiveKit rooms that were noted, each with its Matrix room."""

        def calls(txn: LoggingTransaction) -> dict[str, str]:
            txn.execute("SELECT livekit_room, room_id FROM synapse_lk_jwt_calls")
            return dict(txn.fetchall())

        return await self._run("calls", calls)

    async def calls_in(self, room_ids: Collection[str]) -> dict[str, list[str]]:
        """The LiveKit rooms of Matrix rooms; those that have none are left out."""

        def calls_in(txn: LoggingTransaction) -> dict[str, list[str]]:
            clause, args = make_in_list_sql_clause(txn.database_engine, "room_id", room_ids)
            txn.execute(
                f"SELECT room_id, livekit_room FROM synapse_lk_jwt_calls WHERE {clause}", args
            )
            found: dict[str, list[str]] = {}
            for room_id, livekit_room in txn:
                found.setdefault(room_id, []).append(livekit_room)
            return found

        return await self._run("calls_in", calls_in) if room_ids else {}

    async def room_of(self, livekit_room: str) -> str | None:
        """The Matrix room of a LiveKit room that was noted."""

        def room_of(txn: LoggingTransaction) -> str | None:
            txn.execute(
                "SELECT room_id FROM synapse_lk_jwt_calls WHERE livekit_room = ?", (livekit_room,)
            )
            row = txn.fetchone()
            return None if row is None else str(row[0])

        return await self._run("room_of", room_of)

    async def forget_calls(self, livekit_rooms: Collection[str], unseen_for_ms: int = 0) -> None:
        """Forgets calls that are over, unless somebody has noted them within some milliseconds."""

        def forget(txn: LoggingTransaction, batch: Collection[str]) -> None:
            for livekit_room in batch:
                self._forget_call(txn, livekit_room, unseen_for_ms)

        for batch in batch_iter(sorted(livekit_rooms), BATCH):
            await self._write("forget_calls", forget, batch)

    def _forget_call(self, txn: LoggingTransaction, livekit_room: str, unseen_for_ms: int) -> None:
        txn.execute(
            "DELETE FROM synapse_lk_jwt_calls WHERE livekit_room = ? AND seen_ms <= ?",
            (livekit_room, self._homeserver.clock.time_msec() - unseen_for_ms),
        )

    # Whose participants they are, where they can change what LiveKit says of it

    async def owners(self, livekit_room: str) -> dict[str, str]:
        """The users of those identities in a LiveKit room that were noted, by the hashes of these.

        The hashes are those of `names.hash_of_identity`.
        """

        def owners(txn: LoggingTransaction) -> dict[str, str]:
            txn.execute(
                "SELECT identity_hash, user_id FROM synapse_lk_jwt_owners WHERE livekit_room = ?",
                (livekit_room,),
            )
            return dict(txn.fetchall())

        return await self._run("owners", owners)

    async def note_owner(self, livekit_room: str, identity: str, user_id: str) -> bool:
        """Notes whose an identity is, ahead of handing out a token for it.

        Returns:
            False if the user has as many identities in that LiveKit room as one may have.
        """
        row = (livekit_room, hash_of_identity(identity), user_id)

        def note_owner(txn: LoggingTransaction) -> bool:
            txn.execute(
                "SELECT COUNT(*) FROM synapse_lk_jwt_owners"
                " WHERE livekit_room = ? AND identity_hash <> ? AND user_id = ?",
                row,
            )
            (number,) = txn.fetchone() or (0,)
            if number >= MAX_OWNED:
                return False
            txn.execute(
                "INSERT INTO synapse_lk_jwt_owners (livekit_room, identity_hash, user_id, seen_ms)"
                " VALUES (?, ?, ?, ?) ON CONFLICT (livekit_room, identity_hash)"
                " DO UPDATE SET seen_ms = EXCLUDED.seen_ms",
                (*row, self._homeserver.clock.time_msec()),
            )
            return True

        return await self._write("note_owner", note_owner)

    async def keep_owners(self, livekit_room: str, identities: Iterable[str]) -> None:
        """Notes that identities are in a LiveKit room, so that `forget_owners` keeps them."""
        hashes = [hash_of_identity(identity) for identity in identities]

        def keep_owners(txn: LoggingTransaction) -> None:
            clause, args = make_in_list_sql_clause(txn.database_engine, "identity_hash", hashes)
            txn.execute(
                f"UPDATE synapse_lk_jwt_owners SET seen_ms = ? WHERE livekit_room = ? AND {clause}",
                (self._homeserver.clock.time_msec(), livekit_room, *args),
            )

        if hashes:
            await self._write("keep_owners", keep_owners)

    async def forget_owners(self, unseen_for_ms: int) -> None:
        """Forgets those identities that were neither issued nor in a call for some milliseconds."""

        def forget_owners(txn: LoggingTransaction) -> None:
            txn.execute(
                "DELETE FROM synapse_lk_jwt_owners WHERE seen_ms < ?",
                (self._homeserver.clock.time_msec() - unseen_for_ms,),
            )

        await self._write("forget_owners", forget_owners)

    # What the SFU says

    async def joined(self, livekit_room: str, identity: str, sid: str, room_id: str | None) -> None:
        """Notes that a participant has joined.

        Args:
            livekit_room: the LiveKit room.
            identity: the participant identity.
            sid: LiveKit's name for this session of it.
            room_id: the Matrix room, if that is known.
        """

        def joined(txn: LoggingTransaction) -> None:
            # Ahead of all else, as everywhere: transactions that lock in different orders deadlock.
            rows = self._rows(txn, _OF_IDENTITY, (livekit_room, identity))
            if room_id is not None:
                # Whatever the number of slots: the room exists.
                self._note_call(txn, livekit_room, room_id, max_slots=None)
            now_ms = self._homeserver.clock.time_msec()
            self._note_sid(txn, livekit_room, identity, sid, now_ms)
            self._advance_all(txn, rows, Signal.SEEN)

        await self._write("joined", joined)

    def _note_sid(
        self, txn: LoggingTransaction, livekit_room: str, identity: str, sid: str, seen_ms: int
    ) -> None:
        """Notes the session of an identity, unless a later one has been seen."""
        txn.execute(
            "UPDATE synapse_lk_jwt_identities SET sid = ?, sid_ms = ?"
            " WHERE livekit_room = ? AND identity = ? AND sid_ms <= ?",
            (sid, seen_ms, livekit_room, identity, seen_ms),
        )

    async def evicted(self, livekit_room: str, identity: str, sid: str) -> None:
        """Notes that a session has ended, and that another one of the same participant follows.

        Whatever that one is called: if it never comes up, it is told to have ended all the same.
        """

        def evicted(txn: LoggingTransaction) -> None:
            txn.execute(
                "UPDATE synapse_lk_jwt_identities SET sid = NULL"
                " WHERE livekit_room = ? AND identity = ? AND sid = ?",
                (livekit_room, identity, sid),
            )

        await self._write("evicted", evicted)

    async def left(self, livekit_room: str, identity: str, sid: str) -> list[Task]:
        """Notes that a participant has left, unless a later session of it has been seen.

        Args:
            livekit_room: the LiveKit room.
            identity: the participant identity.
            sid: LiveKit's name for the session that is over.
        """
        return await self._write(
            "left", self._advance, _OF_SESSION, (livekit_room, identity, sid, sid), Signal.LEFT
        )

    async def suspect(self, livekit_room: str) -> list[Task]:
        """Notes that any participant of a LiveKit room may have left."""

        def suspect(txn: LoggingTransaction, after: str) -> tuple[list[Task], str | None]:
            rows = self._rows(txn, _OF_ROOM, (livekit_room, after))
            last = rows[-1]["delay_id"] if len(rows) == BATCH else None
            return self._advance_all(txn, rows, Signal.LEFT), last

        tasks: list[Task] = []
        after: str | None = ""
        while after is not None:
            more, after = await self._write("suspect", suspect, after)
            tasks += more
        return tasks

    async def finished(self, livekit_room: str) -> list[Task]:
        """Notes that a LiveKit room is gone."""
        await self.forget_calls([livekit_room], CREATED_ANEW_MS)
        return await self.suspect(livekit_room)

    # Delegated delayed leaves

    async def delegate(
        self,
        user_id: str,
        room_id: str,
        livekit_room: str,
        identities: Sequence[str],
        delay_id: str,
    ) -> tuple[bool, list[Task]]:
        """Takes on a delegation; an older one of the same member is dropped.

        Args:
            user_id: a local user.
            room_id: the Matrix room.
            livekit_room: the LiveKit room.
            identities: the participant identities that the user may have in it; the first one tells
                this member from the user's others.
            delay_id: the delayed event.

        Returns:
            Whether there is such a delayed event, and what is to be done at once.
        """
        return await self._write(
            "delegate", self._delegate, user_id, room_id, livekit_room, identities, delay_id
        )

    def _delegate(
        self,
        txn: LoggingTransaction,
        user_id: str,
        room_id: str,
        livekit_room: str,
        identities: Sequence[str],
        delay_id: str,
    ) -> tuple[bool, list[Task]]:
        # Clients ask twice in a row, and two processes may be asked.
        self._lock(txn, user_id)
        event = self._homeserver.delayed_events.get(txn, delay_id, user_id)
        if event is None or event.room_id != room_id:
            return False, []
        content = event.event["content"]
        if not can_be_delegated(event.type, content):
            return False, []
        rows = self._rows(txn, _OF_DELAY, (delay_id,))
        if rows:
            self._follow_more(txn, rows[0], livekit_room, identities)
            return True, []
        key = sticky_key(content) if event.state_key is None else None
        # What is in an encrypted event is not for the homeserver to know.
        key = None if event.type == ENCRYPTED_TYPE else key
        self._drop_older(txn, user_id, livekit_room, identities[0], event, key)
        txn.execute(
            "SELECT COUNT(*), COUNT(CASE WHEN event_type = ? AND room_id = ? THEN 1 END)"
            " FROM synapse_lk_jwt_delegations WHERE user_id = ?",
            (ENCRYPTED_TYPE, room_id, user_id),
        )
        number, encrypted = txn.fetchone() or (0, 0)
        if number >= MAX_DELEGATIONS or (
            event.type == ENCRYPTED_TYPE and encrypted >= MAX_ENCRYPTED
        ):
            return False, []
        now_ms = self._homeserver.clock.time_msec()
        values = {
            "delay_id": delay_id,
            "user_id": user_id,
            "room_id": room_id,
            "livekit_room": livekit_room,
            "member": identities[0],
            "event_type": event.type,
            "state_key": event.state_key,
            "sticky_key": key,
            **_as_columns(delegate(event.delay_ms, len(identities) > 1, now_ms)),
        }
        txn.execute(
            f"INSERT INTO synapse_lk_jwt_delegations ({', '.join(values)})"
            f" VALUES ({', '.join('?' * len(values))})",
            tuple(values.values()),
        )
        self._add_identities(txn, livekit_room, delay_id, identities)
        ask = Task(Action.ASK, delay_id, livekit_room, frozenset(identities), False, None)
        return True, [ask]

    def _follow_more(
        self,
        txn: LoggingTransaction,
        row: Mapping[str, Any],
        livekit_room: str,
        identities: Sequence[str],
    ) -> None:
        """Has a delegation that was handed over again follow the identities that are new."""
        delay_id = row["delay_id"]
        if row["livekit_room"] != livekit_room:
            return
        known = self._identities(txn, [delay_id])[delay_id]
        new = [identity for identity in identities if identity not in known]
        new = new[: max(0, MAX_IDENTITIES - len(known))]
        state = self._read(txn, row) if new else None
        if state is None:
            return
        self._add_identities(txn, livekit_room, delay_id, new)
        before, _ = state
        self._update(
            txn, delay_id, _as_columns(follow_more(before, self._homeserver.clock.time_msec()))
        )

    def _add_identities(
        self, txn: LoggingTransaction, livekit_room: str, delay_id: str, identities: Iterable[str]
    ) -> None:
        for identity in identities:
            txn.execute(
                "INSERT INTO synapse_lk_jwt_identities (livekit_room, identity, delay_id)"
                " VALUES (?, ?, ?)",
                (livekit_room, identity, delay_id),
            )

    def _drop_older(
        self,
        txn: LoggingTransaction,
        user_id: str,
        livekit_room: str,
        member: str,
        event: DelayedEvent,
        key: str | None,
    ) -> None:
        """Drops the delegations that a new one takes the place of.

        These are of the same member, or their leave is for the same state or has the same sticky
        key. An older leave of the latter kinds is cancelled: it would remove the new membership.
        """
        txn.execute(
            "SELECT delay_id, member, event_type, state_key, sticky_key"
            " FROM synapse_lk_jwt_delegations WHERE livekit_room = ? AND user_id = ?"
            f" ORDER BY delay_id {_for_update(txn)}",
            (livekit_room, user_id),
        )
        for delay_id, older_member, event_type, state_key, older_key in txn.fetchall():
            is_same = (event.state_key, key) != (None, None) and (
                (event_type, state_key, older_key) == (event.type, event.state_key, key)
            )
            if is_same:
                self._homeserver.delayed_events.cancel(txn, delay_id, user_id)
            if is_same or older_member == member:
                self._delete(txn, delay_id)

    async def identities_of(self, livekit_room: str, user_id: str) -> list[str]:
        """The identities in a LiveKit room that a user's delegations follow."""

        def identities_of(txn: LoggingTransaction) -> list[str]:
            txn.execute(
                "SELECT DISTINCT identity FROM synapse_lk_jwt_identities"
                " JOIN synapse_lk_jwt_delegations AS d USING (delay_id)"
                " WHERE d.livekit_room = ? AND d.user_id = ?",
                (livekit_room, user_id),
            )
            return [identity for (identity,) in txn]

        return await self._run("identities_of", identities_of)

    async def apply_signal(
        self, delay_id: str, signal: Signal, asked_ms: int | None = None
    ) -> list[Task]:
        """Notes that something has happened to a delegation, and says what is to be done.

        Args:
            delay_id: the delegation.
            signal: what has happened.
            asked_ms: when the SFU was asked, if it said so.
        """
        return await self._write(
            "apply_signal", self._advance, _OF_DELAY, (delay_id,), signal, asked_ms
        )

    async def seen(
        self, delay_id: str, livekit_room: str, sids: Mapping[str, str], asked_ms: int
    ) -> None:
        """Notes that the SFU has listed identities of a delegation.

        Args:
            delay_id: the delegation.
            livekit_room: the LiveKit room.
            sids: the identities that are connected, with their sessions.
            asked_ms: when the SFU was asked.
        """

        def seen(txn: LoggingTransaction) -> None:
            rows = self._rows(txn, _OF_DELAY, (delay_id,))
            for identity, sid in sids.items():
                self._note_sid(txn, livekit_room, identity, sid, asked_ms)
            self._advance_all(txn, rows, Signal.SEEN, asked_ms)

        await self._write("seen", seen)

    async def due(self) -> tuple[list[Task], bool]:
        """Does what is due in the database, and says what is due elsewhere, and if it is all."""

        def due(txn: LoggingTransaction) -> tuple[list[Task], bool]:
            now_ms = self._homeserver.clock.time_msec()
            rows = self._rows(txn, _DUE, (now_ms, now_ms, BATCH))
            return self._advance_all(txn, rows, Signal.DUE), len(rows) < BATCH

        return await self._write("due", due)

    async def tracked(self, livekit_room: str | None = None) -> list[Tracked]:
        """All delegations, or those of one LiveKit room, whose leave is not on its way yet."""
        of_room, args = ("d.livekit_room = ?", (livekit_room,)) if livekit_room else ("TRUE", ())

        def tracked(txn: LoggingTransaction) -> list[Tracked]:
            txn.execute(
                "SELECT delay_id, d.livekit_room, phase, doubted_ms, tries, identity, sid"
                " FROM synapse_lk_jwt_delegations AS d"
                " JOIN synapse_lk_jwt_identities USING (delay_id)"
                f" WHERE phase <> ? AND {of_room}",
                (Phase.LEAVING.value, *args),
            )
            found: dict[str, Tracked] = {}
            for delay_id, room, phase, doubted_ms, tries, identity, sid in txn:
                if phase not in _PHASES:
                    # `_read` logs it.
                    continue
                if delay_id not in found:
                    is_connected = Phase(phase) is Phase.CONNECTED
                    is_settled = is_connected and not doubted_ms and not tries
                    found[delay_id] = Tracked(delay_id, room, is_connected, is_settled, {})
                found[delay_id].identities[identity] = sid
            return list(found.values())

        return await self._run("tracked", tracked)

    async def count_delegations(self) -> dict[Phase, int]:
        """How many delegations there are in each phase."""

        def count(txn: LoggingTransaction) -> dict[Phase, int]:
            txn.execute("SELECT phase, COUNT(*) FROM synapse_lk_jwt_delegations GROUP BY phase")
            found = {phase: int(number) for phase, number in txn}
            return {phase: found.get(phase.value, 0) for phase in Phase}

        return await self._run("count_delegations", count)

    def _advance(
        self,
        txn: LoggingTransaction,
        which: str,
        args: tuple[object, ...],
        signal: Signal,
        asked_ms: int | None = None,
    ) -> list[Task]:
        """Takes delegations a step further, and does to their delayed events what that takes."""
        return self._advance_all(txn, self._rows(txn, which, args), signal, asked_ms)

    def _rows(
        self, txn: LoggingTransaction, which: str, args: tuple[object, ...]
    ) -> list[dict[str, Any]]:
        """Reads a batch of delegations and locks them, always in the same order."""
        columns = ("delay_id", "user_id", "livekit_room", "leave", *_COLUMNS)
        txn.execute(
            f"SELECT {', '.join(columns)} FROM synapse_lk_jwt_delegations"
            f" WHERE {which} ORDER BY delay_id LIMIT {BATCH} {_for_update(txn)}",
            args,
        )
        return [dict(zip(columns, values, strict=True)) for values in txn.fetchall()]

    def _read(
        self, txn: LoggingTransaction, row: Mapping[str, Any]
    ) -> tuple[Delegation, JsonDict | None] | None:
        """A delegation, and its leave if that is on its way; None if the row cannot be read.

        A newer version of the module may have written such a row. It must neither stop the others
        nor stand at the head of those that are due.
        """
        try:
            delegation = _from_columns(row)
            leave: Any = json.loads(row["leave"]) if row["leave"] is not None else None
            if delegation.phase is Phase.LEAVING:
                # These must be there.
                leave["event"], leave["since"]
            return delegation, leave
        except (ValueError, TypeError, LookupError) as e:
            delay_id = row["delay_id"]
            if delay_id not in self._unreadable:
                self._unreadable.add(delay_id)
                logger.error(
                    "The delegation of the delayed event %s is skipped: its row in"
                    " synapse_lk_jwt_delegations cannot be read (%s). If a newer version of"
                    " synapse-lk-jwt has run before, install that again",
                    delay_id,
                    e,
                )
            later_ms = self._homeserver.clock.time_msec() + UNREADABLE_PAUSE_MS
            self._update(txn, delay_id, {"next_ms": later_ms})
            return None

    def _update(self, txn: LoggingTransaction, delay_id: str, values: Mapping[str, Any]) -> None:
        txn.execute(
            "UPDATE synapse_lk_jwt_delegations"
            f" SET {', '.join(f'{column} = ?' for column in values)} WHERE delay_id = ?",
            (*values.values(), delay_id),
        )

    def _advance_all(
        self,
        txn: LoggingTransaction,
        rows: Iterable[Mapping[str, Any]],
        signal: Signal,
        asked_ms: int | None = None,
    ) -> list[Task]:
        steps = (self._advance_one(txn, row, signal, asked_ms) for row in rows)
        tasks = [task for task in steps if task is not None]
        identities = self._identities(txn, [task.delay_id for task in tasks])
        return [
            attr.evolve(task, identities=frozenset(identities[task.delay_id])) for task in tasks
        ]

    def _advance_one(
        self,
        txn: LoggingTransaction,
        row: Mapping[str, Any],
        signal: Signal,
        asked_ms: int | None,
    ) -> Task | None:
        """Takes one delegation a step further. The identities of the task are left out."""
        delay_id, user_id = row["delay_id"], row["user_id"]
        state = self._read(txn, row)
        if state is None:
            return None
        before, leave = state
        if before.phase is Phase.LEAVING and signal is Signal.DUE:
            assert leave is not None
            if self._homeserver.events.has_sent(txn, leave["event"], leave["since"]):
                # It was sent, and this process or another one died ahead of noting that; or there
                # is a newer membership, which it is not for.
                signal = Signal.OVER
        elif (
            before.phase is Phase.WAITING
            and signal is Signal.DUE
            and self._homeserver.delayed_events.get(txn, delay_id, user_id) is None
        ):
            # It was sent, or cancelled, and there is nothing to wait for any more.
            signal = Signal.OVER
        now_ms = self._homeserver.clock.time_msec()
        why = None
        after, action = transition(before, signal, now_ms, asked_ms)
        if action is Action.RESTART:
            if not self._homeserver.delayed_events.restart(txn, delay_id, user_id):
                after, action = None, Action.NOTHING
        elif action is Action.SEND and leave is None:
            # Once Synapse does not have it any more, nobody else can send it, or lose it.
            event = self._homeserver.delayed_events.get(txn, delay_id, user_id)
            if event is None or not self._homeserver.delayed_events.remove(txn, delay_id, user_id):
                after, action = None, Action.NOTHING
            else:
                why = trigger(before)
                leave = {
                    "event": event.event,
                    "since": self._homeserver.events.newest_position(txn),
                    "gone_ms": before.doubted_ms or now_ms,
                }
        if after is None:
            self._delete(txn, delay_id)
        elif after != before:
            stored = json.dumps(leave) if leave else None
            self._update(txn, delay_id, {**_as_columns(after), "leave": stored})
        if action not in (Action.ASK, Action.SEND):
            return None
        return Task(
            action,
            delay_id,
            row["livekit_room"],
            frozenset(),
            before.phase is not Phase.WAITING,
            leave["event"] if leave else None,
            why,
            leave.get("gone_ms") if leave else None,
        )

    def _identities(
        self, txn: LoggingTransaction, delay_ids: Collection[str]
    ) -> dict[str, list[str]]:
        """The identities that each of some delegations follows."""
        found: dict[str, list[str]] = {delay_id: [] for delay_id in delay_ids}
        if found:
            clause, args = make_in_list_sql_clause(txn.database_engine, "delay_id", delay_ids)
            txn.execute(
                f"SELECT delay_id, identity FROM synapse_lk_jwt_identities WHERE {clause}", args
            )
            for delay_id, identity in txn:
                found[delay_id].append(identity)
        return found

    def _delete(self, txn: LoggingTransaction, delay_id: str) -> None:
        for table in ("delegations", "identities"):
            txn.execute(f"DELETE FROM synapse_lk_jwt_{table} WHERE delay_id = ?", (delay_id,))

    # Which processes there are

    async def note_process(self, process: Process, forget_ms: int) -> None:
        """Notes what is known of a process, and forgets those not seen since some time."""

        def note(txn: LoggingTransaction) -> None:
            txn.execute("DELETE FROM synapse_lk_jwt_processes WHERE seen_ms < ?", (forget_ms,))
            txn.execute(
                "INSERT INTO synapse_lk_jwt_processes AS old"
                " (instance, is_background, seen_ms, webhook_ms, refused_ms)"
                " VALUES (?, ?, ?, ?, ?) ON CONFLICT (instance) DO UPDATE SET"
                " is_background = EXCLUDED.is_background, seen_ms = EXCLUDED.seen_ms,"
                # A process that has just been started was told something before that.
                " webhook_ms = CASE WHEN EXCLUDED.webhook_ms > old.webhook_ms"
                " THEN EXCLUDED.webhook_ms ELSE old.webhook_ms END,"
                " refused_ms = CASE WHEN EXCLUDED.refused_ms > old.refused_ms"
                " THEN EXCLUDED.refused_ms ELSE old.refused_ms END",
                attr.astuple(process),
            )

        await self._write("note_process", note)

    async def processes(self) -> list[Process]:
        """All processes that were noted."""

        def processes(txn: LoggingTransaction) -> list[Process]:
            columns = ", ".join(field.name for field in attr.fields(Process))
            txn.execute(f"SELECT {columns} FROM synapse_lk_jwt_processes")
            # SQLite has no booleans.
            return [Process(name, bool(is_background), *ms) for name, is_background, *ms in txn]

        return await self._run("processes", processes)

    # How far the event stream has been followed

    async def position(self) -> int | None:
        """The position up to which changes of state have been dealt with, None at first."""

        def position(txn: LoggingTransaction) -> int | None:
            txn.execute("SELECT position FROM synapse_lk_jwt_stream")
            row = txn.fetchone()
            return None if row is None else int(row[0])

        return await self._run("position", position)

    async def set_position(self, position: int) -> None:
        """Notes the position. Must only be done by the process that follows the stream."""

        def set_position(txn: LoggingTransaction) -> None:
            txn.execute("UPDATE synapse_lk_jwt_stream SET position = ?", (position,))
            if txn.rowcount == 0:
                txn.execute("INSERT INTO synapse_lk_jwt_stream (position) VALUES (?)", (position,))

        await self._run("set_position", set_position)


_OF_DELAY = "delay_id = ?"
_OF_ROOM = "livekit_room = ? AND delay_id > ?"
_OF_IDENTITY = (
    "delay_id IN (SELECT delay_id FROM synapse_lk_jwt_identities"
    " WHERE livekit_room = ? AND identity = ?)"
)
_OF_SESSION = (
    "delay_id IN (SELECT delay_id FROM synapse_lk_jwt_identities"
    " WHERE livekit_room = ? AND identity = ? AND COALESCE(sid, ?) = ?)"
)
# The first condition is for those that another process changes while their lock is waited for.
_DUE = (
    "next_ms <= ? AND delay_id IN (SELECT delay_id FROM synapse_lk_jwt_delegations"
    " WHERE next_ms <= ? ORDER BY next_ms LIMIT ?)"
)

_COLUMNS = tuple(field.name for field in attr.fields(Delegation))
_PHASES = frozenset(phase.value for phase in Phase)


def _for_update(txn: LoggingTransaction) -> str:
    """What locks the rows that a query reads. SQLite has one writer at a time."""
    return "FOR UPDATE" if isinstance(txn.database_engine, PostgresEngine) else ""


def _as_columns(delegation: Delegation) -> dict[str, Any]:
    return {**attr.asdict(delegation), "phase": delegation.phase.value}


def _from_columns(row: Mapping[str, Any]) -> Delegation:
    # SQLite has no booleans.
    return Delegation(
        **{
            **{column: row[column] for column in _COLUMNS},
            "phase": Phase(row["phase"]),
            "several": bool(row["several"]),
        }
    )


def _migrate(txn: LoggingTransaction) -> None:
    """Brings the tables up to date, whichever process comes first."""
    if isinstance(txn.database_engine, Sqlite3Engine):
        # Else each statement would be a transaction of its own.
        txn.execute("BEGIN IMMEDIATE")
    else:
        # Nobody else takes this lock on that table, and it comes ahead of the first look at the
        # data: a process that waits for it must see what the other one has made.
        txn.execute("LOCK TABLE schema_version IN SHARE ROW EXCLUSIVE MODE")
    txn.execute("CREATE TABLE IF NOT EXISTS synapse_lk_jwt_schema (version INTEGER NOT NULL)")
    txn.execute("SELECT version FROM synapse_lk_jwt_schema")
    row = txn.fetchone()
    version = 0 if row is None else int(row[0])
    for statements in MIGRATIONS[version:]:
        for statement in statements:
            txn.execute(statement)
    if row is None:
        txn.execute("INSERT INTO synapse_lk_jwt_schema (version) VALUES (?)", (len(MIGRATIONS),))
    elif version < len(MIGRATIONS):
        txn.execute("UPDATE synapse_lk_jwt_schema SET version = ?", (len(MIGRATIONS),))
