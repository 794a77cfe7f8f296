# SPDX-License-Identifier: Apache-2.0
"""What the module notes about LiveKit rooms: their Matrix rooms, and the users of identities."""

from collections.abc import Collection, Iterable

from synapse.module_api import DatabasePool, LoggingTransaction
from synapse.util.iterutils import batch_iter

from synapse_lk_jwt.compat.module_database import ModuleDatabase, in_list, lock_name
from synapse_lk_jwt.livekit.naming import DEFAULT_SLOT, hash_of_identity, livekit_room_name

# How many calls one transaction forgets at most.
BATCH = 100

# How many identities of one user in one call are noted.
MAX_OWNED = 100

# How many live slots of one Matrix room are created, and when a client may request another again.
MAX_SLOTS = 20
SLOTS_RETRY_AFTER_MS = 60_000

# A call that was noted less than this ago is not noted again. Otherwise hundreds of requests, on
# many processes, would write the same row.
NOTE_AGAIN_MS = 5_000

CALLS = "synapse_lk_jwt_calls"
OWNERS = "synapse_lk_jwt_owners"


class TooManySlots(Exception):
    """A Matrix room has as many live slots as one room may have."""


class CallTable:
    """Which LiveKit rooms belong to calls, and the Matrix room of each call."""

    def __init__(self, database: ModuleDatabase) -> None:
        self._database = database

    async def note(self, livekit_room: str, room_id: str) -> None:
        """Notes that a LiveKit room, which may not exist yet, belongs to a Matrix room.

        Raises:
            TooManySlots: if that Matrix room has too many calls and this is not one of them. The
                slot that most clients use is always allowed, so that a member of the room cannot
                block its call with other slots.
        """
        is_capped = livekit_room != livekit_room_name(room_id, DEFAULT_SLOT)

        def note(txn: LoggingTransaction) -> None:
            self.note_txn(txn, livekit_room, room_id, MAX_SLOTS if is_capped else None)

        try:
            await self._database.write("note_call", note)
        except self._database.error:
            # An error would fail all requests that share the CreateRoom. If the pool returned a
            # closed connection, a second attempt gets another one.
            await self._database.write("note_call", note)

    def note_txn(
        self, txn: LoggingTransaction, livekit_room: str, room_id: str, max_slots: int | None
    ) -> None:
        """As `note`, within a transaction under READ COMMITTED.

        Args:
            txn: the transaction.
            livekit_room: the LiveKit room.
            room_id: the Matrix room.
            max_slots: how many calls the Matrix room may have at most; None for any number.
        """
        now_ts = self._database.now_ts()
        noted_ts = DatabasePool.simple_select_one_onecol_txn(
            txn, CALLS, {"livekit_room": livekit_room}, "seen_ts", allow_none=True
        )
        if noted_ts is not None and noted_ts > now_ts - NOTE_AGAIN_MS:
            return
        if noted_ts is None and max_slots is not None:
            lock_name(txn, room_id)
            txn.execute(
                f"SELECT COUNT(*) FROM {CALLS} WHERE room_id = ? AND livekit_room <> ?",
                (room_id, livekit_room),
            )
            (number,) = txn.fetchone() or (0,)
            if number >= max_slots:
                raise TooManySlots()
        txn.execute(
            f"INSERT INTO {CALLS} AS old (livekit_room, room_id, seen_ts)"
            " VALUES (?, ?, ?) ON CONFLICT (livekit_room)"
            " DO UPDATE SET seen_ts = EXCLUDED.seen_ts WHERE old.seen_ts <= ?",
            (livekit_room, room_id, now_ts, now_ts - NOTE_AGAIN_MS),
        )

    async def all(self) -> dict[str, str]:
        """The Matrix rooms of all calls, by their LiveKit rooms."""

        def select(txn: LoggingTransaction) -> dict[str, str]:
            columns = ("livekit_room", "room_id")
            return dict(DatabasePool.simple_select_list_txn(txn, CALLS, None, columns))

        return await self._database.run("calls", select)

    async def in_rooms(self, room_ids: Collection[str]) -> dict[str, list[str]]:
        """The LiveKit rooms of Matrix rooms. Matrix rooms without calls are left out."""

        def select(txn: LoggingTransaction) -> dict[str, list[str]]:
            found: dict[str, list[str]] = {}
            for room_id, livekit_room in DatabasePool.simple_select_many_txn(
                txn, CALLS, "room_id", room_ids, {}, ("room_id", "livekit_room")
            ):
                found.setdefault(room_id, []).append(livekit_room)
            return found

        return await self._database.run("calls_in_rooms", select) if room_ids else {}

    async def room_of(self, livekit_room: str) -> str | None:
        """The Matrix room of a LiveKit room; None if it is not noted."""

        def select(txn: LoggingTransaction) -> str | None:
            room_id: str | None = DatabasePool.simple_select_one_onecol_txn(
                txn, CALLS, {"livekit_room": livekit_room}, "room_id", allow_none=True
            )
            return room_id

        return await self._database.run("room_of", select)

    async def forget(self, livekit_rooms: Collection[str], unseen_for_ms: int = 0) -> None:
        """Forgets calls that have ended.

        Args:
            livekit_rooms: their LiveKit rooms.
            unseen_for_ms: calls that were noted within this many milliseconds are kept.
        """

        def forget(txn: LoggingTransaction, batch: Collection[str]) -> None:
            seen_ts = self._database.now_ts() - unseen_for_ms
            for livekit_room in batch:
                txn.execute(
                    f"DELETE FROM {CALLS} WHERE livekit_room = ? AND seen_ts <= ?",
                    (livekit_room, seen_ts),
                )

        # In order, because transactions that lock the same rows in different orders deadlock.
        for batch in batch_iter(sorted(livekit_rooms), BATCH):
            await self._database.write("forget_calls", forget, batch)


class OwnerTable:
    """The users of identities, noted if participants can replace the sealed owner."""

    def __init__(self, database: ModuleDatabase) -> None:
        self._database = database

    async def in_room(self, livekit_room: str) -> dict[str, str]:
        """The users of the noted identities in a LiveKit room, by `hash_of_identity`."""

        def select(txn: LoggingTransaction) -> dict[str, str]:
            columns = ("identity_hash", "user_id")
            rows = DatabasePool.simple_select_list_txn(
                txn, OWNERS, {"livekit_room": livekit_room}, columns
            )
            return dict(rows)

        return await self._database.run("owners", select)

    async def note(self, livekit_room: str, identity: str, user_id: str) -> bool:
        """Notes the user of an identity, before a token for it is issued.

        Returns:
            False if the user has too many identities in that LiveKit room.
        """
        row = (livekit_room, hash_of_identity(identity), user_id)

        def note(txn: LoggingTransaction) -> bool:
            txn.execute(
                f"SELECT COUNT(*) FROM {OWNERS}"
                " WHERE livekit_room = ? AND identity_hash <> ? AND user_id = ?",
                row,
            )
            (number,) = txn.fetchone() or (0,)
            if number >= MAX_OWNED:
                return False
            DatabasePool.simple_upsert_txn_native_upsert(
                txn,
                OWNERS,
                keyvalues={"livekit_room": livekit_room, "identity_hash": row[1]},
                values={"seen_ts": self._database.now_ts()},
                insertion_values={"user_id": user_id},
            )
            return True

        return await self._database.write("note_owner", note)

    async def keep(self, livekit_room: str, identities: Iterable[str]) -> None:
        """Notes that identities are in a LiveKit room, so that `forget` keeps them."""
        hashes = [hash_of_identity(identity) for identity in identities]

        def keep(txn: LoggingTransaction) -> None:
            condition, args = in_list(txn, "identity_hash", hashes)
            txn.execute(
                f"UPDATE {OWNERS} SET seen_ts = ? WHERE livekit_room = ? AND {condition}",
                (self._database.now_ts(), livekit_room, *args),
            )

        if hashes:
            await self._database.write("keep_owners", keep)

    async def forget(self, unseen_for_ms: int) -> None:
        """Forgets identities that got no token and were in no call for some milliseconds."""

        def forget(txn: LoggingTransaction) -> None:
            txn.execute(
                f"DELETE FROM {OWNERS} WHERE seen_ts < ?",
                (self._database.now_ts() - unseen_for_ms,),
            )

        await self._database.write("forget_owners", forget)
