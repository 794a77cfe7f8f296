# SPDX-License-Identifier: Apache-2.0
"""Runs a LiveKit server and reads its rooms."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from livekit import api

from testbed.http import http
from testbed.livekit_program import find_livekit
from testbed.process import Process, free_port


class LiveKit:
    """One LiveKit server; `url` is for clients, `api_url` for its API, `tcp_port` for media."""

    def __init__(
        self,
        directory: Path,
        auto_create: bool = False,
        webhook_urls: Sequence[str] = (),
        key: str = "APIrealparts",
        secret: str = "not-a-secret-at-all-but-long-enough",
        redis_port: int | None = None,
        extra_config: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            directory: for the configuration and the log.
            auto_create: LiveKit's `room.auto_create`: whether any token may start a call.
            webhook_urls: where LiveKit sends its webhooks.
            key: the API key.
            secret: the API secret. LiveKit only starts with at least 32 characters.
            redis_port: the port of a Redis that it shares with other nodes; None for a single node.
            extra_config: top-level keys of its configuration. They replace those that are set here.

        Raises:
            MissingTool: if LiveKit is neither installed nor can be built.
        """
        self.auto_create = auto_create
        self.webhook_urls = list(webhook_urls)
        self.key = key
        self.secret = secret
        self.redis_port = redis_port
        self.extra_config = dict(extra_config or {})
        self.port = free_port()
        self.tcp_port = free_port()
        self._udp_port = free_port()
        self._config = directory / "livekit.json"
        self.process = Process(
            "LiveKit",
            [find_livekit(), "--config", self._config],
            directory / "livekit.log",
            # After a first SIGTERM, LiveKit waits for the last participant to leave.
            grace=1.0,
        )

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Write the current settings and start LiveKit, without waiting for it."""
        self._config.write_text(json.dumps(self._settings(), indent=2))
        self.process.start()

    def _settings(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "port": self.port,
            "bind_addresses": ["127.0.0.1"],
            "keys": {self.key: self.secret},
            "room": {"auto_create": self.auto_create},
            "rtc": {
                "tcp_port": self.tcp_port,
                "udp_port": self._udp_port,
                "node_ip": "127.0.0.1",
                "use_external_ip": False,
                "enable_loopback_candidate": True,
            },
        }
        if self.webhook_urls:
            config["webhook"] = {"api_key": self.key, "urls": self.webhook_urls}
        if self.redis_port is not None:
            config["redis"] = {"address": f"127.0.0.1:{self.redis_port}"}
        return {**config, **self.extra_config}

    def wait_ready(self) -> None:
        """Wait until it answers."""
        self.process.wait_until(self._answers, f"answer from {self.api_url}")

    def stop(self) -> None:
        """Stop LiveKit. `start` uses the same ports again."""
        self.process.stop()

    def restart(self) -> None:
        """Stop LiveKit, start it with the current settings, and wait for it."""
        self.stop()
        self.start()
        self.wait_ready()

    def rooms(self) -> list[dict[str, Any]]:
        """The answer of ListRooms: all LiveKit rooms."""
        rooms = self.ask("ListRooms", {}, api.VideoGrants(room_list=True)).get("rooms", [])
        assert isinstance(rooms, list)
        return rooms

    def participants(self, room: str) -> list[dict[str, Any]]:
        """The answer of ListParticipants: the participants of the LiveKit room `room`."""
        grants = api.VideoGrants(room_admin=True, room=room)
        listed = self.ask("ListParticipants", {"room": room}, grants).get("participants", [])
        assert isinstance(listed, list)
        return listed

    def delete_room(self, room: str) -> None:
        """End the LiveKit room `room`."""
        self.ask("DeleteRoom", {"room": room}, api.VideoGrants(room_create=True))

    def ask(self, method: str, body: dict[str, Any], grants: api.VideoGrants) -> dict[str, Any]:
        """Call a method of LiveKit's RoomService with a token that has exactly these grants."""
        token = (
            api.AccessToken(self.key, self.secret)
            .with_grants(grants)
            .with_ttl(datetime.timedelta(minutes=1))
            .to_jwt()
        )
        answer = http(
            "POST",
            f"{self.api_url}/twirp/livekit.RoomService/{method}",
            body,
            {"Authorization": f"Bearer {token}"},
            timeout=10.0,
        ).ok()
        assert isinstance(answer, dict)
        return answer

    def _answers(self) -> bool:
        try:
            return http("GET", self.api_url, timeout=5.0).status == 200
        except OSError:
            return False
