# SPDX-License-Identifier: Apache-2.0
"""Every endpoint of LiveKit, with the token of a user who must not start calls."""

import asyncio
import itertools
import socket
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from livekit import api
from livekit.protocol.rtc import JoinRequest, SignalResponse, WrappedJoinRequest

from synapse_lk_jwt.check.livekit_requests import WHIP_OFFER
from synapse_lk_jwt.livekit.tokens import MUST_NOT_CREATE, TokenSigner
from testbed import service
from testbed.call import CallRejected, Participant
from testbed.http import Answer, http
from testbed.livekit import LiveKit
from testbed.matrix import User
from testbed.member import POWER_LEVELS
from testbed.process import until
from testbed.redis import Redis
from testbed.sets import module_config, running
from testbed.synapse import Synapse

_number = itertools.count()

WEBSOCKET = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "c3luYXBzZS1say1qd3QtIQ==",
}


def join_request(**fields: Any) -> str:
    wrapped = WrappedJoinRequest(join_request=JoinRequest(**fields).SerializeToString())
    return urlsafe_b64encode(wrapped.SerializeToString()).decode()


WEBSOCKET_PATHS = [
    "/rtc?protocol=15",
    "/rtc?protocol=15&publish=duplicate",
    "/rtc?protocol=15&reconnect=1&sid=PA_unknown",
    f"/rtc?join_request={join_request(participant_sid='PA_unknown')}",
    f"/rtc/v1?join_request={join_request(participant_sid='PA_unknown')}",
    f"/rtc/v1?join_request={join_request(reconnect=True, participant_sid='PA_unknown')}",
]

# All methods of LiveKit's server API. Each must reject a token without its grant.
SERVER_API = [
    *(
        f"RoomService/{method}"
        for method in (
            "CreateRoom",
            "ListRooms",
            "DeleteRoom",
            "ListParticipants",
            "GetParticipant",
            "RemoveParticipant",
            "MutePublishedTrack",
            "UpdateParticipant",
            "UpdateSubscriptions",
            "SendData",
            "UpdateRoomMetadata",
            "ForwardParticipant",
            "MoveParticipant",
            "PerformRpc",
        )
    ),
    *(f"AgentDispatchService/{m}Dispatch" for m in ("Create", "Delete", "List")),
    *(
        f"Egress/{method}"
        for method in (
            "StartEgress",
            "StartRoomCompositeEgress",
            "StartWebEgress",
            "StartParticipantEgress",
            "StartTrackCompositeEgress",
            "StartTrackEgress",
            "UpdateLayout",
            "UpdateStream",
            "ListEgress",
            "StopEgress",
        )
    ),
    *(f"Ingress/{m}Ingress" for m in ("Create", "Update", "List", "Delete")),
    *(
        f"SIP/{method}"
        for method in (
            "CreateSIPInboundTrunk",
            "CreateSIPOutboundTrunk",
            "UpdateSIPInboundTrunk",
            "UpdateSIPOutboundTrunk",
            "GetSIPInboundTrunk",
            "GetSIPOutboundTrunk",
            "ListSIPTrunk",
            "ListSIPInboundTrunk",
            "ListSIPOutboundTrunk",
            "DeleteSIPTrunk",
            "CreateSIPDispatchRule",
            "UpdateSIPDispatchRule",
            "ListSIPDispatchRule",
            "DeleteSIPDispatchRule",
            "CreateSIPParticipant",
            "TransferSIPParticipant",
        )
    ),
]


# A candidate for a session at /whip/v1.
FRAGMENT = b"a=ice-ufrag:check\r\na=ice-pwd:synapse-lk-jwt-check-only\r\nm=audio 9 RTP/AVP 0\r\n"


class Requests:
    """The requests that a client can send to LiveKit with its own token."""

    def __init__(self, livekit: LiveKit, may_create_room: bool = False) -> None:
        self.livekit = livekit
        self.room = f"room{next(_number)}"
        self.identity = f"user{next(_number)}"
        signer = TokenSigner(livekit.key, livekit.secret, lambda: int(time.time() * 1000))
        self.jwt = signer.participant_token(
            self.identity,
            self.room,
            may_create_room=may_create_room,
            can_publish=True,
            can_update_own_metadata=False,
            attributes={},
            lifetime_ms=60_000,
        )

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        return http(
            method,
            self.livekit.api_url + path,
            body,
            {"Authorization": f"Bearer {self.jwt}", **headers},
            timeout=15.0,
        )

    def websocket(self, path: str) -> Answer:
        return self.ask("GET", path, **WEBSOCKET)

    def whip(self) -> Answer:
        return self.ask("POST", "/whip/v1", WHIP_OFFER, **{"Content-Type": "application/sdp"})

    def create_room(self, livekit: LiveKit | None = None) -> None:
        """Create the room as the module does for full access, by default on this node."""
        grants = api.VideoGrants(room_create=True)
        (livekit or self.livekit).ask("CreateRoom", {"name": self.room}, grants)

    @property
    def has_room(self) -> bool:
        return self.room in {room["name"] for room in self.livekit.rooms()}


@pytest.fixture(scope="module", params=[False, True], ids=["auto_create=false", "auto_create=true"])
def livekit(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveKit]:
    livekit = LiveKit(tmp_path_factory.mktemp("livekit"), auto_create=request.param)
    with running(livekit):
        yield livekit


# The LiveKit room does not exist


@pytest.mark.parametrize("path", WEBSOCKET_PATHS)
def test_websocket_without_room_is_rejected_and_creates_none(path: str, livekit: LiveKit) -> None:
    requests = Requests(livekit)
    answer = requests.websocket(path)
    assert answer.status == (500 if livekit.auto_create else 404), answer
    assert not requests.has_room


@pytest.mark.parametrize("path", [path.replace("?", "/validate?") for path in WEBSOCKET_PATHS])
def test_validate_without_room_creates_none(path: str, livekit: LiveKit) -> None:
    requests = Requests(livekit)
    answer = requests.ask("GET", path)
    assert answer.status == (200 if livekit.auto_create else 404), answer
    assert not requests.has_room


def test_whip_without_room_is_rejected_and_creates_none(livekit: LiveKit) -> None:
    requests = Requests(livekit)
    answer = requests.whip()
    assert answer.status == 503, answer
    assert b"unknown room configuration" in answer.body
    assert not requests.has_room


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/whip/v1", 204),
        ("OPTIONS", "/whip/v1", 200),
        ("PUT", "/whip/v1", 404),
        ("GET", "/whip/v1/PA_unknown", 204),
        ("PATCH", "/whip/v1/PA_unknown", 500),
        ("DELETE", "/whip/v1/PA_unknown", 404),
        ("OPTIONS", "/whip/v1/PA_unknown", 404),
    ],
)
def test_other_whip_methods_without_room_create_none(
    method: str, path: str, status: int, livekit: LiveKit
) -> None:
    requests = Requests(livekit)
    headers = {"Content-Type": "application/trickle-ice-sdpfrag", "If-Match": '"session"'}
    answer = requests.ask(method, path, FRAGMENT, **headers)
    assert answer.status == status, answer
    assert not requests.has_room


def test_agent_websocket_is_rejected(livekit: LiveKit) -> None:
    requests = Requests(livekit)
    assert requests.websocket("/agent").status == 401
    assert not requests.has_room


@pytest.mark.parametrize("method", SERVER_API)
def test_server_api_is_rejected_and_creates_no_room(method: str, livekit: LiveKit) -> None:
    requests = Requests(livekit)
    room, identity = requests.room, requests.identity
    bodies = [
        {},
        {"room": room, "identity": identity},
        {"room_name": room, "participant_identity": identity},
        {"name": room},
    ]
    for body in bodies:
        answer = requests.ask("POST", f"/twirp/livekit.{method}", body)
        # 400 is the answer to a field of another method.
        assert answer.status in (400, 401, 403), answer
    assert 401 in {requests.ask("POST", f"/twirp/livekit.{method}", body).status for body in bodies}
    assert not requests.has_room


# The room exists, or the token has full access


def test_token_with_full_access_creates_the_room(livekit: LiveKit) -> None:
    requests = Requests(livekit, may_create_room=True)
    assert requests.whip().status == 201
    assert requests.has_room
    requests = Requests(livekit, may_create_room=True)
    assert requests.websocket("/rtc").status == (101 if livekit.auto_create else 404)
    assert requests.has_room == livekit.auto_create


@pytest.mark.parametrize("path", ["/rtc?protocol=15", WEBSOCKET_PATHS[4]])
def test_websocket_to_running_room_connects(path: str, livekit: LiveKit) -> None:
    requests = Requests(livekit)
    requests.create_room()
    assert requests.websocket(path).status == 101


def test_whip_to_running_room_connects(livekit: LiveKit) -> None:
    requests = Requests(livekit)
    requests.create_room()
    for _ in range(2):
        # The second request connects the same identity again.
        answer = requests.whip()
        assert answer.status == 201, answer
    assert requests.ask("DELETE", answer.headers["location"]).status == 200


# Tokens that LiveKit issues itself


def test_token_refreshed_by_livekit_keeps_the_claim(livekit: LiveKit) -> None:
    requests = Requests(livekit)
    requests.create_room()
    refreshed = service.claims(refreshed_token(requests))
    assert refreshed["roomPreset"] == MUST_NOT_CREATE
    assert refreshed["exp"] - time.time() > 500


def test_refreshed_token_for_deleted_room_is_rejected_and_creates_none(livekit: LiveKit) -> None:
    requests = Requests(livekit)
    requests.create_room()
    requests.jwt = refreshed_token(requests)
    livekit.delete_room(requests.room)
    for path in WEBSOCKET_PATHS[:3]:
        assert requests.websocket(path).status == (500 if livekit.auto_create else 404)
    assert requests.whip().status == 503
    assert not requests.has_room


def refreshed_token(requests: Requests) -> str:
    """The token that LiveKit sends to a client soon after the connection."""
    with socket.create_connection(("127.0.0.1", requests.livekit.port), 10) as connection:
        headers = {"Host": "localhost", "Authorization": f"Bearer {requests.jwt}", **WEBSOCKET}
        lines = ["GET /rtc?protocol=15 HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        with connection.makefile("rb") as stream:
            assert b" 101 " in stream.readline()
            while stream.readline().strip():
                pass
            while True:
                size = stream.read(2)[1]
                if size == 126:
                    size = int.from_bytes(stream.read(2), "big")
                response = SignalResponse.FromString(stream.read(size))
                if response.refresh_token:
                    return response.refresh_token


# A restricted user joins with LiveKit's own client


def test_client_of_restricted_user_joins_running_room_only(livekit: LiveKit) -> None:
    requests = Requests(livekit)

    async def join() -> None:
        with pytest.raises(CallRejected):
            await Participant.join(livekit.url, requests.jwt)
        assert not requests.has_room
        requests.create_room()
        there = await Participant.join(livekit.url, requests.jwt)
        await there.leave()
        # The room still exists, because its departure timeout has not passed.
        await (await Participant.join(livekit.url, requests.jwt)).leave()

    asyncio.run(join())


# Several nodes


@pytest.fixture(scope="module", params=[False, True], ids=["auto_create=false", "auto_create=true"])
def nodes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LiveKit, LiveKit]]:
    directory: Path = tmp_path_factory.mktemp("nodes")
    redis = Redis(directory)
    with running(redis):
        both = []
        for name in ("one", "two"):
            (directory / name).mkdir()
            livekit = LiveKit(directory / name, auto_create=request.param, redis_port=redis.port)
            both.append(livekit)
        with running(*both):
            yield both[0], both[1]


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("path", WEBSOCKET_PATHS)
def test_websocket_to_either_node_without_room_is_rejected_and_creates_none(
    path: str, node: int, nodes: tuple[LiveKit, LiveKit]
) -> None:
    requests = Requests(nodes[node])
    assert requests.websocket(path).status == (500 if nodes[node].auto_create else 404)
    assert not requests.has_room


@pytest.mark.parametrize("node", [0, 1])
def test_whip_to_either_node_without_room_is_rejected_and_creates_none(
    node: int, nodes: tuple[LiveKit, LiveKit]
) -> None:
    requests = Requests(nodes[node])
    assert requests.whip().status == 503
    assert not requests.has_room


@pytest.mark.parametrize(("creator", "other"), list(itertools.product((0, 1), repeat=2)))
def test_either_node_connects_to_room_of_either_node(
    creator: int, other: int, nodes: tuple[LiveKit, LiveKit]
) -> None:
    requests = Requests(nodes[other])
    requests.create_room(nodes[creator])
    assert requests.websocket("/rtc?protocol=15").status == 101
    assert requests.whip().status == 201


# Calls of restricted users alone, with Synapse


@pytest.fixture(scope="module", params=[False, True], ids=["auto_create=false", "auto_create=true"])
def federation(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Synapse, Synapse, LiveKit]]:
    """A homeserver with a LiveKit, and another homeserver, whose users are restricted there."""
    directory = tmp_path_factory.mktemp("federation")
    livekit = LiveKit(directory, auto_create=request.param)
    ours = Synapse("a", directory, module_config(livekit, sanity_check_interval="2s"))
    theirs = Synapse("b", directory, host="localhost")
    livekit.webhook_urls.append(ours.client_url + service.PREFIX + "/sfu_webhook")
    with running(livekit, ours, theirs):
        yield ours, theirs, livekit


def test_call_of_restricted_user_alone_survives_restart_of_livekit(
    federation: tuple[Synapse, Synapse, LiveKit],
) -> None:
    ours, theirs, livekit = federation
    alice, rita = ours.register("alice"), theirs.register("rita")
    room_id = alice.create_room(preset="public_chat", power_levels=POWER_LEVELS)
    rita.join(room_id, via=[ours.server_name])

    async def token(user: User) -> str:
        body = service.get_token_body(user, room_id)
        answer = await asyncio.to_thread(service.post, ours.client_url, "/get_token", body)
        jwt: str = answer.ok()["jwt"]
        return jwt

    async def call() -> None:
        ritas = await token(rita)
        with pytest.raises(CallRejected):
            await Participant.join(livekit.url, ritas)
        assert livekit.rooms() == []
        alice_there = await Participant.join(livekit.url, await token(alice))
        rita_there = await Participant.join(livekit.url, ritas)
        await alice_there.leave()
        (room,) = livekit.rooms()

        def identities() -> list[str]:
            return [p["identity"] for p in livekit.participants(room["name"])]

        await until(lambda: identities() == [rita_there.identity], "end of alice's connection")
        mark = ours.main.log_size()
        await until(lambda: "/ListParticipants: 200" in ours.main.log_text(mark), "poll")
        livekit.process.kill()
        livekit.start()
        await asyncio.to_thread(livekit.wait_ready)
        await until(lambda: len(livekit.rooms()) == 1, "room")
        await until(lambda: identities() == [rita_there.identity], "rita's return")
        assert rita_there.is_connected
        assert "LiveKit lost the room of a call" in ours.log_text()
        await rita_there.leave()
        livekit.delete_room(room["name"])

    asyncio.run(call())
