# SPDX-License-Identifier: Apache-2.0
"""What comes from the network is bounded here: in time, in size and in what counts as JSON."""

from collections.abc import Awaitable, Callable, Hashable, Iterable
from functools import partial
from typing import Any, NoReturn, TypeVar

import attr
from synapse.logging.context import (
    PreserveLoggingContext,
    make_deferred_yieldable,
    run_in_background,
)
from synapse.util.json import json_decoder
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import (
    IProtocol,
    IProtocolFactory,
    IReactorTime,
    IStreamClientEndpoint,
)
from twisted.internet.protocol import Protocol, connectionDone
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from twisted.web.client import HTTPConnectionPool, ResponseDone
from twisted.web.http import PotentialDataLoss
from twisted.web.iweb import IResponse
from zope.interface import implementer

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


class BoundedPool(HTTPConnectionPool):
    """Connections over which one answer, headers and all, cannot be larger than allowed.

    Twisted's client limits how long a header is and not how many there are, and reads on for as
    long as the other side sends. Here the connection is closed.
    """

    def __init__(self, reactor: IReactorTime, max_bytes: int) -> None:
        """
        Args:
            reactor: whose time it is.
            max_bytes: the limit; larger than the largest body by as much as headers may take.
        """
        HTTPConnectionPool.__init__(self, reactor)
        # Whether to ask again is for the caller to decide.
        self.retryAutomatically = False
        self._max_bytes = max_bytes

    def getConnection(self, key: Hashable, endpoint: IStreamClientEndpoint) -> "Deferred[Any]":
        return super().getConnection(key, _BoundedEndpoint(endpoint, self._max_bytes))


@implementer(IStreamClientEndpoint)
@attr.s(auto_attribs=True, frozen=True, slots=True)
class _BoundedEndpoint:
    _endpoint: IStreamClientEndpoint
    _max_bytes: int

    def connect(self, factory: IProtocolFactory) -> "Deferred[Any]":
        bounded: WrappingFactory[_BoundedConnection] = WrappingFactory(factory)
        bounded.protocol = partial(_BoundedConnection, max_bytes=self._max_bytes)
        # Else it logs every connection.
        bounded.noisy = False
        connected: Deferred[Any] = self._endpoint.connect(bounded)
        # Twisted's client wants its own protocol.
        return connected.addCallback(lambda connection: connection.wrappedProtocol)


class _BoundedConnection(ProtocolWrapper):
    """Counts from each write on: a client writes a request, and what then comes is the answer."""

    def __init__(self, factory: Any, protocol: IProtocol, max_bytes: int) -> None:
        ProtocolWrapper.__init__(self, factory, protocol)
        self._max_bytes = max_bytes
        self._received = 0

    def write(self, data: bytes) -> None:
        self._received = 0
        ProtocolWrapper.write(self, data)

    def writeSequence(self, data: Iterable[bytes]) -> None:
        self._received = 0
        ProtocolWrapper.writeSequence(self, data)

    def dataReceived(self, data: bytes) -> None:
        self._received += len(data)
        if self._received > self._max_bytes:
            # The orderly way takes the other side's consent under TLS.
            self.abortConnection()
        else:
            ProtocolWrapper.dataReceived(self, data)


def parse_json(body: bytes) -> Any:
    """Decodes JSON as RFC 8259 has it: UTF-8, without NaN and Infinity.

    Raises:
        ValueError: if it is anything else. The message is free of the input.
    """
    try:
        return json_decoder.decode(body.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
