# SPDX-License-Identifier: Apache-2.0
"""A small forward proxy on loopback, as an admin names one in HTTP_PROXY."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from base64 import b64encode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast
from urllib.parse import urlsplit

_SECONDS = 10.0


class ForwardProxy:
    """A proxy for requests with whole URLs, and for tunnels (CONNECT).

    Attributes:
        requests: method and URL, or method and host with port, of each request so far.
        status: what it answers to every request instead of forwarding it; None to forward.
        password: a user and a password, as `user:password`, that a request must bring, if any.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.status: int | None = None
        self.password: str | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    @property
    def url(self) -> str:
        """Its address, without user and password."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextlib.contextmanager
    def running(self) -> Iterator[ForwardProxy]:
        """It is up, and afterwards gone."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()

    def refusal(self, authorization: str | None) -> int | None:
        """The status to answer a request with instead of forwarding it."""
        if self.password is not None:
            wanted = f"Basic {b64encode(self.password.encode()).decode()}"
            if authorization != wanted:
                return 407
        return self.status

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            timeout = _SECONDS

            def handle_one_request(self) -> None:
                # One request for each connection is enough here.
                self.close_connection = True
                super().handle_one_request()
                self.close_connection = True

            def log_message(self, *_arguments: object) -> None:
                pass

            def _forward(self) -> None:
                proxy.requests.append(f"{self.command} {self.path}")
                refusal = proxy.refusal(self.headers.get("Proxy-Authorization"))
                if refusal is not None:
                    self.send_error(refusal)
                    return
                parts = urlsplit(self.path)
                path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                lines = [f"{self.command} {path} HTTP/1.1", "Connection: close"]
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "proxy-authorization"):
                        lines.append(f"{name}: {value}")
                head = "\r\n".join((*lines, "", "")).encode("latin-1")
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self._pass_on((parts.hostname or "", parts.port or 80), head + body)

            do_GET = do_POST = do_PUT = do_DELETE = do_OPTIONS = _forward  # noqa: N815

            def do_CONNECT(self) -> None:
                proxy.requests.append(f"CONNECT {self.path}")
                refusal = proxy.refusal(self.headers.get("Proxy-Authorization"))
                if refusal is not None:
                    self.send_error(refusal)
                    return
                host, _, port = self.path.rpartition(":")
                self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                self._pass_on((host, int(port)), b"")

            def _pass_on(self, address: tuple[str, int], first: bytes) -> None:
                """Send both ways whatever comes, until one side ends it."""
                try:
                    other = socket.create_connection(address, _SECONDS)
                except OSError:
                    self.send_error(503)
                    return
                with other:
                    other.sendall(first)
                    # `select.select` fails in a process that has more than 1,024 files open.
                    with selectors.DefaultSelector() as ways:
                        ways.register(self.connection, selectors.EVENT_READ, other)
                        ways.register(other, selectors.EVENT_READ, self.connection)
                        while readable := ways.select(_SECONDS):
                            for source, _ in readable:
                                data = cast(socket.socket, source.fileobj).recv(65536)
                                if not data:
                                    return
                                source.data.sendall(data)

        return Handler
