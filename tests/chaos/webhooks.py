# SPDX-License-Identifier: Apache-2.0
"""A relay between LiveKit and Synapse that loses, repeats and delays webhooks."""

from __future__ import annotations

import random
import threading
from collections import Counter
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from testbed.http import http
from testbed.process import free_port

MAX_DELAY_SEC = 3.0
WHAT = {"passed": 0.7, "lost": 0.1, "delayed": 0.1, "repeated": 0.1}


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        # A LiveKit that is killed aborts its requests.
        pass


class LossyWebhooks:
    """Receives webhooks at `url` and forwards most of them."""

    def __init__(self, target: str, seed: str) -> None:
        """
        Args:
            target: the URL that they are forwarded to.
            seed: decides which webhooks are lost, delayed or repeated.
        """
        self.counts: Counter[str] = Counter()
        self.is_faithful = False
        self._target = target
        self._random = random.Random(seed)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/"
        play = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = play._take(body, self.headers["Authorization"] or "")
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = _Server(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Stops receiving webhooks."""
        self._server.shutdown()
        self._server.server_close()

    def _take(self, body: bytes, authorization: str) -> int:
        (what,) = self._random.choices(list(WHAT), list(WHAT.values()))
        if self.is_faithful:
            what = "passed"
        self.counts[what] += 1
        if what == "lost":
            return 200
        if what in ("delayed", "repeated"):
            delay_sec = self._random.uniform(0, MAX_DELAY_SEC)
            timer = threading.Timer(delay_sec, self._forward, [body, authorization])
            timer.daemon = True
            timer.start()
        return 200 if what == "delayed" else self._forward(body, authorization)

    def _forward(self, body: bytes, authorization: str) -> int:
        headers = {
            "Authorization": authorization,
            "Content-Type": "application/webhook+json",
        }
        try:
            return http("POST", self._target, body, headers, timeout=10).status
        except (OSError, HTTPException):
            # LiveKit sends a webhook again after a 503.
            self.counts["rejected"] += 1
            return 503
