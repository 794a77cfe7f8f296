# SPDX-License-Identifier: Apache-2.0
"""The bounds on what comes from the network."""

from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IProtocolFactory, IStreamClientEndpoint
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.web.client import Agent, ResponseFailed
from twisted.web.iweb import IAgentEndpointFactory, IResponse
from zope.interface import implementer

from synapse_lk_jwt.http import BoundedPool

LIMIT = 1000


@implementer(IAgentEndpointFactory, IStreamClientEndpoint)
class Server:
    """Takes connections and says what it is told to say."""

    def __init__(self) -> None:
        self.connections: list[Any] = []
        self.agent = Agent.usingEndpointFactory(
            Clock(),
            self,
            BoundedPool(Clock(), LIMIT),
        )

    def endpointForURI(self, uri: Any) -> "Server":
        return self

    def connect(self, factory: IProtocolFactory) -> "Deferred[Any]":
        protocol = factory.buildProtocol(None)  # type: ignore[arg-type]
        assert protocol is not None
        protocol.makeConnection(StringTransport())
        self.connections.append(protocol)
        return succeed(protocol)

    def get(self) -> list[Any]:
        """Makes a request, and returns what became of it so far."""
        seen: list[Any] = []
        asked: Deferred[IResponse] = self.agent.request(b"GET", b"https://example.com/")
        asked.addBoth(seen.append)
        return seen


def answer(size: int) -> bytes:
    head, tail = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nA: ", b"\r\n\r\n"
    return head + b"a" * (size - len(head) - len(tail)) + tail


def test_each_answer_may_be_as_large_as_allowed() -> None:
    server = Server()
    for _ in range(3):
        seen = server.get()
        (connection,) = server.connections
        connection.dataReceived(answer(LIMIT))
        assert seen[0].code == 200


def test_the_connection_is_closed_on_a_larger_one() -> None:
    for larger in (answer(LIMIT + 1), b"HTTP/1.1 100 Continue\r\n\r\n" * LIMIT):
        server = Server()
        seen = server.get()
        (connection,) = server.connections
        for byte in larger:
            connection.dataReceived(bytes([byte]))
            if connection.transport.disconnected:
                break
        assert connection.transport.disconnected
        assert not seen or seen[0].check(ResponseFailed)
