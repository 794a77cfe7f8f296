# SPDX-License-Identifier: Apache-2.0
import pytest
from twisted.internet.task import Clock

from synapse_lk_jwt.livekit.failure_log import LOG_AGAIN_SEC, MAX_FAILURES, FailureLog


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_failure_log_failure_that_lasts_is_due_once(clock: Clock) -> None:
    log = FailureLog(clock)
    assert log.is_due("", "down")
    clock.advance(10 * LOG_AGAIN_SEC)
    assert not log.is_due("", "down")


def test_failure_log_other_failures_are_due_on_their_own(clock: Clock) -> None:
    log = FailureLog(clock)
    assert log.is_due("", "down")
    assert log.is_due("", "timeout")
    assert log.is_due("ListRooms", "down")
    assert not log.is_due("", "down")


def test_failure_log_failure_that_recurs_is_due_once_a_minute(clock: Clock) -> None:
    log = FailureLog(clock)
    assert log.is_due("", "down")
    assert log.end("")
    assert not log.is_due("", "down")
    # The failure was not logged this time, so its end is not logged either.
    assert not log.end("")
    clock.advance(LOG_AGAIN_SEC)
    assert log.is_due("", "down")
    assert log.end("")


def test_failure_log_end_concerns_failures_of_its_scope_only(clock: Clock) -> None:
    log = FailureLog(clock)
    assert not log.end("")
    log.is_due("ListRooms", "internal")
    log.is_due("", "down")
    assert log.end("")
    assert not log.end("")
    assert log.end("ListRooms")


def test_failure_log_many_different_failures_forget_the_oldest(clock: Clock) -> None:
    log = FailureLog(clock)
    for number in range(MAX_FAILURES + 1):
        assert log.is_due("", str(number))
    assert not log.is_due("", "1")
    assert log.is_due("", "0")
