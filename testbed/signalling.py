# SPDX-License-Identifier: Apache-2.0
"""A client that connects to LiveKit's signalling and does nothing there, as only attackers do."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import selectors
import socket
from collections.abc import Mapping
from urllib.parse import urlencode, urlsplit


class Signalling:
    """A WebSocket to LiveKit's `/rtc` that brings up no media.

    Attributes:
        status: LiveKit's HTTP status; 101 if the participant is in the room.
    """

    def __init__(
        self,
        url: str,
        jwt: str,
        publish: str = "",
        attributes: Mapping[str, str] | None = None,
        timeout: float = 10.0,
    ) -> None:
        """
        Args:
            url: of the LiveKit server, `ws://…`.
            jwt: a LiveKit access token.
            publish: percent-encoded; LiveKit appends it to the identity, behind a `#`.
            attributes: what the participant sets of its own attributes, if it may.
            timeout: for the answer, in seconds.
        """
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        query = {"access_token": jwt, "protocol": "15", "auto_subscribe": "1"}
        if attributes is not None:
            data = json.dumps(attributes).encode()
            query["attributes"] = base64.urlsafe_b64encode(data).decode()
        path = f"/rtc?{urlencode(query)}"
        if publish:
            path += f"&publish={publish}"
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket = socket.create_connection((parts.hostname, parts.port), timeout)
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: Upgrade\r\n"
            f"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
            "\r\n".encode("ascii")
        )
        head = self._socket.recv(64)
        self.status = int(head.split()[1]) if head.count(b" ") else 0

    @property
    def is_open(self) -> bool:
        """Whether LiveKit has kept the connection. Reads away what LiveKit has sent."""
        with contextlib.suppress(OSError):
            with selectors.DefaultSelector() as ready:
                ready.register(self._socket, selectors.EVENT_READ)
                while ready.select(0):
                    data = self._socket.recv(65536)
                    # A close frame begins with 0x88.
                    if not data or data[:1] == b"\x88":
                        return False
            return True
        return False

    def close(self) -> None:
        """Break the connection off."""
        self._socket.close()
