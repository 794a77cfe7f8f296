# SPDX-License-Identifier: Apache-2.0
"""Delegated delayed leaves (MSC4195, 'Delegation of delayed leave events'): what to do when.

A client schedules its own leave as a delayed event (MSC4140) and hands it over. From then on the
event is restarted in good time while the participant is connected to the SFU, and sent as soon as
the participant is gone.

Nothing in here knows of Twisted, HTTP or databases: `step` takes what is known of a delegation and
what has signal, and tells what is known afterwards and what is to be done.
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

# How many delegations a user has at most, and how many encrypted ones of these in one room: nobody
# can see whether an encrypted event is a leave.
MAX_DELEGATIONS = 100
MAX_ENCRYPTED = 5

# How many participant identities one delegation follows at most. Clients have two.
MAX_IDENTITIES = 10

# The content of a leave with its reason takes a few hundred bytes.
MAX_LEAVE_BYTES = 4096

# A participant who does not come up at all is given up after the delay, and after this at most.
MAX_WAIT_MS = 3_600_000

FIRST_LOOK_AGAIN_MS = 1_000

# The delayed event is restarted after a third of its delay, but neither more nor less often.
MIN_RESTART_MS = 1_000
MAX_RESTART_MS = 300_000

# How soon the SFU is asked again after it could not be asked.
LOOK_AGAIN_MS = 2_000

# Some clients join under one identity for a moment, leave, and join again under another one: who
# has been there for less than the first is looked for again after the second.
MOMENT_MS = 2_000
COME_BACK_MS = 1_000

# A leave that is on its way is left to whoever has taken it for so long.
SENDING_MS = 10_000
MAX_SEND_AGAIN_MS = 300_000

# With the pauses above this is a day, after which nobody waits for the leave any more.
MAX_SENDS = 300


class Phase(Enum):
    """How far a delegation has come; when it is done there is none any more."""

    WAITING = "waiting"
    CONNECTED = "connected"
    LEAVING = "leaving"


class Signal(Enum):
    """What happens to a delegation. If the SFU does not answer, nothing does."""

    SEEN = auto()
    """One of its identities is connected: the SFU said so, asked or not."""
    LEFT = auto()
    """The SFU said, unasked, that one of its identities has left, or that the room is gone."""
    ABSENT = auto()
    """The SFU was asked, and none of its identities is connected."""
    ABSENT_AT_POLL = auto()
    """The same, but nobody had a reason to ask."""
    DUE = auto()
    """It is time for the next thing (`Delegation.next_ms`)."""
    NOT_SENT = auto()
    """The leave could not be sent, and the room did not refuse it."""
    OVER = auto()
    """The delayed event is not there any more, or the room took the leave or refused it."""


class Action(Enum):
    """What is to be done."""

    NOTHING = auto()
    ASK = auto()
    """Ask the SFU whether any identity is connected; if it answers, SEEN or ABSENT follows."""
    RESTART = auto()
    """Restart the delayed event; OVER follows if it is not there any more."""
    SEND = auto()
    """Send the leave now; OVER or NOT_SENT follows."""


class Trigger(Enum):
    """What made it clear that a leave must be sent."""

    WEBHOOK = "webhook"
    POLL = "poll"
    GAVE_UP = "gave_up"
    """The participant did not come up at all."""


@attr.s(auto_attribs=True, frozen=True, slots=True, kw_only=True)
class Delegation:
    """What is known of one delegation. All times are milliseconds since the epoch.

    Attributes:
        delay_ms: the delay of the delayed event, in milliseconds.
        taken_ms: when it was taken on.
        several: whether the participant may have more than one identity.
        phase: how far it has come.
        next_ms: when to do the next thing.
        restarted_ms: when the delayed event was restarted last; 0 for never.
        connected_ms: since when it is CONNECTED.
        doubted_ms: since when there is a reason to think that the participant is gone; 0 for none.
        tries: looks, or attempts to send, in a row that did not help.
    """

    delay_ms: int
    taken_ms: int
    several: bool
    phase: Phase = Phase.WAITING
    next_ms: int
    restarted_ms: int = 0
    connected_ms: int = 0
    doubted_ms: int = 0
    tries: int = 0

    @property
    def restart_interval_ms(self) -> int:
        """Milliseconds between two restarts of the delayed event."""
        return max(MIN_RESTART_MS, min(self.delay_ms // 3, MAX_RESTART_MS))

    @property
    def give_up_ms(self) -> int:
        """When to stop waiting for the participant."""
        return self.taken_ms + min(self.delay_ms, MAX_WAIT_MS)


def can_be_delegated(event_type: str, content: Mapping[str, Any]) -> bool:
    """Whether an event may be sent on behalf of its sender: a leave, or what may be one.

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


def delegate(delay_ms: int, several: bool, now_ms: int) -> Delegation:
    """A new delegation. Whoever takes it on asks the SFU at once: those who are connected already
    cause no webhook.
    """
    return Delegation(
        delay_ms=delay_ms,
        taken_ms=now_ms,
        several=several,
        next_ms=now_ms + FIRST_LOOK_AGAIN_MS,
    )


def follow_more(d: Delegation, now_ms: int) -> Delegation:
    """The delegation after it was handed over again, with identities that are new.

    Who is waited for is looked for at once, and as often as at first.
    """
    d = attr.evolve(d, several=True)
    return attr.evolve(d, next_ms=now_ms, tries=0) if d.phase is Phase.WAITING else d


def transition(
    d: Delegation, signal: Signal, now_ms: int, asked_ms: int | None = None
) -> tuple[Delegation | None, Action]:
    """What follows when something happens.

    Args:
        d: the delegation.
        signal: what happens to it.
        now_ms: the time.
        asked_ms: when the SFU was asked, if this is its answer. What it said of the time before
            there was a doubt neither confirms nor clears it.

    Returns:
        The delegation as it is from now on, None when it is done, and what to do.
    """
    if signal is Signal.OVER:
        return None, Action.NOTHING
    if asked_ms is not None and asked_ms < d.doubted_ms:
        return d, Action.NOTHING
    if d.phase is Phase.LEAVING:
        return _leaving(d, signal, now_ms)
    match signal:
        case Signal.SEEN:
            return _seen(d, now_ms)
        case Signal.LEFT if d.phase is Phase.CONNECTED:
            # It says nothing to those who wait: it may be late, and tell of the time before.
            return _doubt(d, now_ms)
        case Signal.ABSENT:
            return _absent(d, now_ms)
        case Signal.ABSENT_AT_POLL if d.phase is Phase.CONNECTED:
            if d.tries == 0:
                return attr.evolve(d, tries=1), Action.NOTHING
            return _doubt(d, now_ms)
        case Signal.DUE:
            return _due(d, now_ms)
    return d, Action.NOTHING


def trigger(d: Delegation) -> Trigger:
    """Why its leave is sent; `d` is the delegation as it was just ahead of that."""
    if d.phase is Phase.WAITING:
        return Trigger.GAVE_UP
    # While somebody is connected only polls that miss them count.
    return Trigger.POLL if d.tries else Trigger.WEBHOOK


def _seen(d: Delegation, now_ms: int) -> tuple[Delegation, Action]:
    if d.phase is Phase.CONNECTED:
        d = attr.evolve(d, doubted_ms=0, tries=0)
        return attr.evolve(d, next_ms=_restart_due_ms(d)), Action.NOTHING
    d = attr.evolve(
        d,
        phase=Phase.CONNECTED,
        connected_ms=now_ms,
        restarted_ms=now_ms,
        tries=0,
    )
    return attr.evolve(d, next_ms=_restart_due_ms(d)), Action.RESTART


def _doubt(d: Delegation, now_ms: int) -> tuple[Delegation, Action]:
    next_ms = min(now_ms + LOOK_AGAIN_MS, _restart_due_ms(d))
    return attr.evolve(d, doubted_ms=now_ms, next_ms=next_ms), Action.ASK


def _absent(d: Delegation, now_ms: int) -> tuple[Delegation, Action]:
    if d.doubted_ms:
        # In between, `_due` asks again.
        come_back_ms = d.doubted_ms + COME_BACK_MS
        if d.several and d.doubted_ms < d.connected_ms + MOMENT_MS and now_ms < come_back_ms:
            next_ms = min(come_back_ms, _restart_due_ms(d))
            return attr.evolve(d, next_ms=next_ms), Action.NOTHING
        return _send(d, now_ms)
    if d.phase is Phase.WAITING and now_ms >= d.give_up_ms:
        return _send(d, now_ms)
    return d, Action.NOTHING


def _send(d: Delegation, now_ms: int) -> tuple[Delegation, Action]:
    d = attr.evolve(d, phase=Phase.LEAVING, next_ms=now_ms + SENDING_MS, doubted_ms=0, tries=0)
    return d, Action.SEND


def _due(d: Delegation, now_ms: int) -> tuple[Delegation, Action]:
    if d.phase is Phase.WAITING:
        pause_ms = min(FIRST_LOOK_AGAIN_MS << min(d.tries + 1, 20), max(1_000, d.delay_ms // 3))
        next_ms = now_ms + pause_ms
        if now_ms < d.give_up_ms:
            next_ms = min(next_ms, d.give_up_ms)
        return attr.evolve(d, next_ms=next_ms, tries=d.tries + 1), Action.ASK
    if now_ms >= _restart_due_ms(d):
        d = attr.evolve(d, restarted_ms=now_ms)
        next_ms = now_ms if d.doubted_ms else _restart_due_ms(d)
        return attr.evolve(d, next_ms=next_ms), Action.RESTART
    if d.doubted_ms:
        next_ms = min(now_ms + LOOK_AGAIN_MS, _restart_due_ms(d))
        return attr.evolve(d, next_ms=next_ms), Action.ASK
    return attr.evolve(d, next_ms=_restart_due_ms(d)), Action.NOTHING


def _restart_due_ms(d: Delegation) -> int:
    return d.restarted_ms + d.restart_interval_ms


def _leaving(d: Delegation, signal: Signal, now_ms: int) -> tuple[Delegation | None, Action]:
    if signal is Signal.NOT_SENT:
        if d.tries >= MAX_SENDS:
            return None, Action.NOTHING
        pause_ms = min(1_000 << min(d.tries, 20), MAX_SEND_AGAIN_MS)
        return attr.evolve(d, next_ms=now_ms + pause_ms, tries=d.tries + 1), Action.NOTHING
    if signal is Signal.DUE:
        return attr.evolve(d, next_ms=now_ms + SENDING_MS), Action.SEND
    return d, Action.NOTHING
