# SPDX-License-Identifier: Apache-2.0
"""The far ends of connections that Synapse makes on its memory reactor."""

from typing import Any

import attr
from twisted.internet.error import ConnectionLost
from twisted.internet.protocol import connectionDone
from twisted.internet.testing import StringTransportWithDisconnection
from twisted.python.failure import Failure


@attr.s(auto_attribs=True)
class Request:
    """An HTTP request as it came over the wire.

    Attributes:
        line: the request line.
        headers: by lower-case name.
        body: what came behind them.
    """

    line: str
    headers: dict[str, str]
    body: bytes


class Connection:
    """A connection that Synapse asked for; this end of it does what a test says.

    Attributes:
        address: host and port that Synapse connects to.
    """

    def __init__(self, reactor: Any, number: int) -> None:
        host, port, self._factory, *_ = reactor.tcpClients[number]
        self._connector = reactor.connectors[number]
        self.address = (host, port)
        self._transport: Any = StringTransportWithDisconnection()
        self._protocol: Any = None

    def refuse(self, error: Exception) -> None:
        """Ends the attempt to connect."""
        self._factory.clientConnectionFailed(self._connector, Failure(error))

    def accept(self) -> "Connection":
        """Lets Synapse connect."""
        self._protocol = self._factory.buildProtocol(None)
        self._transport.protocol = self._protocol
        self._protocol.makeConnection(self._transport)
        return self

    def request(self) -> Request:
        """The last request that was sent, and all of its body."""
        head, _, body = self._transport.value().partition(b"\r\n\r\n")
        line, *lines = head.decode().split("\r\n")
        headers = dict(header.split(": ", 1) for header in lines)
        headers = {name.lower(): value for name, value in headers.items()}
        assert len(body) == int(headers["content-length"])
        self._transport.clear()
        return Request(line, headers, body)

    def send(self, data: bytes) -> None:
        """Sends bytes to Synapse, unless it has closed the connection."""
        if self.is_open:
            self._protocol.dataReceived(data)

    def respond(self, body: bytes, *headers: str, status: str = "200 OK") -> None:
        """Sends a whole response."""
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
        self.send("\r\n".join(lines).encode() + body)

    def drop(self, *, cleanly: bool = False) -> None:
        """Ends the connection from this side."""
        self._transport.connected = False
        self._protocol.connectionLost(connectionDone if cleanly else Failure(ConnectionLost()))

    @property
    def is_open(self) -> bool:
        """Whether Synapse has not closed the connection."""
        return bool(self._transport.connected)
