# SPDX-License-Identifier: Apache-2.0
"""What follows for a delegated delayed leave, whatever happens to it and in whatever order."""

import itertools
from typing import Any

import attr
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synapse_lk_jwt.delegation.state_machine import (
    COME_BACK_MS,
    MAX_RESTART_MS,
    MAX_SENDS,
    MAX_WAIT_MS,
    MIN_RESTART_MS,
    MOMENT_MS,
    SENDING_MS,
    Action,
    Delegation,
    Phase,
    Signal,
    can_be_delegated,
    delegate,
    follow_more,
    sticky_key,
    transition,
)

NOW = 1_000_000_000
DELAY = 18_000


def waiting(delay_ms: int = DELAY, several: bool = False) -> Delegation:
    return delegate(delay_ms, several, NOW)


def after(*what: Signal, d: Delegation | None = None, at: int = NOW) -> Delegation:
    """A delegation to which all of this has happened."""
    d = d or waiting()
    for signal in what:
        following, _ = transition(d, signal, at)
        assert following is not None
        d = following
    return d


CONNECTED = after(Signal.SEEN)
DOUBTED = after(Signal.SEEN, Signal.LEFT)
LEAVING = after(Signal.SEEN, Signal.LEFT, Signal.ABSENT)
STATES = {
    "waiting": waiting(),
    "connected": CONNECTED,
    "connected, missed once": after(Signal.SEEN, Signal.ABSENT_AT_POLL),
    "connected, doubted": DOUBTED,
    "leaving": LEAVING,
}
W, C, L, OVER = Phase.WAITING, Phase.CONNECTED, Phase.LEAVING, None
NOTHING, ASK, RESTART, SEND = Action.NOTHING, Action.ASK, Action.RESTART, Action.SEND

# What follows at once, when nothing is due yet.
TABLE: dict[str, dict[Signal, tuple[Phase | None, Action]]] = {
    "waiting": {
        Signal.SEEN: (C, RESTART),
        Signal.LEFT: (W, NOTHING),
        Signal.ABSENT: (W, NOTHING),
        Signal.ABSENT_AT_POLL: (W, NOTHING),
        Signal.DUE: (W, ASK),
        Signal.NOT_SENT: (W, NOTHING),
        Signal.OVER: (OVER, NOTHING),
    },
    "connected": {
        Signal.SEEN: (C, NOTHING),
        Signal.LEFT: (C, ASK),
        Signal.ABSENT: (C, NOTHING),
        Signal.ABSENT_AT_POLL: (C, NOTHING),
        Signal.DUE: (C, NOTHING),
        Signal.NOT_SENT: (C, NOTHING),
        Signal.OVER: (OVER, NOTHING),
    },
    "connected, missed once": {
        Signal.SEEN: (C, NOTHING),
        Signal.LEFT: (C, ASK),
        Signal.ABSENT: (C, NOTHING),
        Signal.ABSENT_AT_POLL: (C, ASK),
        Signal.DUE: (C, NOTHING),
        Signal.NOT_SENT: (C, NOTHING),
        Signal.OVER: (OVER, NOTHING),
    },
    "connected, doubted": {
        Signal.SEEN: (C, NOTHING),
        Signal.LEFT: (C, ASK),
        Signal.ABSENT: (L, SEND),
        Signal.ABSENT_AT_POLL: (C, NOTHING),
        Signal.DUE: (C, ASK),
        Signal.NOT_SENT: (C, NOTHING),
        Signal.OVER: (OVER, NOTHING),
    },
    "leaving": {
        Signal.SEEN: (L, NOTHING),
        Signal.LEFT: (L, NOTHING),
        Signal.ABSENT: (L, NOTHING),
        Signal.ABSENT_AT_POLL: (L, NOTHING),
        Signal.DUE: (L, SEND),
        Signal.NOT_SENT: (L, NOTHING),
        Signal.OVER: (OVER, NOTHING),
    },
}


@pytest.mark.parametrize(("state", "signal"), list(itertools.product(STATES, Signal)))
def test_every_state_knows_what_to_do_about_everything(state: str, signal: Signal) -> None:
    following, action = transition(STATES[state], signal, NOW)
    assert (following and following.phase, action) == TABLE[state][signal]


def test_who_is_seen_again_is_not_doubted_any_more() -> None:
    assert after(Signal.SEEN, d=DOUBTED) == CONNECTED
    assert after(Signal.SEEN, d=after(Signal.ABSENT_AT_POLL, d=CONNECTED)) == CONNECTED


def test_an_answer_of_the_time_before_the_doubt_tells_nothing_of_it() -> None:
    d = after(Signal.LEFT, d=CONNECTED, at=NOW + 100)
    for answer in (Signal.SEEN, Signal.ABSENT):
        assert transition(d, answer, NOW + 200, asked_ms=NOW + 99) == (d, NOTHING)
    assert transition(d, Signal.ABSENT, NOW + 200, asked_ms=NOW + 101)[1] is SEND
    # Unasked, it is always news.
    following, _ = transition(d, Signal.SEEN, NOW + 200)
    assert following is not None
    assert not following.doubted_ms


def test_two_polls_in_a_row_and_one_more_look_are_needed() -> None:
    d = after(Signal.ABSENT_AT_POLL, Signal.SEEN, Signal.ABSENT_AT_POLL, d=CONNECTED)
    assert transition(d, Signal.ABSENT, NOW)[1] is NOTHING
    d, action = transition(d, Signal.ABSENT_AT_POLL, NOW)  # type: ignore[assignment]
    assert action is ASK
    assert transition(d, Signal.ABSENT, NOW)[1] is SEND


@pytest.mark.parametrize(
    ("delay_ms", "interval_ms"),
    [
        (100, MIN_RESTART_MS),
        (3_000, MIN_RESTART_MS),
        (18_000, 6_000),
        (3_600_000, MAX_RESTART_MS),
        (86_400_000, MAX_RESTART_MS),
    ],
)
def test_the_event_is_restarted_in_good_time(delay_ms: int, interval_ms: int) -> None:
    d = after(Signal.SEEN, d=waiting(delay_ms))
    assert d.next_ms == NOW + interval_ms
    assert transition(d, Signal.DUE, NOW + interval_ms - 1)[1] is NOTHING
    following, action = transition(d, Signal.DUE, NOW + interval_ms)
    assert action is RESTART
    assert following is not None
    assert following.next_ms == NOW + 2 * interval_ms


def test_while_the_sfu_does_not_answer_the_event_is_kept_alive_and_the_sfu_asked_again() -> None:
    d, now, actions = DOUBTED, NOW, []
    while now < NOW + DELAY:
        now = d.next_ms
        following, action = transition(d, Signal.DUE, now)
        assert following is not None
        assert now - following.restarted_ms <= d.restart_interval_ms
        d = following
        actions.append(action)
    assert actions.count(RESTART) == 3
    assert actions.count(ASK) >= 8


def test_waiting_backs_off_up_to_a_third_of_the_delay_and_ends() -> None:
    d, looks = waiting(60_000), []
    while True:
        now = d.next_ms
        following, action = transition(d, Signal.DUE, now)
        assert action is ASK
        looks.append(now - NOW)
        following, action = transition(following, Signal.ABSENT, now)  # type: ignore[arg-type]
        assert following is not None
        d = following
        if action is SEND:
            break
    assert looks == [1_000, 3_000, 7_000, 15_000, 31_000, 51_000, 60_000]


def test_nobody_is_waited_for_longer_than_an_hour() -> None:
    d = waiting(86_400_000)
    assert transition(d, Signal.ABSENT, NOW + MAX_WAIT_MS - 1)[1] is NOTHING
    assert transition(d, Signal.ABSENT, NOW + MAX_WAIT_MS)[1] is SEND


def test_an_sfu_that_does_not_answer_does_not_end_the_waiting() -> None:
    d, action = transition(waiting(), Signal.DUE, NOW + 10 * DELAY)
    assert action is ASK
    assert d is not None
    assert d.phase is W


def test_who_leaves_after_a_moment_may_come_back_under_another_name() -> None:
    left_at = NOW + MOMENT_MS - 1
    d = after(Signal.LEFT, d=after(Signal.SEEN, d=waiting(several=True)), at=left_at)
    d, action = transition(d, Signal.ABSENT, left_at)  # type: ignore[assignment]
    assert action is NOTHING
    assert d.next_ms == left_at + COME_BACK_MS
    assert transition(d, Signal.DUE, d.next_ms)[1] is ASK
    assert transition(d, Signal.SEEN, d.next_ms)[1] is NOTHING
    assert transition(d, Signal.ABSENT, d.next_ms)[1] is SEND


def test_who_has_one_name_or_was_there_for_longer_than_a_moment_does_not() -> None:
    for several, left_at in ((False, NOW), (True, NOW + MOMENT_MS)):
        d = after(Signal.SEEN, d=waiting(several=several))
        d = after(Signal.LEFT, d=d, at=left_at)
        assert transition(d, Signal.ABSENT, left_at)[1] is SEND


def test_a_leave_is_sent_again_until_the_room_has_answered() -> None:
    d, pauses = LEAVING, []
    assert d.next_ms == NOW + SENDING_MS
    for _ in range(12):
        d = after(Signal.NOT_SENT, d=d)
        pauses.append(d.next_ms - NOW)
    assert pauses[:4] == [1_000, 2_000, 4_000, 8_000]
    assert pauses[-1] == 300_000
    assert transition(attr.evolve(d, tries=MAX_SENDS), Signal.NOT_SENT, NOW)[0] is None


@settings(max_examples=2_000, deadline=None)
@given(
    delay_ms=st.integers(1, 10 * MAX_WAIT_MS),
    several=st.booleans(),
    story=st.lists(st.tuples(st.sampled_from(Signal), st.integers(0, 400_000)), max_size=40),
)
def test_whatever_happens_in_whatever_order(
    delay_ms: int, several: bool, story: list[tuple[Signal, int]]
) -> None:
    now = NOW
    d: Delegation | None = delegate(delay_ms, several, now)
    reason_to_leave = False
    restarted = None
    for signal, pause_ms in story:
        now += pause_ms
        assert d is not None
        before = d
        d, action = transition(d, signal, now)
        if signal in (Signal.LEFT, Signal.ABSENT_AT_POLL):
            reason_to_leave = True
        if signal is Signal.SEEN:
            reason_to_leave = False
        if d is None:
            assert action is NOTHING
            assert signal is Signal.OVER or before.tries >= MAX_SENDS
            break
        if d.phase is C:
            # Whatever else there is to do, the event is restarted in time.
            assert d.next_ms <= max(now, d.restarted_ms + d.restart_interval_ms)
        # Nothing is ever left lying about.
        assert d.next_ms > now or signal is not Signal.DUE or action is RESTART
        if before.phase is L:
            assert d.phase is L
            assert action in (NOTHING, SEND)
        elif action is SEND:
            # Never without a look that found nobody, nor without a reason to look.
            assert signal is Signal.ABSENT
            assert reason_to_leave or now >= before.give_up_ms
        if before.phase is C:
            assert d.phase is not W
        if action is RESTART:
            assert d.phase is C
            if restarted is not None:
                assert now - restarted >= MIN_RESTART_MS
            restarted = now


CALL_MEMBER, RTC_MEMBER = "org.matrix.msc3401.call.member", "org.matrix.msc4143.rtc.member"
KEY = {"msc4354_sticky_key": "member"}
LEFT = {"id": "member", "membership": "leave"}
GENUINE: dict[str, tuple[str, dict[str, Any]]] = {
    "matrix-js-sdk, state": (CALL_MEMBER, {}),
    "matrix-js-sdk 40, sticky": (RTC_MEMBER, KEY),
    "matrix-js-sdk 43, sticky": (RTC_MEMBER, {"slot_id": "m.call#ROOM", **KEY}),
    "MSC4143, state": ("m.rtc.member", {}),
    "MSC3401, stable": ("m.call.member", {"membership": "leave"}),
    "MSC4143": (
        "m.rtc.member",
        {
            "slot_id": "m.call#room",
            "member": LEFT,
            "leave_reason": {"code": "delayed_leave", "reason": "The connection was lost"},
            "sticky_key": "member",
        },
    ),
    "MSC4143 of 2025": (
        "m.rtc.member",
        {"slot_id": "s", "disconnect_reason": {"class": "user", "reason": "x"}, **KEY},
    ),
    "a whiteboard": (
        RTC_MEMBER,
        {"member": {**LEFT, "device_id": "D"}, "leave_reason": {"code": "delayed_leave"}, **KEY},
    ),
    "encrypted": ("m.room.encrypted", {"ciphertext": "…", "algorithm": "m.megolm.v1.aes-sha2"}),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "message": ("m.room.message", {"msgtype": "m.text", "body": "x"}),
    "empty message": ("m.room.message", {}),
    "notification": ("org.matrix.msc4075.rtc.notification", {}),
    "ring": ("org.matrix.msc4075.call.notify", {}),
    "sticker": ("m.sticker", {"body": "x"}),
    "reaction": ("m.reaction", {}),
    "custom": ("org.example", {}),
    "membership of the room": ("m.room.member", {"membership": "leave"}),
    "encryption": ("m.room.encryption", {}),
    "member of the call": (CALL_MEMBER, {"application": "m.call"}),
    "joined": (RTC_MEMBER, {"member": {"id": "member", "membership": "join"}, **KEY}),
    "joined, older": (RTC_MEMBER, {"membership": "join", **KEY}),
    "member without a word on leaving": (RTC_MEMBER, {"member": {"id": "member"}, **KEY}),
    "member is no object": (RTC_MEMBER, {"member": "leave"}),
    "mentions": (RTC_MEMBER, {**KEY, "m.mentions": {"room": True}}),
    "text": (RTC_MEMBER, {**KEY, "body": "x"}),
    "slot is no text": (RTC_MEMBER, {"slot_id": {"body": "x"}, **KEY}),
    "sticky key is no text": (RTC_MEMBER, {"sticky_key": 1}),
    "sticky key with NUL": (RTC_MEMBER, {"sticky_key": "a\0"}),
    "sticky key that is no UTF-8": (RTC_MEMBER, {"sticky_key": "\ud800"}),
    "nested reason": (RTC_MEMBER, {"leave_reason": {"m.mentions": {"room": True}}, **KEY}),
    "endless reason": (RTC_MEMBER, {"leave_reason": "x" * 4096, **KEY}),
}


@pytest.mark.parametrize("leave", GENUINE)
def test_can_be_delegated_genuine_leave_is_accepted(leave: str) -> None:
    assert can_be_delegated(*GENUINE[leave])


@pytest.mark.parametrize("event", REFUSED)
def test_can_be_delegated_anything_else_is_refused(event: str) -> None:
    assert not can_be_delegated(*REFUSED[event])


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({}, None),
        ({"sticky_key": "a"}, "a"),
        ({"msc4354_sticky_key": "b"}, "b"),
        ({"sticky_key": "a", "msc4354_sticky_key": "b"}, "a"),
        ({"sticky_key": 1}, None),
    ],
)
def test_sticky_key_stable_name_comes_first(content: dict[str, Any], key: str | None) -> None:
    assert sticky_key(content) == key


def test_follow_more_waiting_delegation_is_due_at_once_and_often() -> None:
    d = attr.evolve(waiting(), tries=7, next_ms=NOW + 99_000)
    assert follow_more(d, NOW) == attr.evolve(waiting(), several=True, next_ms=NOW)


def test_follow_more_connected_delegation_keeps_its_times() -> None:
    assert follow_more(CONNECTED, NOW + 5) == attr.evolve(CONNECTED, several=True)
