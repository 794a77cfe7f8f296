# SPDX-License-Identifier: Apache-2.0
"""Runs the stub SFU, and creates HTTP requests for all benchmarks."""

import json
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from testbed import service
from testbed.http import http
from testbed.matrix import User
from testbed.process import Process, free_port
from testbed.service import PREFIX
from testbed.synapse import Synapse

URL = "wss://sfu.example.com"
KEY = "APIkey"
SECRET = "s" * 32
RATE_OFF = {"per_second": 1_000_000, "burst_count": 1_000_000}


class StubSfu:
    """`benchmarks/stub_sfu.py` in its own process."""

    def __init__(self, directory: Path, delay_ms: int = 0, port: int | None = None) -> None:
        """
        Args:
            directory: for its log.
            delay_ms: how long CreateRoom takes, in milliseconds.
            port: its port; None for any free port.
        """
        self.port = port or free_port()
        self.api_url = f"http://127.0.0.1:{self.port}"
        self.process = Process(
            "stub SFU",
            [sys.executable, "-m", "benchmarks.stub_sfu", str(self.port), str(delay_ms)],
            directory / "sfu.log",
        )

    def start(self) -> None:
        """Starts the stub, and waits until it answers."""
        self.process.start()
        self.process.wait_until(self._answers, "stub SFU")

    def stop(self) -> None:
        """Stops the stub."""
        self.process.stop()

    def get(self, path: str) -> Any:
        """Reads what the stub has recorded."""
        return http("GET", self.api_url + path).ok()

    def put(self, path: str, body: Any) -> None:
        """Changes the stub's participants or behaviour."""
        http("PUT", self.api_url + path, body).ok()

    def hang(self, rooms: Collection[str] | None = None) -> None:
        """Leaves requests about these rooms, or all rooms, unanswered. An empty list ends that."""
        self.put("/hang", {"rooms": None if rooms is None else list(rooms)})

    def delay(self, **methods: int) -> None:
        """Delays the answers of methods by a number of milliseconds."""
        self.put("/delay", methods)

    def in_flight(self) -> tuple[int, int]:
        """The number of unanswered requests, and the highest one since the last call."""
        now, most = self.get("/flight")
        return now, most

    def _answers(self) -> bool:
        try:
            return http("GET", f"{self.api_url}/count").status == 200
        except OSError:
            return False


def http_request(
    method: str, path: str, body: bytes | None = None, authorization: str | None = None
) -> bytes:
    """A whole HTTP request with a JSON body."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n"
    if authorization is not None:
        head += f"Authorization: {authorization}\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + (body or b"")


def as_json(body: Any) -> bytes:
    """A body for `http_request`."""
    return json.dumps(body).encode("ascii")


class Tokens:
    """Token requests, each with its own new OpenID token.

    Attributes:
        users: the users who take turns. They are joined to the room.
        room_id: the Matrix room.
    """

    def __init__(self, synapse: Synapse, users: Sequence[User], room_id: str) -> None:
        self._synapse = synapse
        self.users = users
        self.room_id = room_id
        self._made = 0

    def openid(self, count: int) -> Iterator[tuple[User, dict[str, str]]]:
        """New OpenID tokens, written to the database, with their users."""
        numbers = range(self._made, self._made + count)
        self._made += count
        tokens = [(self.users[n % len(self.users)], f"token{n:018}") for n in numbers]
        self._synapse.insert(
            "open_id_tokens",
            [
                {"token": token, "ts_valid_until_ms": 2**52, "user_id": user.user_id}
                for user, token in tokens
            ],
        )
        for user, token in tokens:
            name = self._synapse.server_name
            yield user, {"access_token": token, "matrix_server_name": name}

    def sfu_get(self, count: int) -> list[bytes]:
        """Requests to `/sfu/get`."""
        return [
            _post("/sfu/get", service.sfu_get_body(user, self.room_id, openid_token=token))
            for user, token in self.openid(count)
        ]

    def get_token(self, count: int) -> list[bytes]:
        """Requests to the service's `/get_token`."""
        return [
            _post("/get_token", service.get_token_body(user, self.room_id, openid_token=token))
            for user, token in self.openid(count)
        ]

    def client_get_token(self, count: int) -> list[bytes]:
        """Requests to MSC4195's client-server `get_token`, which need no OpenID token."""
        path = "/_matrix/client/v1/rtc/livekit/get_token"
        requests = [
            http_request(
                "POST",
                path,
                as_json(service.homeserver_body(user, self.room_id, URL)),
                f"Bearer {user.access_token}",
            )
            for user in self.users
        ]
        return [requests[number % len(requests)] for number in range(count)]


def _post(endpoint: str, body: Any) -> bytes:
    return http_request("POST", PREFIX + endpoint, as_json(body))


def port(client_url: str) -> int:
    """The port of a URL."""
    return int(client_url.rpartition(":")[2])


def module_config(sfu: StubSfu, poll_sec: int) -> dict[str, Any]:
    """The module's configuration for the stub SFU."""
    return {
        "livekit_url": URL,
        "livekit_internal_url": sfu.api_url,
        "livekit_key": KEY,
        "livekit_secret": SECRET,
        "sanity_check_interval": f"{poll_sec}s",
        "rc_token": RATE_OFF,
        "rc_openid": RATE_OFF,
    }
