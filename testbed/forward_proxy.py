# SPDX-License-Identifier: Apache-2.0
"""A small forward proxy on loopback, for HTTP_PROXY and HTTPS_PROXY."""

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
        status: the status of its answer to every request; None makes it forward the requests.
        password: `user:password` that a request must contain; None accepts every request.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.status: int | None = None
        self.password: str | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    @property
    def url(self) -> str:
        """Its URL, without user and password."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextlib.contextmanager
    def running(self) -> Iterator[ForwardProxy]:
        """Run the proxy, and stop it at the end."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()

    def rejection(self, authorization: str | None) -> int | None:
        """The status that rejects a request, or None to forward it."""
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
                # Each connection serves one request.
                self.close_connection = True
                super().handle_one_request()
                self.close_connection = True

            def log_message(self, *_arguments: object) -> None:
                pass

            def _forward(self) -> None:
                proxy.requests.append(f"{self.command} {self.path}")
                rejection = proxy.rejection(self.headers.get("Proxy-Authorization"))
                if rejection is not None:
                    self.send_error(rejection)
                    return
                parts = urlsplit(self.path)
                path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                lines = [f"{self.command} {path} HTTP/1.1", "Connection: close"]
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "proxy-authorization"):
                        lines.append(f"{name}: {value}")
                head = "\r\n".join((*lines, "", "")).encode("latin-1")
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self._relay((parts.hostname or "", parts.port or 80), head + body)

            do_GET = do_POST = do_PUT = do_DELETE = do_OPTIONS = _forward  # noqa: N815

            def do_CONNECT(self) -> None:
                proxy.requests.append(f"CONNECT {self.path}")
                rejection = proxy.rejection(self.headers.get("Proxy-Authorization"))
                if rejection is not None:
                    self.send_error(rejection)
                    return
                host, _, port = self.path.rpartition(":")
                self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                self._relay((host, int(port)), b"")

            def _relay(self, address: tuple[str, int], first: bytes) -> None:
                """Forward data in both directions until one side closes its connection."""
                try:
                    other = socket.create_connection(address, _SECONDS)
                except OSError:
                    self.send_error(503)
                    return
                with other:
                    other.sendall(first)
                    # `select.select` fails in a process that has more than 1,024 files open.
                    with selectors.DefaultSelector() as sockets:
                        sockets.register(self.connection, selectors.EVENT_READ, other)
                        sockets.register(other, selectors.EVENT_READ, self.connection)
                        while readable := sockets.select(_SECONDS):
                            for source, _ in readable:
                                data = cast(socket.socket, source.fileobj).recv(65536)
                                if not data:
                                    return
                                source.data.sendall(data)

        return Handler
