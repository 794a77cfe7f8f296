# SPDX-License-Identifier: Apache-2.0
"""Encrypted leaves of clients that were killed after they delegated them."""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from testbed import service
from testbed.livekit import LiveKit
from testbed.lone_client import LoneClient
from testbed.matrix import User
from testbed.process import wait_until
from testbed.sets import one_homeserver
from testbed.synapse import Synapse

HOUR_MS = 3_600_000
ENCRYPTED = "m.room.encrypted"
STICKY = "&org.matrix.msc4354.sticky_duration_ms=3600000"

# LiveKit waits this long before it drops a client that sends nothing.
GONE_SEC = 90

number = itertools.count()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Synapse, LiveKit]]:
    directory = tmp_path_factory.mktemp("lost")
    features = {"experimental_features": {"msc4354_enabled": True}}
    with one_homeserver(directory, "k", features) as (synapse, livekit):
        yield synapse, livekit
    assert "Traceback" not in synapse.log_text()


class Caller:
    """A user in a call of an encrypted room, who has delegated an encrypted leave."""

    def __init__(
        self, synapse: Synapse, livekit: LiveKit, endpoint: str, *, is_sticky: bool
    ) -> None:
        self.admin = synapse.register(f"admin{next(number)}")
        self.user = synapse.register(f"caller{next(number)}")
        self.room_id = self.admin.create_room(preset="public_chat")
        encryption = {"algorithm": "m.megolm.v1.aes-sha2"}
        self.admin.send_state(self.room_id, "m.room.encryption", encryption)
        self.user.join(self.room_id)
        self.content = {
            "algorithm": "m.megolm.v1.aes-sha2",
            "ciphertext": f"AwgAEnACgAkLmt6qF84IK++J7UDH2Za1YVchHyprqTqsg {endpoint} ~?>",
            "sender_key": "ünïcode \U0001f4de",
            "nested": {"b": [1, 2**53 - 1, None, True, {}], "a": ""},
        }
        self.since = self.admin.call("GET", "/_matrix/client/v3/sync").ok()["next_batch"]
        jwt, delegate = ENDPOINTS[endpoint](self.user, self.room_id, livekit)
        self.client = LoneClient(livekit.url, jwt)
        self.client.wait_connected()
        path = f"/_matrix/client/v3/rooms/{self.room_id}/send/{ENCRYPTED}/leave"
        query = f"?org.matrix.msc4140.delay={HOUR_MS}{STICKY * is_sticky}"
        delegate(self.user.call("PUT", path + query, self.content).ok()["delay_id"])

    def sent(self) -> list[dict[str, Any]]:
        """The encrypted events of the user in another user's timeline."""
        return [
            event
            for event in self.admin.timeline(self.room_id)
            if event["type"] == ENCRYPTED and event["sender"] == self.user.user_id
        ]


Delegate = Callable[[str], None]


def _by_sfu_get(user: User, room_id: str, _: LiveKit) -> tuple[str, Delegate]:
    body = service.sfu_get_body(user, room_id)

    def delegate(delay_id: str) -> None:
        delay = {"delay_id": delay_id, "delay_timeout": HOUR_MS}
        service.post(user.client_url, "/sfu/get", {**body, **delay}).ok()

    return service.post(user.client_url, "/sfu/get", body).ok()["jwt"], delegate


def _by_service(endpoint: str) -> Callable[[User, str, LiveKit], tuple[str, Delegate]]:
    def by_service(user: User, room_id: str, _: LiveKit) -> tuple[str, Delegate]:
        body = service.get_token_body(user, room_id)

        def delegate(delay_id: str) -> None:
            delay = {"delay_id": delay_id, "delay_timeout": HOUR_MS}
            service.post(user.client_url, endpoint, {**body, **delay}).ok()

        return service.post(user.client_url, "/get_token", body).ok()["jwt"], delegate

    return by_service


def _by_homeserver(user: User, room_id: str, livekit: LiveKit) -> tuple[str, Delegate]:
    body = service.homeserver_body(user, room_id, livekit.url)

    def delegate(delay_id: str) -> None:
        service.homeserver_delegate(user, {**body, "delay_id": delay_id}).ok()

    return service.homeserver_get_token(user, body).ok()["jwt"], delegate


ENDPOINTS: dict[str, Callable[[User, str, LiveKit], tuple[str, Delegate]]] = {
    "/sfu/get": _by_sfu_get,
    "/get_token": _by_service("/get_token"),
    "/delegate_delayed_leave": _by_service("/delegate_delayed_leave"),
    "MSC4195's delegate_delayed_leave": _by_homeserver,
}
CASES = list(itertools.product(ENDPOINTS, (True, False)))


@pytest.fixture(scope="module")
def lost(one: tuple[Synapse, LiveKit]) -> dict[tuple[str, bool], Caller]:
    """Callers whose clients are killed at the same time, because each takes LiveKit long."""
    callers = {}
    try:
        for endpoint, is_sticky in CASES:
            callers[endpoint, is_sticky] = Caller(*one, endpoint, is_sticky=is_sticky)
        # All participants are connected, so that only LiveKit's webhook or a poll ends a
        # membership.
        wait_until(lambda: all(c.user.delayed() for c in callers.values()), "delayed leaves")
        assert not any(caller.sent() for caller in callers.values())
    finally:
        for caller in callers.values():
            caller.client.kill()
    return callers


@pytest.mark.parametrize(("endpoint", "is_sticky"), CASES)
def test_encrypted_leave_of_killed_client_arrives_unchanged(
    endpoint: str, is_sticky: bool, lost: dict[tuple[str, bool], Caller]
) -> None:
    caller = lost[endpoint, is_sticky]
    began = time.monotonic()
    wait_until(lambda: bool(caller.sent()), "encrypted leave", GONE_SEC)
    print(f"{time.monotonic() - began:.1f} s")
    (event,) = caller.sent()
    assert event["content"] == caller.content
    assert event.get("msc4354_sticky") == ({"duration_ms": HOUR_MS} if is_sticky else None)
    assert caller.user.delayed() == []


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_encrypted_sticky_leave_behind_other_messages_is_in_the_sticky_section_of_sync(
    endpoint: str, lost: dict[tuple[str, bool], Caller]
) -> None:
    caller = lost[endpoint, True]
    wait_until(lambda: bool(caller.sent()), "encrypted leave", GONE_SEC)
    path = f"/_matrix/client/v3/rooms/{caller.room_id}/send/m.room.message"
    for message in range(12):
        content = {"msgtype": "m.text", "body": str(message)}
        caller.admin.call("PUT", f"{path}/{message}", content).ok()
    since = f"/_matrix/client/v3/sync?since={caller.since}"
    room = caller.admin.call("GET", since).ok()["rooms"]["join"][caller.room_id]
    assert ENCRYPTED not in {event["type"] for event in room["timeline"]["events"]}
    (event,) = room["msc4354_sticky"]["events"]
    assert (event["type"], event["content"]) == (ENCRYPTED, caller.content)
