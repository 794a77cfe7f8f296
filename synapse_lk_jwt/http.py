# SPDX-License-Identifier: Apache-2.0
"""What comes from the network is bounded here: in time, in size and in what counts as JSON."""

import json
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

from synapse.logging.context import (
    PreserveLoggingContext,
    make_deferred_yieldable,
    run_in_background,
)
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http import PotentialDataLoss
from twisted.web.iweb import IResponse

T = TypeVar("T")


class TimedOut(Exception):
    """Something took longer than it was given."""


class BodyTooLarge(Exception):
    """The body of a response is larger than was allowed."""


async def within(seconds: float, reactor: IReactorTime, call: Callable[[], Awaitable[T]]) -> T:
    """Awaits `call()`, and cancels it when the time is over.

    Args:
        seconds: how long it may take.
        reactor: whose time it is.
        call: a function that follows Synapse's rules for log contexts.

    Raises:
        TimedOut: if it took longer, whatever the cancelled call made of that.
    """

    def timed_out(_result: Any, _timeout: float) -> NoReturn:
        raise TimedOut()

    deferred: Deferred[T] = run_in_background(call)
    deferred.addTimeout(seconds, reactor, onTimeoutCancel=timed_out)
    return await make_deferred_yieldable(deferred)


async def read_body(response: IResponse, max_bytes: int) -> bytes:
    """Reads the body of a response and keeps no more of it than allowed.

    Cancelling closes the connection, which neither Twisted's nor Synapse's reader does together
    with a limit: an endless body would otherwise go on being received.

    Raises:
        BodyTooLarge: as soon as there are more than `max_bytes`; the connection is closed.
        twisted.web.client.ResponseFailed: if the connection broke.
    """
    reader = _BodyReader(max_bytes)
    response.deliverBody(reader)
    return await make_deferred_yieldable(reader.done)


class _BodyReader(Protocol):
    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._body = bytearray()
        self.done: Deferred[bytes] = Deferred(self._cancel)

    def _cancel(self, _deferred: "Deferred[bytes]") -> None:
        self._abort()

    def _abort(self) -> None:
        # Twisted hands the body over through a proxy that knows the orderly way only. Under TLS
        # that takes the other side's consent, and this is for those who do not stop.
        transport = getattr(self.transport, "_producer", None) or self.transport
        abort = getattr(transport, "abortConnection", None) or getattr(
            transport, "loseConnection", None
        )
        if abort is not None:
            abort()

    def dataReceived(self, data: bytes) -> None:
        if self.done.called:
            return
        if len(self._body) + len(data) > self._max_bytes:
            self._body.clear()
            with PreserveLoggingContext():
                self.done.errback(BodyTooLarge())
            self._abort()
            return
        self._body += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self.done.called:
            return
        with PreserveLoggingContext():
            # Without a length the end of the connection is the end of the body.
            if reason.check(ResponseDone, PotentialDataLoss):
                self.done.callback(bytes(self._body))
            else:
                self.done.errback(reason)


def parse_json(body: bytes) -> Any:
    """Decodes JSON as RFC 8259 has it: UTF-8, without NaN and Infinity.

    Raises:
        ValueError: if it is anything else. The message is free of the input.
    """
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)
