# SPDX-License-Identifier: Apache-2.0
"""The rows of delegations, and of the participant identities that each of them follows.

Methods that take a transaction are for `ModuleDatabase.write`. Each transaction locks delegations
before all other rows, in the order of their delay IDs: transactions that lock in different orders
deadlock.
"""

import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import attr
from synapse.module_api import DatabasePool, LoggingTransaction
from synapse.types import JsonDict

from synapse_lk_jwt.compat.module_database import ModuleDatabase, for_update, in_list
from synapse_lk_jwt.delegation.state_machine import ENCRYPTED_TYPE, Delegation, Phase

logger = logging.getLogger(__name__)

DELEGATIONS = "synapse_lk_jwt_delegations"
IDENTITIES = "synapse_lk_jwt_identities"

# How many delegations one transaction changes at most, and how many one reads for a poll.
BATCH = 100
READ_BATCH = 1_000

# When a delegation with an unreadable row is read again.
UNREADABLE_PAUSE_MS = 3_600_000


@attr.s(auto_attribs=True, frozen=True, slots=True, kw_only=True)
class Leave:
    """A leave that was removed from Synapse's delayed events, to be sent.

    Attributes:
        event: the event, as `create_and_send_event_into_room` takes it.
        since: the stream ordering of the newest event when the leave was taken.
        gone_ts: when the module first suspected that the participant had left, in milliseconds
            since the epoch.
    """

    event: JsonDict
    since: int
    gone_ts: int


@attr.s(auto_attribs=True, frozen=True, slots=True, kw_only=True)
class Record:
    """A row that is locked.

    Attributes:
        delay_id: the delayed event.
        user_id: the user who delegated it.
        livekit_room: the LiveKit room.
        delegation: the state.
        leave: the leave; None except in the phase LEAVING.
    """

    delay_id: str
    user_id: str
    livekit_room: str
    delegation: Delegation
    leave: Leave | None


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Batch:
    """Some of the rows that match a query.

    Attributes:
        records: the readable rows.
        last: the delay ID of the last row if there may be more rows, otherwise None.
    """

    records: Sequence[Record]
    last: str | None


@attr.s(auto_attribs=True, frozen=True, slots=True, kw_only=True)
class Rival:
    """A delegation of the same user in the same call as a new one.

    Attributes:
        delay_id: the delayed event.
        member_identity: the identity that distinguishes the member from the user's other ones.
        event_type: the type of the delayed event.
        state_key: its state key, None for a message event.
        sticky_key: its sticky key (MSC4354), if it has one that is not encrypted.
    """

    delay_id: str
    member_identity: str
    event_type: str
    state_key: str | None
    sticky_key: str | None


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Tracked:
    """What a poll of the SFU needs to know of a delegation.

    Attributes:
        delay_id: the delayed event.
        livekit_room: the LiveKit room.
        is_connected: whether one of its identities is connected.
        is_settled: whether it is connected, and no sign suggests that the participant has left.
        identities: the participant identities that it follows, with the last known session of each.
    """

    delay_id: str
    livekit_room: str
    is_connected: bool
    is_settled: bool
    identities: dict[str, str | None]


class DelegationTable:
    """Reads and writes delegations.

    Attributes, all private:
        _unreadable: the delay IDs of unreadable rows, so that each is logged once.
    """

    def __init__(self, database: ModuleDatabase) -> None:
        self._database = database
        self._unreadable: set[str] = set()

    # Rows to change

    @staticmethod
    def connected() -> tuple[str, Sequence[object]]:
        """A query for the delay IDs of participants who are certainly connected."""
        sql = f"SELECT delay_id FROM {DELEGATIONS} WHERE phase = ? AND suspected_gone_ts = 0"
        return sql, (Phase.CONNECTED.value,)

    def lock(self, txn: LoggingTransaction, delay_ids: Collection[str]) -> Sequence[Record]:
        """Locks and reads delegations."""
        condition, args = in_list(txn, "delay_id", delay_ids)
        return self._lock(txn, condition, args, limit=len(delay_ids)).records

    def lock_of_identity(
        self, txn: LoggingTransaction, livekit_room: str, identity: str
    ) -> Sequence[Record]:
        """Locks and reads the delegations that follow an identity, `BATCH` of them at most."""
        condition = (
            f"delay_id IN (SELECT delay_id FROM {IDENTITIES}"
            " WHERE livekit_room = ? AND identity = ?)"
        )
        return self._lock(txn, condition, (livekit_room, identity)).records

    def lock_of_session(
        self, txn: LoggingTransaction, livekit_room: str, identity: str, sid: str
    ) -> Sequence[Record]:
        """As `lock_of_identity`, without the delegations that have seen another session of it."""
        condition = (
            f"delay_id IN (SELECT delay_id FROM {IDENTITIES}"
            " WHERE livekit_room = ? AND identity = ? AND COALESCE(sid, ?) = ?)"
        )
        return self._lock(txn, condition, (livekit_room, identity, sid, sid)).records

    def lock_of_room(self, txn: LoggingTransaction, livekit_room: str, after: str) -> Batch:
        """Locks and reads the delegations of a LiveKit room after a delay ID."""
        return self._lock(txn, "livekit_room = ? AND delay_id > ?", (livekit_room, after))

    def lock_due(self, txn: LoggingTransaction) -> Batch:
        """Locks and reads the delegations that are due, the longest overdue ones first."""
        now_ts = self._database.now_ts()
        # The first condition is for rows that another process changes while this one waits.
        condition = (
            f"due_ts <= ? AND delay_id IN (SELECT delay_id FROM {DELEGATIONS}"
            " WHERE due_ts <= ? ORDER BY due_ts LIMIT ?)"
        )
        return self._lock(txn, condition, (now_ts, now_ts, BATCH))

    def _lock(
        self,
        txn: LoggingTransaction,
        condition: str,
        args: Sequence[object],
        limit: int | None = None,
    ) -> Batch:
        limit = BATCH if limit is None else limit
        columns = ("delay_id", "user_id", "livekit_room", "leave", *_STATE)
        txn.execute(
            f"SELECT {', '.join(columns)} FROM {DELEGATIONS}"
            f" WHERE {condition} ORDER BY delay_id LIMIT {limit} {for_update(txn)}",
            (*args,),
        )
        rows = [dict(zip(columns, values, strict=True)) for values in txn.fetchall()]
        records = [record for row in rows if (record := self._read(txn, row)) is not None]
        return Batch(records, rows[-1]["delay_id"] if len(rows) == limit else None)

    def _read(self, txn: LoggingTransaction, row: Mapping[str, Any]) -> Record | None:
        """A row as a record; None if it is not readable.

        A newer version of the module may have written such a row. It must not stop the other rows,
        so it becomes due again much later.
        """
        delay_id = row["delay_id"]
        try:
            return Record(
                delay_id=delay_id,
                user_id=row["user_id"],
                livekit_room=row["livekit_room"],
                delegation=_from_columns(row),
                leave=_from_json(row["leave"], Phase(row["phase"])),
            )
        except (ValueError, TypeError, LookupError) as e:
            if delay_id not in self._unreadable:
                self._unreadable.add(delay_id)
                logger.error(
                    "Skipped the delegation of the delayed event %s: its row in %s is not readable"
                    " (%s). If a newer version of synapse-lk-jwt ran before, install that again",
                    delay_id,
                    DELEGATIONS,
                    e,
                )
            later_ts = self._database.now_ts() + UNREADABLE_PAUSE_MS
            self._update(txn, delay_id, {"due_ts": later_ts})
            return None

    def save(
        self,
        txn: LoggingTransaction,
        record: Record,
        delegation: Delegation | None,
        leave: Leave | None,
    ) -> None:
        """Stores the new state of a locked delegation, or deletes one that has ended."""
        if delegation is None:
            self.delete(txn, record.delay_id)
        elif delegation != record.delegation:
            columns = {**_as_columns(delegation), "leave": _as_json(leave)}
            self._update(txn, record.delay_id, columns)

    def _update(self, txn: LoggingTransaction, delay_id: str, values: Mapping[str, Any]) -> None:
        DatabasePool.simple_update_txn(txn, DELEGATIONS, {"delay_id": delay_id}, values)

    def insert(
        self,
        txn: LoggingTransaction,
        rival: Rival,
        *,
        user_id: str,
        room_id: str,
        livekit_room: str,
        delegation: Delegation,
    ) -> None:
        """Stores a new delegation, without identities."""
        values = {
            **attr.asdict(rival),
            "user_id": user_id,
            "room_id": room_id,
            "livekit_room": livekit_room,
            **_as_columns(delegation),
        }
        DatabasePool.simple_insert_txn(txn, DELEGATIONS, values)

    def delete(self, txn: LoggingTransaction, delay_id: str) -> None:
        """Deletes a delegation and its identities."""
        for table in (DELEGATIONS, IDENTITIES):
            DatabasePool.simple_delete_txn(txn, table, {"delay_id": delay_id})

    # What a new delegation depends on

    def rivals(self, txn: LoggingTransaction, livekit_room: str, user_id: str) -> list[Rival]:
        """Locks and reads the delegations of one user in one call."""
        columns = [field.name for field in attr.fields(Rival)]
        txn.execute(
            f"SELECT {', '.join(columns)} FROM {DELEGATIONS} WHERE livekit_room = ? AND user_id = ?"
            f" ORDER BY delay_id {for_update(txn)}",
            (livekit_room, user_id),
        )
        rows = txn.fetchall()
        return [Rival(**dict(zip(columns, values, strict=True))) for values in rows]

    def count_of_user(self, txn: LoggingTransaction, user_id: str, room_id: str) -> tuple[int, int]:
        """How many delegations a user has, and how many encrypted ones in one Matrix room."""
        txn.execute(
            "SELECT COUNT(*), COUNT(CASE WHEN event_type = ? AND room_id = ? THEN 1 END)"
            f" FROM {DELEGATIONS} WHERE user_id = ?",
            (ENCRYPTED_TYPE, room_id, user_id),
        )
        number, encrypted = txn.fetchone() or (0, 0)
        return number, encrypted

    # Identities

    def identities(
        self, txn: LoggingTransaction, delay_ids: Collection[str]
    ) -> dict[str, list[str]]:
        """The identities that each of some delegations follows."""
        found: dict[str, list[str]] = {delay_id: [] for delay_id in delay_ids}
        for delay_id, identity in DatabasePool.simple_select_many_txn(
            txn, IDENTITIES, "delay_id", delay_ids, {}, ("delay_id", "identity")
        ):
            found[delay_id].append(identity)
        return found

    def add_identities(
        self, txn: LoggingTransaction, livekit_room: str, delay_id: str, identities: Iterable[str]
    ) -> None:
        """Adds identities to a delegation."""
        for identity in identities:
            row = {"livekit_room": livekit_room, "identity": identity, "delay_id": delay_id}
            DatabasePool.simple_insert_txn(txn, IDENTITIES, row)

    def note_session(
        self, txn: LoggingTransaction, record: Record, identity: str, sid: str, seen_ts: int
    ) -> None:
        """Notes the session of an identity of a locked delegation, unless it knows a later one.

        Only rows of locked delegations change, so that two transactions cannot deadlock over them.
        """
        txn.execute(
            f"UPDATE {IDENTITIES} SET sid = ?, sid_ts = ?"
            " WHERE livekit_room = ? AND identity = ? AND delay_id = ? AND sid_ts <= ?",
            (sid, seen_ts, record.livekit_room, identity, record.delay_id, seen_ts),
        )

    def forget_session(
        self, txn: LoggingTransaction, record: Record, identity: str, sid: str
    ) -> None:
        """Forgets the session of an identity of a locked delegation, so that any may follow."""
        row = {
            "livekit_room": record.livekit_room,
            "identity": identity,
            "delay_id": record.delay_id,
            "sid": sid,
        }
        DatabasePool.simple_update_txn(txn, IDENTITIES, row, {"sid": None})

    # Reads without a lock

    async def identities_of_user(self, livekit_room: str, user_id: str) -> list[str]:
        """The identities in a LiveKit room that a user's delegations follow."""

        def select(txn: LoggingTransaction) -> list[str]:
            txn.execute(
                f"SELECT DISTINCT identity FROM {IDENTITIES}"
                f" JOIN {DELEGATIONS} AS d USING (delay_id)"
                " WHERE d.livekit_room = ? AND d.user_id = ?",
                (livekit_room, user_id),
            )
            return [identity for (identity,) in txn]

        return await self._database.run("identities_of_user", select)

    async def tracked(self, livekit_room: str | None = None) -> list[Tracked]:
        """All delegations, or those of one LiveKit room, that are not LEAVING."""
        found: list[Tracked] = []
        after: str | None = ""
        while after is not None:
            tracked, after = await self._database.run("tracked", self._tracked, livekit_room, after)
            found += tracked
        return found

    def _tracked(
        self, txn: LoggingTransaction, livekit_room: str | None, after: str
    ) -> tuple[list[Tracked], str | None]:
        """`READ_BATCH` delegations after a delay ID, and the last one if there may be more."""
        condition = "" if livekit_room is None else "livekit_room = ? AND"
        args = [] if livekit_room is None else [livekit_room]
        txn.execute(
            "SELECT d.delay_id, d.livekit_room, phase, suspected_gone_ts, attempts, identity, sid"
            f" FROM (SELECT * FROM {DELEGATIONS} WHERE {condition} phase <> ? AND delay_id > ?"
            " ORDER BY delay_id LIMIT ?) AS d"
            f" LEFT JOIN {IDENTITIES} AS i ON i.delay_id = d.delay_id ORDER BY d.delay_id",
            (*args, Phase.LEAVING.value, after, READ_BATCH),
        )
        rows = txn.fetchall()
        found: dict[str, Tracked] = {}
        for delay_id, room, phase, suspected_gone_ts, attempts, identity, sid in rows:
            # `_read` logs unreadable rows.
            if phase in _PHASES and identity is not None:
                if delay_id not in found:
                    is_connected = Phase(phase) is Phase.CONNECTED
                    is_settled = is_connected and not suspected_gone_ts and not attempts
                    found[delay_id] = Tracked(delay_id, room, is_connected, is_settled, {})
                found[delay_id].identities[identity] = sid
        is_full = len({row[0] for row in rows}) == READ_BATCH
        return list(found.values()), rows[-1][0] if is_full else None

    async def count(self) -> dict[Phase, int]:
        """The number of delegations in each phase."""

        def count(txn: LoggingTransaction) -> dict[Phase, int]:
            txn.execute(f"SELECT phase, COUNT(*) FROM {DELEGATIONS} GROUP BY phase")
            found = {phase: int(number) for phase, number in txn}
            return {phase: found.get(phase.value, 0) for phase in Phase}

        return await self._database.run("count_delegations", count)


# The columns of the state.
_STATE = tuple(field.name for field in attr.fields(Delegation))
_PHASES = frozenset(phase.value for phase in Phase)


def _as_columns(delegation: Delegation) -> dict[str, Any]:
    return {
        **attr.asdict(delegation),
        "phase": delegation.phase.value,
        "has_multiple_identities": int(delegation.has_multiple_identities),
    }


def _from_columns(row: Mapping[str, Any]) -> Delegation:
    return Delegation(
        **{
            **{column: row[column] for column in _STATE},
            "phase": Phase(row["phase"]),
            "has_multiple_identities": bool(row["has_multiple_identities"]),
        }
    )


def _as_json(leave: Leave | None) -> str | None:
    return None if leave is None else json.dumps(attr.asdict(leave))


def _from_json(text: str | None, phase: Phase) -> Leave | None:
    if phase is not Phase.LEAVING:
        return None
    return Leave(**json.loads(text or "null"))
