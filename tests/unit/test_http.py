# SPDX-License-Identifier: Apache-2.0
"""Time limits of requests."""

from typing import Any

import pytest
from synapse.util.clock import Clock
from twisted.internet.defer import Deferred, ensureDeferred, succeed
from twisted.internet.task import Clock as Time

from synapse_lk_jwt.compat.http import TimedOut, within


class Reactor(Time):
    """The part of a reactor that Synapse's clock uses."""

    def addSystemEventTrigger(self, *_args: Any) -> None:
        pass


@pytest.fixture
def reactor() -> Reactor:
    return Reactor()


def outcome(reactor: Any, call: Any) -> list[Any]:
    """A list for the result or failure of a call with ten seconds of time, filled when it ends."""
    seen: list[Any] = []
    clock = Clock(reactor, server_name="test")
    ensureDeferred(within(10, clock, call)).addBoth(seen.append)
    return seen


def cancelled_with(error: Exception) -> "Deferred[None]":
    return Deferred(lambda deferred: deferred.errback(error))


def broken_canceller() -> "Deferred[None]":
    def fail(_deferred: Any) -> None:
        raise IndexError()

    return Deferred(fail)


@pytest.mark.parametrize(
    "make",
    [Deferred, lambda: cancelled_with(IndexError()), broken_canceller],
    ids=["cancelled", "cancelled with another error", "canceller raises"],
)
def test_within_after_its_time_cancels_the_call_and_raises_timed_out(
    reactor: Any, make: Any
) -> None:
    seen = outcome(reactor, make)
    reactor.advance(9.9)
    assert seen == []
    reactor.advance(0.2)
    (failure,) = seen
    assert failure.type is TimedOut


def test_within_with_a_call_that_succeeds_returns_its_result(reactor: Any) -> None:
    assert outcome(reactor, lambda: succeed(1)) == [1]


def test_within_with_a_call_that_fails_in_time_raises_its_error(reactor: Any) -> None:
    waiting: Deferred[None] = Deferred()
    seen = outcome(reactor, lambda: waiting)
    waiting.errback(IndexError())
    (failure,) = seen
    assert failure.type is IndexError
