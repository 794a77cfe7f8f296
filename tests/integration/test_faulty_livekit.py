# SPDX-License-Identifier: Apache-2.0
"""LiveKit loses rooms, cannot deliver webhooks, and sends a wrong `room_finished`."""

import asyncio
import datetime
import hashlib
import itertools
import json
import threading
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from livekit import api

from testbed import service
from testbed.call import Participant
from testbed.http import http
from testbed.livekit import LiveKit
from testbed.matrix import User
from testbed.member import POWER_LEVELS, enter
from testbed.process import free_port, until
from testbed.sets import module_config, running
from testbed.synapse import Synapse

HOUR_MS = 3_600_000
REFUSED_SEC = 30

number = itertools.count()


class Relay:
    """Forwards webhooks to Synapse, or rejects them with a 503."""

    def __init__(self) -> None:
        self.target = ""
        self.is_refusing = False
        self.refused = 0
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/"
        relay = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(relay.forward(body, self.headers["Authorization"] or ""))
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def forward(self, body: bytes, authorization: str) -> int:
        if self.is_refusing:
            self.refused += 1
            return 503
        return http("POST", self.target, body, {"Authorization": authorization}).status

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass(frozen=True)
class Set:
    synapse: Synapse
    livekit: LiveKit
    relay: Relay

    def user(self) -> User:
        return self.synapse.register(f"user{next(number)}")

    def room(self, *users: User) -> str:
        room_id = users[0].create_room(power_levels=POWER_LEVELS, preset="public_chat")
        for user in users[1:]:
            user.join(room_id)
        return room_id

    def post_webhook(self, event: dict[str, object]) -> int:
        """Sends a webhook with LiveKit's signature."""
        body = json.dumps(event).encode()
        token = (
            api.AccessToken(self.livekit.key, self.livekit.secret)
            .with_sha256(b64encode(hashlib.sha256(body).digest()).decode())
            .with_ttl(datetime.timedelta(minutes=5))
            .to_jwt()
        )
        return http("POST", self.relay.target, body, {"Authorization": token}).status


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Set]:
    directory = tmp_path_factory.mktemp("faults")
    livekit = LiveKit(directory)
    # The default interval between polls. Effects of webhooks are much faster.
    synapse = Synapse("f", directory, module_config(livekit))
    relay = Relay()
    relay.target = synapse.client_url + service.PREFIX + "/sfu_webhook"
    livekit.webhook_urls.append(relay.url)
    with running(livekit, synapse):
        yield Set(synapse, livekit, relay)
    relay.stop()
    assert "Traceback" not in synapse.log_text()


def test_room_finished_in_error_sends_no_leave_and_a_kick_still_works(servers: Set) -> None:
    alice, bob = servers.user(), servers.user()
    room_id = servers.room(alice, bob)

    async def test() -> None:
        members = [await enter(user, room_id, servers.livekit, HOUR_MS) for user in (alice, bob)]
        # The module does not forget a room that it created a moment ago.
        await asyncio.sleep(11)
        asked = servers.synapse.log_text().count("GetParticipant: 200")
        room = members[0].livekit_room
        assert servers.post_webhook({"event": "room_finished", "room": {"name": room}}) == 200
        await until(
            lambda: servers.synapse.log_text().count("GetParticipant: 200") >= asked + 2, "answers"
        )
        assert all(member.is_in_room(alice) for member in members)
        assert len(alice.delayed()) == len(bob.delayed()) == 1
        await asyncio.to_thread(alice.kick, room_id, bob.user_id)
        await until(lambda: not members[1].there.is_connected, "removal", 5)
        assert members[0].there.is_connected
        for member in members:
            await member.there.leave()

    asyncio.run(test())


def test_token_after_cached_room_was_deleted_can_be_used(servers: Set) -> None:
    alice = servers.user()
    room_id = servers.room(alice)
    body = service.sfu_get_body(alice, room_id)

    async def test() -> None:
        jwt = service.post(alice.client_url, "/sfu/get", body).ok()["jwt"]
        room = service.claims(jwt)["video"]["room"]
        webhooks = servers.synapse.log_text().count("/sfu_webhook")
        await asyncio.to_thread(servers.livekit.delete_room, room)
        await until(
            lambda: servers.synapse.log_text().count("/sfu_webhook") > webhooks, "webhook", 5
        )
        jwt = service.post(alice.client_url, "/sfu/get", body).ok()["jwt"]
        there = await Participant.join(servers.livekit.url, jwt)
        await there.leave()

    asyncio.run(test())


def test_webhooks_rejected_for_30_seconds_lose_no_leave_membership_or_removal(
    servers: Set,
) -> None:
    alice, bob, carl, dave = (servers.user() for _ in range(4))
    room_id = servers.room(alice, bob, carl, dave)

    async def test() -> None:
        stays = await enter(alice, room_id, servers.livekit, HOUR_MS)
        leaves = await enter(bob, room_id, servers.livekit, HOUR_MS)
        banned = await enter(dave, room_id, servers.livekit, HOUR_MS)
        servers.relay.is_refusing = True
        refused = servers.relay.refused
        await leaves.there.leave()
        joins = await enter(carl, room_id, servers.livekit, 20_000)
        await asyncio.to_thread(alice.ban, room_id, dave.user_id)
        await until(lambda: not banned.there.is_connected, "removal", 5)
        await asyncio.sleep(REFUSED_SEC)
        servers.relay.is_refusing = False
        assert servers.relay.refused > refused
        await until(lambda: not leaves.is_in_room(alice), "leave", 70)
        assert leaves.leaves_sent() == 1
        # The test lasted longer than the delay, so the module must have restarted the leave.
        assert joins.is_in_room(alice)
        assert stays.is_in_room(alice)
        await joins.there.leave()
        await until(lambda: not joins.is_in_room(alice), "leave", 10)
        await stays.there.leave()

    asyncio.run(test())
