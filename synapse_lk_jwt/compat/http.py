# SPDX-License-Identifier: Apache-2.0
"""Bounds on requests to other servers: on their time, and on the size of their responses."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

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
    """A call took longer than its limit."""


class BodyTooLarge(Exception):
    """The body of a response is larger than was allowed."""


# The exceptions of a request to another server that the network, DNS, the server or the admin's
# configuration cause. Any other exception is a programming error.
NETWORK_ERRORS = (
    TimedOut,
    BodyTooLarge,
    FederationDeniedError,
    # Sockets raise this. DNSLookupError is a subclass.
    OSError,
    # DNS raises these. The latter is not the built-in exception of that name.
    ResolverError,
    defer.TimeoutError,
    ConnectError,
    ConnectionClosed,
    TlsError,
    RequestTransmissionFailed,
    # Twisted's HTTP parser also raises this for a response that is not HTTP.
    ResponseFailed,
    PotentialDataLoss,
    # Synapse's client raises this for a connection that fails, or ends without a response.
    RequestTimedOutError,
)


async def within(seconds: float, clock: Clock, call: Callable[[], Awaitable[T]]) -> T:
    """Awaits `call()`, and cancels it when the time limit has passed.

    Args:
        seconds: how long it may take.
        clock: Synapse's clock.
        call: a function that follows Synapse's rules for log contexts.

    Raises:
        TimedOut: if it took longer. This does not depend on what the cancelled call raised.
    """
    deadline = clock.time() + seconds
    deferred: Deferred[T] = run_in_background(call)
    try:
        return await make_deferred_yieldable(
            timeout_deferred(deferred=deferred, timeout=seconds, clock=clock)
        )
    except Exception:
        # A cancelled call can raise CancelledError or any other exception.
        if clock.time() >= deadline:
            raise TimedOut() from None
        raise


async def read_body(response: IResponse, max_bytes: int) -> bytes:
    """Reads the body of a response, up to a limit.

    Raises:
        BodyTooLarge: as soon as more than `max_bytes` were received; the connection is closed.
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
    """Passes the body of a response to a function, piece by piece.

    Cancelling closes the connection. The readers of Twisted and Synapse have no limit that does so,
    and would read an endless body forever.

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
        # Twisted's transport for bodies can only close a connection in order, which under TLS needs
        # an answer of the other side. A hostile server sends none, so this aborts the connection
        # below.
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
            # Twisted would log any exception and continue. The caller of `stream_body` gets it
            # instead.
            with PreserveLoggingContext():
                self.done.errback(Failure())
            self._abort()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self.done.called:
            return
        with PreserveLoggingContext():
            # Without a Content-Length, the end of the connection is the end of the body.
            if reason.check(ResponseDone, PotentialDataLoss):
                self.done.callback(None)
            else:
                self.done.errback(reason)
