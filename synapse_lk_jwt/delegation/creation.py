# SPDX-License-Identifier: Apache-2.0
"""How a client delegates a delayed leave: which events are accepted, and what they replace."""

from collections.abc import Sequence

from synapse.module_api import LoggingTransaction

from synapse_lk_jwt.call_member import CallMember
from synapse_lk_jwt.compat.delayed_events import DelayedEvent
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.compat.module_database import lock_name
from synapse_lk_jwt.delegation.state_machine import (
    ENCRYPTED_TYPE,
    MAX_DELEGATIONS,
    MAX_ENCRYPTED,
    MAX_IDENTITIES,
    can_be_delegated,
    delegate,
    follow_more,
    sticky_key,
)
from synapse_lk_jwt.delegation.tables import DelegationTable, Record, Rival


class Creation:
    """Creates delegations."""

    def __init__(self, homeserver: Homeserver, table: DelegationTable) -> None:
        self._homeserver = homeserver
        self._table = table

    def create(self, txn: LoggingTransaction, member: CallMember, delay_id: str) -> bool | None:
        """Creates a delegation. An older one of the same member is dropped.

        Args:
            txn: a transaction of `ModuleDatabase.write`.
            member: the member. Its first identity distinguishes it from the user's other members.
            delay_id: the delayed event.

        Returns:
            True if the delegation is new, False if the client delegates the same event again. None
            if the user has no such delayed event in that room, or may not delegate it.
        """
        # Clients send the request twice in a row, and the two may reach different processes.
        lock_name(txn, member.user_id)
        event = self._homeserver.delayed_events.get(txn, delay_id, member.user_id)
        if event is None or event.room_id != member.room_id:
            return None
        if not can_be_delegated(event.type, event.event["content"]):
            return None
        known = self._table.lock(txn, [delay_id])
        if known:
            self._follow_more(txn, known[0], member)
            return False
        new = _rival(event, delay_id, member.identities[0])
        self._drop_older(txn, new, member)
        if self._has_too_many(txn, new, member):
            return None
        has_multiple_identities = len(member.identities) > 1
        now_ts = self._homeserver.clock.time_msec()
        self._table.insert(
            txn,
            new,
            user_id=member.user_id,
            room_id=member.room_id,
            livekit_room=member.livekit_room,
            delegation=delegate(event.delay_ms, has_multiple_identities, now_ts),
        )
        self._table.add_identities(txn, member.livekit_room, delay_id, member.identities)
        return True

    def _has_too_many(self, txn: LoggingTransaction, new: Rival, member: CallMember) -> bool:
        number, encrypted = self._table.count_of_user(txn, member.user_id, member.room_id)
        if number >= MAX_DELEGATIONS:
            return True
        return new.event_type == ENCRYPTED_TYPE and encrypted >= MAX_ENCRYPTED

    def _follow_more(self, txn: LoggingTransaction, known: Record, member: CallMember) -> None:
        """Adds identities that the client had not named before to a delegation."""
        if known.livekit_room != member.livekit_room:
            return
        followed = self._table.identities(txn, [known.delay_id])[known.delay_id]
        new = [identity for identity in member.identities if identity not in followed]
        new = new[: max(0, MAX_IDENTITIES - len(followed))]
        if new:
            now_ts = self._homeserver.clock.time_msec()
            self._table.add_identities(txn, known.livekit_room, known.delay_id, new)
            self._table.save(txn, known, follow_more(known.delegation, now_ts), known.leave)

    def _drop_older(self, txn: LoggingTransaction, new: Rival, member: CallMember) -> None:
        """Drops the delegations that a new one replaces.

        They belong to the same member, or their leave has the same state key or sticky key. An
        older leave with the same key is cancelled, because it would remove the new membership.
        """
        for older in self._table.rivals(txn, member.livekit_room, member.user_id):
            is_same = _replaced_by(older) is not None and _replaced_by(older) == _replaced_by(new)
            if is_same:
                self._homeserver.delayed_events.cancel(txn, older.delay_id, member.user_id)
            if is_same or older.member_identity == new.member_identity:
                self._table.delete(txn, older.delay_id)


def _rival(event: DelayedEvent, delay_id: str, member_identity: str) -> Rival:
    """The values that decide which delegations a delayed event replaces."""
    has_sticky_key = event.state_key is None and event.type != ENCRYPTED_TYPE
    return Rival(
        delay_id=delay_id,
        member_identity=member_identity,
        event_type=event.type,
        state_key=event.state_key,
        # The homeserver must not use the content of an encrypted event.
        sticky_key=sticky_key(event.event["content"]) if has_sticky_key else None,
    )


def _replaced_by(event: Rival) -> Sequence[str | None] | None:
    """A value that events share if one replaces the other; None if no event replaces this one."""
    if event.state_key is None and event.sticky_key is None:
        return None
    return event.event_type, event.state_key, event.sticky_key
