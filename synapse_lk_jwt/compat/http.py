# SPDX-License-Identifier: Apache-2.0
"""What comes from the network is bounded here: in time, in size and in what counts as JSON."""

from collections.abc import Awaitable, Callable
from reprlib import Repr
from typing import Any, TypeVar

from OpenSSL.SSL import Error as TlsError
from synapse.api.errors import FederationDeniedError
from synapse.http import RequestTimedOutError
from synapse.logging.context import (
    PreserveLoggingContext,
    make_deferred_yieldable,
    run_in_background,
)
from synapse.util.async_helpers import timeout_deferred
from synapse.util.clock import Clock
from synapse.util.json import json_decoder
from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectError, ConnectionClosed
from twisted.internet.protocol import Protocol, connectionDone
from twisted.names.error import ResolverError
from twisted.python.failure import Failure
from twisted.web.client import RequestTransmissionFailed, ResponseDone, ResponseFailed
from twisted.web.http import PotentialDataLoss
from twisted.web.iweb import IResponse

T = TypeVar("T")


class TimedOut(Exception):
    """Something took longer than it was given."""


class BodyTooLarge(Exception):
    """The body of a response is larger than was allowed."""


# What a request to another server can fail with because of the network, of DNS, of what answers
# there, or because the admin does not allow it. Everything else is a programming error.
NETWORK_ERRORS = (
    TimedOut,
    BodyTooLarge,
    FederationDeniedError,
    # Of sockets. DNSLookupError is one.
    OSError,
    # Of DNS. The latter is not the built-in exception of that name.
    ResolverError,
    defer.TimeoutError,
    ConnectError,
    ConnectionClosed,
    TlsError,
    RequestTransmissionFailed,
    # Also what Twisted's HTTP parser makes of an answer that is not HTTP.
    ResponseFailed,
    PotentialDataLoss,
    # What Synapse's client makes of a connection that ends, or cannot be made, without an answer.
    RequestTimedOutError,
)

_MAX_REPR = 300

_bounded = Repr()
_bounded.maxstring = _bounded.maxother = 200
_bounded.maxlevel = 2


def bounded_repr(value: object) -> str:
    """What another server or a participant sent, fit for a line of the log: escaped and short."""
    return _bounded.repr(value)[:_MAX_REPR]


async def within(seconds: float, clock: Clock, call: Callable[[], Awaitable[T]]) -> T:
    """Awaits `call()`, and cancels it when the time is over.

    Args:
        seconds: how long it may take.
        clock: Synapse's clock.
        call: a function that follows Synapse's rules for log contexts.

    Raises:
        TimedOut: if it took longer, whatever the cancelled call made of that.
    """
    deadline = clock.time() + seconds
    deferred: Deferred[T] = run_in_background(call)
    try:
        return await make_deferred_yieldable(
            timeout_deferred(deferred=deferred, timeout=seconds, clock=clock)
        )
    except Exception:
        # Whether cancelling is a CancelledError or something else is up to the cancelled call.
        if clock.time() >= deadline:
            raise TimedOut() from None
        raise


async def read_body(response: IResponse, max_bytes: int) -> bytes:
    """Reads the body of a response and keeps no more of it than allowed.

    Raises:
        BodyTooLarge: as soon as there are more than `max_bytes`; the connection is closed.
        twisted.web.client.ResponseFailed: if the connection broke.
    """
    body = bytearray()

    def keep(data: bytes) -> None:
        if len(body) + len(data) > max_bytes:
            raise BodyTooLarge()
        body.extend(data)

    await stream_body(response, keep)
    return bytes(body)


async def stream_body(response: IResponse, receive: Callable[[bytes], None]) -> None:
    """Hands over the body of a response piece by piece.

    Cancelling closes the connection, which neither Twisted's nor Synapse's reader does together
    with a limit: an endless body would otherwise go on being received.

    Args:
        response: the response, its body unread.
        receive: called with each piece. What it raises ends the connection, and is raised here.

    Raises:
        twisted.web.client.ResponseFailed: if the connection broke.
    """
    reader = _BodyReader(receive)
    response.deliverBody(reader)
    await make_deferred_yieldable(reader.done)


class _BodyReader(Protocol):
    def __init__(self, receive: Callable[[bytes], None]) -> None:
        self._receive = receive
        self.done: Deferred[None] = Deferred(self._cancel)

    def _cancel(self, _deferred: "Deferred[None]") -> None:
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
        try:
            self._receive(data)
        except Exception:
            # Twisted would log it and go on. The caller of `stream_body` gets it instead.
            with PreserveLoggingContext():
                self.done.errback(Failure())
            self._abort()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self.done.called:
            return
        with PreserveLoggingContext():
            # Without a length the end of the connection is the end of the body.
            if reason.check(ResponseDone, PotentialDataLoss):
                self.done.callback(None)
            else:
                self.done.errback(reason)


def parse_json(body: bytes) -> Any:
    """Decodes JSON as RFC 8259 has it: UTF-8, without NaN and Infinity.

    Raises:
        ValueError: if it is anything else. The message is free of the input.
    """
    try:
        return json_decoder.decode(body.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
