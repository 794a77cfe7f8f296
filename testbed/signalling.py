# SPDX-License-Identifier: Apache-2.0
"""A client that only connects to LiveKit's signalling, as an attacker would."""

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
    """A WebSocket to LiveKit's `/rtc` without media.

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
            url: the URL of the LiveKit server, `ws://…`.
            jwt: a LiveKit access token.
            publish: a percent-encoded string that LiveKit appends to the identity after a `#`.
            attributes: the attributes that the participant sets for itself.
            timeout: seconds to wait for the answer.
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
        """Whether the connection is still open. Reads and drops all data that LiveKit has sent."""
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
        """Close the connection without a close frame."""
        self._socket.close()
