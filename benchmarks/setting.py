# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks run beside: a stub SFU, and requests made by hand."""

import json
import sys
from pathlib import Path
from typing import Any

from realparts.http import http
from realparts.process import Process, free_port

URL = "wss://sfu.example.com"
KEY = "APIkey"
SECRET = "s" * 32
RATE_OFF = {"per_second": 1_000_000, "burst_count": 1_000_000}


class StubSfu:
    """`benchmarks/stub_sfu.py` in a process of its own."""

    def __init__(self, directory: Path, delay_ms: int = 0, port: int | None = None) -> None:
        """
        Args:
            directory: for its log.
            delay_ms: how long it takes to make a room.
            port: by default any.
        """
        self.port = port or free_port()
        self.api_url = f"http://127.0.0.1:{self.port}"
        self.process = Process(
            "stub SFU",
            [sys.executable, "-m", "benchmarks.stub_sfu", str(self.port), str(delay_ms)],
            directory / "sfu.log",
        )

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        self.process.start()
        self.process.wait_until(self._answers, "stub SFU")

    def stop(self) -> None:
        """Ends it."""
        self.process.stop()

    def get(self, path: str) -> Any:
        """What it has noted."""
        return http("GET", self.api_url + path).ok()

    def put(self, path: str, told: Any) -> None:
        """Tells it who is there."""
        http("PUT", self.api_url + path, told).ok()

    def _answers(self) -> bool:
        try:
            return http("GET", f"{self.api_url}/count").status == 200
        except OSError:
            return False


def http_request(
    method: str, path: str, body: bytes | None = None, authorization: str | None = None
) -> bytes:
    """A whole HTTP request; the body is JSON."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n"
    if authorization is not None:
        head += f"Authorization: {authorization}\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + (body or b"")


def as_json(body: Any) -> bytes:
    """A body for `http_request`."""
    return json.dumps(body).encode("ascii")
