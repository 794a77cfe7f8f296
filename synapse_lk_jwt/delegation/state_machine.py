# SPDX-License-Identifier: Apache-2.0
"""The state machine of delegated delayed leaves (MSC4195, 'Delegation of delayed leave events').

A client schedules its own leave as a delayed event (MSC4140) and delegates it to this module. While
the participant is connected to the SFU, the module restarts the delayed event in time. When the
participant has left, the module sends it.

This file uses neither Twisted nor HTTP nor a database. `transition` gets a delegation and a signal.
It returns the next state of the delegation, and the next action. No other file decides about these.
"""

import json
from collections.abc import Mapping
from enum import Enum, auto
from typing import Any

import attr

from synapse_lk_jwt.identifiers import is_clean

# The types of a membership of a call: MSC3401's, and MSC4143's, each with its stable name.
MEMBERSHIP_TYPES = frozenset(
    {
        "org.matrix.msc3401.call.member",
        "m.call.member",
        "org.matrix.msc4143.rtc.member",
        "m.rtc.member",
    }
)

# MSC4143 requires memberships to be encrypted in encrypted rooms.
ENCRYPTED_TYPE = "m.room.encrypted"

# How many delegations a user has at most, and how many encrypted ones among them in one room. The
# homeserver cannot see whether an encrypted event is a leave.
MAX_DELEGATIONS = 100
MAX_ENCRYPTED = 5

# How many participant identities one delegation follows at most. Clients have two.
MAX_IDENTITIES = 10

# The content of a leave with its reason takes a few hundred bytes.
MAX_LEAVE_BYTES = 4096

# The leave of a participant who never connects is sent after the delay, or after this if the delay
# is longer.
MAX_WAIT_MS = 3_600_000

FIRST_QUERY_MS = 1_000

# The module restarts the delayed event after a third of its delay, within these bounds.
MIN_RESTART_MS = 1_000
MAX_RESTART_MS = 300_000

# How soon the SFU is queried again when it did not answer.
QUERY_AGAIN_MS = 2_000

# Some clients connect under one identity for a moment, disconnect, and connect again under another
# one. After a session shorter than the first, the module waits for the second before it sends.
SHORT_SESSION_MS = 2_000
REJOIN_GRACE_MS = 1_000

# How long the process that sends a leave may take before the leave is sent again.
SENDING_MS = 10_000
MAX_SEND_PAUSE_MS = 300_000

# With the pauses above this takes a day. A later leave would be useless.
MAX_SEND_ATTEMPTS = 300


class Phase(Enum):
    """The phase of a delegation. A delegation that has ended does not exist any more."""

    WAITING = "waiting"
    """The participant has not connected yet."""
    CONNECTED = "connected"
    LEAVING = "leaving"
    """The module has removed the delayed event from Synapse's table, and sends it."""


class Signal(Enum):
    """What happens to a delegation. An SFU that does not answer is no signal."""

    SEEN = auto()
    """LiveKit reported that one of the identities is connected."""
    LEFT = auto()
    """A webhook reported that one of the identities has left, or that the room has finished."""
    ABSENT = auto()
    """The module queried the SFU for this delegation, and none of its identities is connected."""
    ABSENT_AT_POLL = auto()
    """A poll found that none of the identities is connected, without an earlier suspicion."""
    DUE = auto()
    """`Delegation.due_ts` has passed."""
    EVENT_GONE = auto()
    """Synapse no longer has the delayed event: it was sent or cancelled."""
    ALREADY_SENT = auto()
    """The room has the leave, or a newer membership that this leave does not belong to."""
    SENT = auto()
    """The room accepted the leave."""
    REJECTED = auto()
    """The room rejected the leave permanently."""
    SEND_FAILED = auto()
    """The leave could not be sent, and may be accepted later."""


# Each of these ends a delegation in any phase.
_LAST = frozenset({Signal.EVENT_GONE, Signal.ALREADY_SENT, Signal.SENT, Signal.REJECTED})


class Action(Enum):
    """What to do next."""

    NOTHING = auto()
    QUERY = auto()
    """Query the SFU whether an identity is connected. If it answers, SEEN or ABSENT follows."""
    RESTART = auto()
    """Restart the delayed event. If Synapse does not have it, EVENT_GONE follows."""
    TAKE_AND_SEND = auto()
    """Remove the delayed event from Synapse's table, and send it. If Synapse does not have it,
    EVENT_GONE follows, otherwise the signals of SEND.
    """
    SEND = auto()
    """Send the leave that TAKE_AND_SEND removed. SENT, REJECTED or SEND_FAILED follows."""


class Trigger(Enum):
    """Why a leave is sent."""

    WEBHOOK = "webhook"
    POLL = "poll"
    GAVE_UP = "gave_up"
    """The participant never connected."""


@attr.s(auto_attribs=True, frozen=True, slots=True, kw_only=True)
class Delegation:
    """The state of one delegation. Names in `_ts` are milliseconds since the epoch.

    Attributes:
        delay_ms: the delay of the delayed event, in milliseconds.
        created_ts: when the client delegated it.
        has_multiple_identities: whether the participant may have more than one identity.
        phase: the phase.
        due_ts: when DUE is next.
        restarted_ts: when the delayed event was last restarted; 0 for never.
        connected_ts: since when it is CONNECTED; 0 before.
        suspected_gone_ts: since when the module suspects that the participant has left; 0 if it
            does not.
        attempts: queries, or attempts to send, in a row without success.
    """

    delay_ms: int
    created_ts: int
    has_multiple_identities: bool
    phase: Phase = Phase.WAITING
    due_ts: int
    restarted_ts: int = 0
    connected_ts: int = 0
    suspected_gone_ts: int = 0
    attempts: int = 0

    @property
    def restart_interval_ms(self) -> int:
        """Milliseconds between two restarts of the delayed event."""
        return max(MIN_RESTART_MS, min(self.delay_ms // 3, MAX_RESTART_MS))

    @property
    def give_up_ts(self) -> int:
        """When to stop waiting for the participant."""
        return self.created_ts + min(self.delay_ms, MAX_WAIT_MS)


def can_be_delegated(event_type: str, content: Mapping[str, Any]) -> bool:
    """Whether an event may be sent on behalf of its sender: a leave, or an event that may be one.

    The leaves of matrix-js-sdk are `{}` as state, and as sticky events the sticky key with or
    without the slot ID. MSC4143 adds `member.membership` and `leave_reason`; its earlier drafts had
    `membership` and `disconnect_reason`.

    Args:
        event_type: the type of the event.
        content: its content.
    """
    if event_type == ENCRYPTED_TYPE:
        return True
    return (
        event_type in MEMBERSHIP_TYPES
        and all(_belongs_to_a_leave(key, value) for key, value in content.items())
        and len(json.dumps(content)) <= MAX_LEAVE_BYTES
    )


def _belongs_to_a_leave(key: str, value: Any) -> bool:
    match key:
        case "slot_id" | "sticky_key" | "msc4354_sticky_key":
            return isinstance(value, str) and is_clean(value)
        case "membership":
            return bool(value == "leave")
        case "member":
            return _has_only_texts(value) and value.get("membership") == "leave"
        case "leave_reason" | "disconnect_reason":
            return isinstance(value, str) or _has_only_texts(value)
    return False


def _has_only_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def sticky_key(content: Mapping[str, Any]) -> str | None:
    """The key by which a sticky event (MSC4354) replaces older ones of its sender and type."""
    key = content.get("sticky_key", content.get("msc4354_sticky_key"))
    return key if isinstance(key, str) else None


def delegate(delay_ms: int, has_multiple_identities: bool, now_ts: int) -> Delegation:
    """A new delegation.

    The caller queries the SFU immediately, because no webhook will report a participant who is
    already connected.
    """
    return Delegation(
        delay_ms=delay_ms,
        created_ts=now_ts,
        has_multiple_identities=has_multiple_identities,
        due_ts=now_ts + FIRST_QUERY_MS,
    )


def follow_more(d: Delegation, now_ts: int) -> Delegation:
    """The delegation after the client delegated it again with new identities.

    If the participant is not connected, the next query is due now, and the pauses between queries
    start from the shortest again.
    """
    d = attr.evolve(d, has_multiple_identities=True)
    return attr.evolve(d, due_ts=now_ts, attempts=0) if d.phase is Phase.WAITING else d


def transition(
    d: Delegation, signal: Signal, now_ts: int, queried_ts: int | None = None
) -> tuple[Delegation | None, Action]:
    """The state that follows a signal.

    Args:
        d: the delegation.
        signal: what happens to it.
        now_ts: the time.
        queried_ts: when the SFU was queried, if the signal is its answer. An answer to an older
            query neither confirms nor clears a suspicion.

    Returns:
        The next state of the delegation, None if it has ended, and the next action.
    """
    if signal in _LAST:
        return None, Action.NOTHING
    if queried_ts is not None and queried_ts < d.suspected_gone_ts:
        return d, Action.NOTHING
    if d.phase is Phase.LEAVING:
        return _leaving(d, signal, now_ts)
    match signal:
        case Signal.SEEN:
            return _seen(d, now_ts)
        case Signal.LEFT if d.phase is Phase.CONNECTED:
            # In WAITING, LEFT is ignored: a late webhook may be about an earlier session.
            return _suspect(d, now_ts)
        case Signal.ABSENT:
            return _absent(d, now_ts)
        case Signal.ABSENT_AT_POLL if d.phase is Phase.CONNECTED:
            if d.attempts == 0:
                return attr.evolve(d, attempts=1), Action.NOTHING
            return _suspect(d, now_ts)
        case Signal.DUE:
            return _due(d, now_ts)
    return d, Action.NOTHING


def trigger(d: Delegation) -> Trigger:
    """Why the leave of a delegation is sent.

    Args:
        d: the delegation just before TAKE_AND_SEND.
    """
    if d.phase is Phase.WAITING:
        return Trigger.GAVE_UP
    # In CONNECTED only polls without the participant are counted.
    return Trigger.POLL if d.attempts else Trigger.WEBHOOK


def _seen(d: Delegation, now_ts: int) -> tuple[Delegation, Action]:
    if d.phase is Phase.CONNECTED:
        d = attr.evolve(d, suspected_gone_ts=0, attempts=0)
        return attr.evolve(d, due_ts=_restart_due_ts(d)), Action.NOTHING
    d = attr.evolve(
        d,
        phase=Phase.CONNECTED,
        connected_ts=now_ts,
        restarted_ts=now_ts,
        attempts=0,
    )
    return attr.evolve(d, due_ts=_restart_due_ts(d)), Action.RESTART


def _suspect(d: Delegation, now_ts: int) -> tuple[Delegation, Action]:
    due_ts = min(now_ts + QUERY_AGAIN_MS, _restart_due_ts(d))
    return attr.evolve(d, suspected_gone_ts=now_ts, due_ts=due_ts), Action.QUERY


def _absent(d: Delegation, now_ts: int) -> tuple[Delegation, Action]:
    if d.suspected_gone_ts:
        # `_due` queries again before this time.
        rejoin_ts = d.suspected_gone_ts + REJOIN_GRACE_MS
        is_short = d.suspected_gone_ts < d.connected_ts + SHORT_SESSION_MS
        if d.has_multiple_identities and is_short and now_ts < rejoin_ts:
            due_ts = min(rejoin_ts, _restart_due_ts(d))
            return attr.evolve(d, due_ts=due_ts), Action.NOTHING
        return _take_and_send(d, now_ts)
    if d.phase is Phase.WAITING and now_ts >= d.give_up_ts:
        return _take_and_send(d, now_ts)
    return d, Action.NOTHING


def _take_and_send(d: Delegation, now_ts: int) -> tuple[Delegation, Action]:
    d = attr.evolve(
        d, phase=Phase.LEAVING, due_ts=now_ts + SENDING_MS, suspected_gone_ts=0, attempts=0
    )
    return d, Action.TAKE_AND_SEND


def _due(d: Delegation, now_ts: int) -> tuple[Delegation, Action]:
    if d.phase is Phase.WAITING:
        longest_ms = max(1_000, d.delay_ms // 3)
        due_ts = now_ts + min(FIRST_QUERY_MS << min(d.attempts + 1, 20), longest_ms)
        if now_ts < d.give_up_ts:
            due_ts = min(due_ts, d.give_up_ts)
        return attr.evolve(d, due_ts=due_ts, attempts=d.attempts + 1), Action.QUERY
    if now_ts >= _restart_due_ts(d):
        d = attr.evolve(d, restarted_ts=now_ts)
        due_ts = now_ts if d.suspected_gone_ts else _restart_due_ts(d)
        return attr.evolve(d, due_ts=due_ts), Action.RESTART
    if d.suspected_gone_ts:
        due_ts = min(now_ts + QUERY_AGAIN_MS, _restart_due_ts(d))
        return attr.evolve(d, due_ts=due_ts), Action.QUERY
    return attr.evolve(d, due_ts=_restart_due_ts(d)), Action.NOTHING


def _restart_due_ts(d: Delegation) -> int:
    return d.restarted_ts + d.restart_interval_ms


def _leaving(d: Delegation, signal: Signal, now_ts: int) -> tuple[Delegation | None, Action]:
    if signal is Signal.SEND_FAILED:
        if d.attempts >= MAX_SEND_ATTEMPTS:
            return None, Action.NOTHING
        pause_ms = min(1_000 << min(d.attempts, 20), MAX_SEND_PAUSE_MS)
        return attr.evolve(d, due_ts=now_ts + pause_ms, attempts=d.attempts + 1), Action.NOTHING
    if signal is Signal.DUE:
        return attr.evolve(d, due_ts=now_ts + SENDING_MS), Action.SEND
    return d, Action.NOTHING
