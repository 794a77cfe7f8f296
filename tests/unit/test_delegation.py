# SPDX-License-Identifier: Apache-2.0
"""The state machine of delegations: every signal in every state, and in any order."""

import itertools
from typing import Any

import attr
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synapse_lk_jwt.delegation.state_machine import (
    MAX_RESTART_MS,
    MAX_SEND_ATTEMPTS,
    MAX_WAIT_MS,
    MIN_RESTART_MS,
    REJOIN_GRACE_MS,
    SENDING_MS,
    SHORT_SESSION_MS,
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


def waiting(delay_ms: int = DELAY, has_multiple_identities: bool = False) -> Delegation:
    return delegate(delay_ms, has_multiple_identities, NOW)


def after(*what: Signal, d: Delegation | None = None, at: int = NOW) -> Delegation:
    """A delegation after some signals."""
    d = d or waiting()
    for signal in what:
        following, _ = transition(d, signal, at)
        assert following is not None
        d = following
    return d


CONNECTED = after(Signal.SEEN)
SUSPECTED = after(Signal.SEEN, Signal.LEFT)
LEAVING = after(Signal.SEEN, Signal.LEFT, Signal.ABSENT)
STATES = {
    "waiting": waiting(),
    "connected": CONNECTED,
    "connected, absent at one poll": after(Signal.SEEN, Signal.ABSENT_AT_POLL),
    "connected, suspected": SUSPECTED,
    "leaving": LEAVING,
}
W, C, L = Phase.WAITING, Phase.CONNECTED, Phase.LEAVING
NOTHING, QUERY, RESTART, TAKE, SEND = (
    Action.NOTHING,
    Action.QUERY,
    Action.RESTART,
    Action.TAKE_AND_SEND,
    Action.SEND,
)

# These signals end a delegation in every phase.
ENDED: dict[Signal, tuple[Phase | None, Action]] = dict.fromkeys(
    (Signal.EVENT_GONE, Signal.ALREADY_SENT, Signal.SENT, Signal.REJECTED), (None, NOTHING)
)

# What follows at once, when nothing is due yet.
TABLE: dict[str, dict[Signal, tuple[Phase | None, Action]]] = {
    "waiting": {
        Signal.SEEN: (C, RESTART),
        Signal.LEFT: (W, NOTHING),
        Signal.ABSENT: (W, NOTHING),
        Signal.ABSENT_AT_POLL: (W, NOTHING),
        Signal.DUE: (W, QUERY),
        Signal.SEND_FAILED: (W, NOTHING),
        **ENDED,
    },
    "connected": {
        Signal.SEEN: (C, NOTHING),
        Signal.LEFT: (C, QUERY),
        Signal.ABSENT: (C, NOTHING),
        Signal.ABSENT_AT_POLL: (C, NOTHING),
        Signal.DUE: (C, NOTHING),
        Signal.SEND_FAILED: (C, NOTHING),
        **ENDED,
    },
    "connected, absent at one poll": {
        Signal.SEEN: (C, NOTHING),
        Signal.LEFT: (C, QUERY),
        Signal.ABSENT: (C, NOTHING),
        Signal.ABSENT_AT_POLL: (C, QUERY),
        Signal.DUE: (C, NOTHING),
        Signal.SEND_FAILED: (C, NOTHING),
        **ENDED,
    },
    "connected, suspected": {
        Signal.SEEN: (C, NOTHING),
        Signal.LEFT: (C, QUERY),
        Signal.ABSENT: (L, TAKE),
        Signal.ABSENT_AT_POLL: (C, NOTHING),
        Signal.DUE: (C, QUERY),
        Signal.SEND_FAILED: (C, NOTHING),
        **ENDED,
    },
    "leaving": {
        Signal.SEEN: (L, NOTHING),
        Signal.LEFT: (L, NOTHING),
        Signal.ABSENT: (L, NOTHING),
        Signal.ABSENT_AT_POLL: (L, NOTHING),
        Signal.DUE: (L, SEND),
        Signal.SEND_FAILED: (L, NOTHING),
        **ENDED,
    },
}


@pytest.mark.parametrize(("state", "signal"), list(itertools.product(STATES, Signal)))
def test_transition_of_every_state_and_signal_is_in_the_table(state: str, signal: Signal) -> None:
    following, action = transition(STATES[state], signal, NOW)
    assert (following and following.phase, action) == TABLE[state][signal]


@pytest.mark.parametrize("d", [SUSPECTED, after(Signal.ABSENT_AT_POLL, d=CONNECTED)])
def test_transition_participant_seen_again_clears_the_suspicion(d: Delegation) -> None:
    assert after(Signal.SEEN, d=d) == CONNECTED


@pytest.mark.parametrize("answer", [Signal.SEEN, Signal.ABSENT])
def test_transition_answer_older_than_the_suspicion_changes_nothing(answer: Signal) -> None:
    d = after(Signal.LEFT, d=CONNECTED, at=NOW + 100)
    assert transition(d, answer, NOW + 200, queried_ts=NOW + 99) == (d, NOTHING)


def test_transition_answer_newer_than_the_suspicion_sends() -> None:
    d = after(Signal.LEFT, d=CONNECTED, at=NOW + 100)
    assert transition(d, Signal.ABSENT, NOW + 200, queried_ts=NOW + 101)[1] is TAKE


def test_transition_seen_without_a_query_clears_the_suspicion() -> None:
    d = after(Signal.LEFT, d=CONNECTED, at=NOW + 100)
    following, _ = transition(d, Signal.SEEN, NOW + 200)
    assert following is not None
    assert not following.suspected_gone_ts


def test_transition_absent_at_polls_sends_after_two_in_a_row_and_a_query() -> None:
    d = after(Signal.ABSENT_AT_POLL, Signal.SEEN, Signal.ABSENT_AT_POLL, d=CONNECTED)
    assert transition(d, Signal.ABSENT, NOW)[1] is NOTHING
    d, action = transition(d, Signal.ABSENT_AT_POLL, NOW)  # type: ignore[assignment]
    assert action is QUERY
    assert transition(d, Signal.ABSENT, NOW)[1] is TAKE


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
def test_transition_connected_restarts_after_a_third_of_the_delay(
    delay_ms: int, interval_ms: int
) -> None:
    d = after(Signal.SEEN, d=waiting(delay_ms))
    assert d.due_ts == NOW + interval_ms
    assert transition(d, Signal.DUE, NOW + interval_ms - 1)[1] is NOTHING
    following, action = transition(d, Signal.DUE, NOW + interval_ms)
    assert action is RESTART
    assert following is not None
    assert following.due_ts == NOW + 2 * interval_ms


def test_transition_suspected_without_an_answer_restarts_and_queries_again() -> None:
    d, now, actions = SUSPECTED, NOW, []
    while now < NOW + DELAY:
        now = d.due_ts
        following, action = transition(d, Signal.DUE, now)
        assert following is not None
        assert now - following.restarted_ts <= d.restart_interval_ms
        d = following
        actions.append(action)
    assert actions.count(RESTART) == 3
    assert actions.count(QUERY) >= 8


def test_transition_waiting_queries_less_and_less_often_and_gives_up() -> None:
    d, queries = waiting(60_000), []
    while True:
        now = d.due_ts
        following, action = transition(d, Signal.DUE, now)
        assert action is QUERY
        queries.append(now - NOW)
        following, action = transition(following, Signal.ABSENT, now)  # type: ignore[arg-type]
        assert following is not None
        d = following
        if action is TAKE:
            break
    assert queries == [1_000, 3_000, 7_000, 15_000, 31_000, 51_000, 60_000]


def test_transition_waiting_gives_up_after_an_hour_at_most() -> None:
    d = waiting(86_400_000)
    assert transition(d, Signal.ABSENT, NOW + MAX_WAIT_MS - 1)[1] is NOTHING
    assert transition(d, Signal.ABSENT, NOW + MAX_WAIT_MS)[1] is TAKE


def test_transition_waiting_without_an_answer_does_not_give_up() -> None:
    d, action = transition(waiting(), Signal.DUE, NOW + 10 * DELAY)
    assert action is QUERY
    assert d is not None
    assert d.phase is W


def test_transition_short_session_with_multiple_identities_waits_for_another_one() -> None:
    left_at = NOW + SHORT_SESSION_MS - 1
    connected = after(Signal.SEEN, d=waiting(has_multiple_identities=True))
    d = after(Signal.LEFT, d=connected, at=left_at)
    d, action = transition(d, Signal.ABSENT, left_at)  # type: ignore[assignment]
    assert action is NOTHING
    assert d.due_ts == left_at + REJOIN_GRACE_MS
    assert transition(d, Signal.DUE, d.due_ts)[1] is QUERY
    assert transition(d, Signal.SEEN, d.due_ts)[1] is NOTHING
    assert transition(d, Signal.ABSENT, d.due_ts)[1] is TAKE


@pytest.mark.parametrize(
    ("has_multiple_identities", "left_at"), [(False, NOW), (True, NOW + SHORT_SESSION_MS)]
)
def test_transition_single_identity_or_long_session_has_no_grace_period(
    has_multiple_identities: bool, left_at: int
) -> None:
    d = after(Signal.SEEN, d=waiting(has_multiple_identities=has_multiple_identities))
    d = after(Signal.LEFT, d=d, at=left_at)
    assert transition(d, Signal.ABSENT, left_at)[1] is TAKE


def test_transition_failed_leave_is_retried_with_growing_pauses() -> None:
    d, pauses = LEAVING, []
    assert d.due_ts == NOW + SENDING_MS
    for _ in range(12):
        d = after(Signal.SEND_FAILED, d=d)
        pauses.append(d.due_ts - NOW)
    assert pauses[:4] == [1_000, 2_000, 4_000, 8_000]
    assert pauses[-1] == 300_000


def test_transition_leave_that_failed_too_often_ends_the_delegation() -> None:
    d = attr.evolve(LEAVING, attempts=MAX_SEND_ATTEMPTS)
    assert transition(d, Signal.SEND_FAILED, NOW) == (None, NOTHING)


@settings(max_examples=2_000, deadline=None)
@given(
    delay_ms=st.integers(1, 10 * MAX_WAIT_MS),
    has_multiple_identities=st.booleans(),
    story=st.lists(st.tuples(st.sampled_from(Signal), st.integers(0, 400_000)), max_size=40),
)
def test_transition_any_signals_in_any_order_keep_the_invariants(
    delay_ms: int, has_multiple_identities: bool, story: list[tuple[Signal, int]]
) -> None:
    now = NOW
    d: Delegation | None = delegate(delay_ms, has_multiple_identities, now)
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
            assert signal in ENDED or before.attempts >= MAX_SEND_ATTEMPTS
            break
        if d.phase is C:
            # The event is restarted in time, even if a query is due first.
            assert d.due_ts <= max(now, d.restarted_ts + d.restart_interval_ms)
        # DUE always sets a later time.
        assert d.due_ts > now or signal is not Signal.DUE or action is RESTART
        if before.phase is L:
            assert d.phase is L
            assert action in (NOTHING, SEND)
        elif action is TAKE:
            # Only after a query without the participant, and with a reason for that query.
            assert signal is Signal.ABSENT
            assert reason_to_leave or now >= before.give_up_ts
        else:
            assert action is not SEND
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
    "MSC4143 with a device ID": (
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
    "member without membership": (RTC_MEMBER, {"member": {"id": "member"}, **KEY}),
    "member is no object": (RTC_MEMBER, {"member": "leave"}),
    "mentions": (RTC_MEMBER, {**KEY, "m.mentions": {"room": True}}),
    "text": (RTC_MEMBER, {**KEY, "body": "x"}),
    "slot is no text": (RTC_MEMBER, {"slot_id": {"body": "x"}, **KEY}),
    "sticky key is no text": (RTC_MEMBER, {"sticky_key": 1}),
    "sticky key with NUL": (RTC_MEMBER, {"sticky_key": "a\0"}),
    "sticky key that is no UTF-8": (RTC_MEMBER, {"sticky_key": "\ud800"}),
    "nested reason": (RTC_MEMBER, {"leave_reason": {"m.mentions": {"room": True}}, **KEY}),
    "long reason": (RTC_MEMBER, {"leave_reason": "x" * 4096, **KEY}),
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
    d = attr.evolve(waiting(), attempts=7, due_ts=NOW + 99_000)
    assert follow_more(d, NOW) == attr.evolve(waiting(), has_multiple_identities=True, due_ts=NOW)


def test_follow_more_connected_delegation_keeps_its_times() -> None:
    assert follow_more(CONNECTED, NOW + 5) == attr.evolve(CONNECTED, has_multiple_identities=True)
