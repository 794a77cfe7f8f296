# SPDX-License-Identifier: Apache-2.0
"""The module in Synapse's own test harness, with a stub LiveKit and stubs of other homeservers."""

import json
from base64 import urlsafe_b64decode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any, ClassVar
from unittest.mock import patch

import attr
from livekit.protocol.models import ParticipantInfo, Room
from livekit.protocol.room import (
    CreateRoomRequest,
    DeleteRoomRequest,
    DeleteRoomResponse,
    ListParticipantsRequest,
    ListParticipantsResponse,
    ListRoomsRequest,
    ListRoomsResponse,
    RemoveParticipantResponse,
    RoomParticipantIdentity,
)
from synapse.http.server import HttpServer
from synapse.rest import ClientRestResource, admin
from synapse.server import HomeServer
from tests.server import FakeChannel
from tests.test_utils import FakeResponse
from tests.test_utils.event_injection import inject_member_event
from tests.unittest import FederatingHomeserverTestCase
from twisted.internet.defer import Deferred, fail, succeed
from twisted.web.http_headers import Headers
from twisted.web.resource import Resource

from synapse_lk_jwt import metrics
from synapse_lk_jwt.delegation.state_machine import Phase
from testbed.metrics import own_samples

P = "/_synapse/client/livekit/jwt"
URL = "wss://sfu.example.com"
SECRET = "the-secret-that-must-never-be-in-a-log"
SLOT = "m.call#ROOM"

# All series that the module can have.
for phase in Phase:
    metrics.delegations.labels(phase.value)
SERIES = own_samples().keys()


@attr.s(auto_attribs=True)
class Sfu:
    """A stub of LiveKit, which records the requests.

    Attributes:
        requests: the requests to make a room.
        answer: what it does with the next of these; a list is used up one by one.
        participants: the participants of each room, by identity.
        asked: the names of the methods that were called for other reasons, and for which room.
        is_down: whether connections to it are refused.
        stuck: identities that it does not remove.
        has_nodes: whether who is in a room is asked of the node that has it.
        without_node: rooms whose node has died. To make one again gives it to another node.
        answers_wait_for: what its answers, ready as they are, are held back by.
    """

    reactor: Any
    requests: list[tuple[str, CreateRoomRequest]] = attr.Factory(list)
    answer: Any = None
    participants: dict[str, dict[str, ParticipantInfo]] = attr.Factory(dict)
    asked: list[tuple[str, str]] = attr.Factory(list)
    is_down: bool = False
    stuck: set[str] = attr.Factory(set)
    has_nodes: bool = False
    without_node: set[str] = attr.Factory(set)
    answers_wait_for: "Deferred[None] | None" = None
    _sessions: int = 0

    async def request(
        self, method: str, uri: str, data: bytes | None = None, headers: Headers | None = None
    ) -> Any:
        if method == "GET":
            assert uri.endswith("/rtc/validate"), uri
            return FakeResponse(code=404, body=b"requested room does not exist")
        assert headers is not None
        if uri.endswith("/whip/v1"):
            return response(503, b'{"error":"unknown room configuration in create room request"}')
        name = uri.rpartition("/")[2]
        if name != "CreateRoom":
            said = self._answer(name, data or b"")
            if self.answers_wait_for is not None:
                await self.answers_wait_for
            return said
        self.requests.append((uri, CreateRoomRequest.FromString(data or b"")))
        answer = self.answer.pop(0) if isinstance(self.answer, list) else self.answer
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, Deferred):
            answer = await answer
        if self.is_down:
            raise ConnectionRefusedError()
        room = self.requests[-1][1].name
        self.participants.setdefault(room, {})
        self.without_node.discard(room)
        return answer or self.room(room)

    def _answer(self, name: str, data: bytes) -> Any:
        if self.is_down:
            raise ConnectionRefusedError()
        answer: Any
        missing = response(404, b'{"code": "not_found", "msg": ""}')
        if name == "ListRooms":
            self.asked.append((name, ""))
            names = ListRoomsRequest.FromString(data).names or self.participants
            answer = ListRoomsResponse(
                rooms=[
                    Room(name=room, num_participants=len(present))
                    for room, present in self.participants.items()
                    if room in names
                ]
            )
        elif name == "ListParticipants":
            room = ListParticipantsRequest.FromString(data).room
            self.asked.append((name, room))
            if self.has_nodes and (room not in self.participants or room in self.without_node):
                return response(503, b'{"code": "unavailable", "msg": "no response from servers"}')
            answer = ListParticipantsResponse(participants=self.participants.get(room, {}).values())
        elif name == "GetParticipant":
            who = RoomParticipantIdentity.FromString(data)
            self.asked.append((name, who.room))
            if self.has_nodes and (
                who.room not in self.participants or who.room in self.without_node
            ):
                return response(503, b'{"code": "unavailable", "msg": "no response from servers"}')
            answer = self.participants.get(who.room, {}).get(who.identity)
            if answer is None:
                return missing
        elif name == "RemoveParticipant":
            who = RoomParticipantIdentity.FromString(data)
            self.asked.append((name, who.room))
            if who.identity in self.stuck:
                return response(500, b'{"code": "internal", "msg": "no luck"}')
            if self.participants.get(who.room, {}).pop(who.identity, None) is None:
                return missing
            answer = RemoveParticipantResponse()
        else:
            assert name == "DeleteRoom"
            room = DeleteRoomRequest.FromString(data).room
            self.asked.append((name, room))
            if self.participants.pop(room, None) is None:
                return missing
            answer = DeleteRoomResponse()
        return protobuf(answer.SerializeToString())

    def join(self, jwt: str, duplicate: str = "") -> ParticipantInfo:
        """Adds the participant of a token to its room, as LiveKit does."""
        said = claims(jwt)
        self._sessions += 1
        participant = ParticipantInfo(
            sid=f"PA_{self._sessions}",
            identity=said["sub"] + duplicate,
            state=ParticipantInfo.State.ACTIVE,
            attributes=said["attributes"],
        )
        room: str = said["video"]["room"]
        self.participants.setdefault(room, {})[participant.identity] = participant
        return participant

    def room(self, name: str = "room", age: float = 0, participants: int = 0) -> Any:
        created = int(self.reactor.seconds() - age)
        room = Room(name=name, creation_time=created, num_participants=participants)
        return protobuf(room.SerializeToString())


def protobuf(body: bytes, code: int = 200) -> Any:
    return response(code, body, "application/protobuf")


def response(code: int, body: bytes, content_type: str = "application/json") -> Any:
    return FakeResponse(code=code, body=body, headers=Headers({"Content-Type": [content_type]}))


@attr.s(auto_attribs=True)
class OtherServers:
    """A stub of all other homeservers, which records the requests."""

    answer: Callable[[str], Any]
    requests: list[tuple[str, str, Any]] = attr.Factory(list)

    def always(self, answer: Any) -> None:
        """Gives the same answer to every request from now on."""
        self.answer = lambda uri: answer

    def request(
        self, method: bytes, uri: bytes, headers: Headers | None = None, bodyProducer: Any = None
    ) -> "Deferred[Any]":
        content = None
        if bodyProducer is not None:
            file: BytesIO = bodyProducer._inputFile
            content = json.loads(file.getvalue())
            assert headers is not None
            assert headers.hasHeader("Authorization")
        self.requests.append((method.decode(), uri.decode(), content))
        answer = self.answer(uri.decode())
        if isinstance(answer, Deferred):
            return answer
        return fail(answer) if isinstance(answer, Exception) else succeed(answer)


@contextmanager
def counting(*names: str) -> Iterator[dict[str, float]]:
    """How much the samples of some metrics change. The mapping is filled at the end."""
    before = own_samples()
    changes: dict[str, float] = {}
    yield changes
    changes.update(
        (series, value - before[series])
        for series, value in own_samples().items()
        if series.partition("{")[0] in names and value != before[series]
    )


def claims(jwt: str) -> dict[str, Any]:
    payload = jwt.split(".")[1]
    said = json.loads(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    assert isinstance(said, dict)
    return said


class ModuleTestCase(FederatingHomeserverTestCase):
    """A homeserver `test` with the module, a room of Alice's, and a remote server."""

    servlets: ClassVar[Sequence[Callable[[HomeServer, HttpServer], None]]] = (
        admin.register_servlets,
    )
    module_config: ClassVar[dict[str, Any]] = {}

    def default_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().default_config()
        rate = {"per_second": 1000, "burst_count": 1000}
        config["public_baseurl"] = "https://matrix.test/"
        config["modules"] = [
            {
                "module": "synapse_lk_jwt.LiveKitJwtModule",
                "config": {
                    "livekit_url": URL,
                    "livekit_key": "APIkey",
                    "livekit_secret": SECRET,
                    "full_access_homeservers": [],
                    "rc_token": rate,
                    "rc_openid": rate,
                    **self.module_config,
                },
            }
        ]
        return config

    def tearDown(self) -> None:
        super().tearDown()
        # No request or webhook may add a label value that test_monitoring.py does not list.
        assert own_samples().keys() <= SERIES

    def create_resource_dict(self) -> dict[str, Resource]:
        resources: dict[str, Resource] = super().create_resource_dict()
        resources["/_matrix/client"] = ClientRestResource(self.hs)
        resources.update(self.hs._module_web_resources)
        return resources

    def prepare(self, reactor: Any, clock: Any, hs: Any) -> None:
        super().prepare(reactor, clock, hs)
        self.store: Any = hs.get_datastores().main
        self.sfu = Sfu(reactor)
        hs.get_simple_http_client().request = self.sfu.request
        self.others = OtherServers(lambda uri: response(401, b"{}"))
        client = hs.get_federation_http_client()
        client.agent = self.others
        patcher = patch("synapse_lk_jwt.compat.federation_http.bounded_client", return_value=client)
        patcher.start()
        self.addCleanup(patcher.stop)
        self.alice = self.register_user("alice", "password")
        self.alices_token = self.login("alice", "password")
        self.room_id = self.helper.create_room_as(
            self.alice, tok=self.alices_token, room_version="10"
        )
        self.rita = f"@rita:{self.OTHER_SERVER_NAME}"

    def join_remotely(self, user_id: str, membership: str = "join") -> None:
        self.get_success(inject_member_event(self.hs, self.room_id, user_id, membership))

    def openid_token(self, user_id: str | None = None, access_token: str | None = None) -> Any:
        path = f"/_matrix/client/v3/user/{user_id or self.alice}/openid/request_token"
        channel = self.make_request(
            "POST", path, {}, access_token=access_token or self.alices_token
        )
        assert channel.code == 200, channel.result
        return channel.json_body

    def remote_token(self, user_id: object) -> dict[str, str]:
        """A token of the other server, which from now on answers with this user."""
        self.others.answer = lambda uri: response(200, json.dumps({"sub": user_id}).encode())
        return {"access_token": "remote-token", "matrix_server_name": self.OTHER_SERVER_NAME}

    def sfu_get_body(self, **more: Any) -> dict[str, Any]:
        token = more.pop("openid_token", None) or self.openid_token()
        return {"room": self.room_id, "openid_token": token, "device_id": "DEVICE", **more}

    def get_token_body(self, user_id: str | None = None, /, **more: Any) -> dict[str, Any]:
        token = more.pop("openid_token", None) or self.openid_token()
        return {
            "room_id": self.room_id,
            "slot_id": SLOT,
            "openid_token": token,
            "member": {
                "id": "member",
                "claimed_user_id": user_id or self.alice,
                "claimed_device_id": "DEVICE",
            },
            **more,
        }

    def homeserver_body(self, **more: Any) -> dict[str, Any]:
        return {
            "url": URL,
            "room_id": self.room_id,
            "slot_id": SLOT,
            "member_id": "member",
            **more,
        }

    def post(self, endpoint: str, body: Any, **more: Any) -> FakeChannel:
        return self.make_request("POST", P + endpoint, body, shorthand=False, **more)

    def post_homeserver(
        self, body: Any, access_token: str | None = None, prefix: str = "v1"
    ) -> FakeChannel:
        path = f"/_matrix/client/{prefix}/rtc/livekit/get_token"
        return self.make_request("POST", path, body, access_token=access_token or self.alices_token)

    def post_federation(self, body: Any, prefix: str = "v1") -> FakeChannel:
        path = f"/_matrix/federation/{prefix}/rtc/livekit/get_token"
        return self.make_signed_federation_request("POST", path, body)

    def assert_error(self, channel: FakeChannel, code: int, errcode: str) -> str:
        seen = (channel.code, channel.json_body.get("errcode"))
        assert seen == (code, errcode), channel.result
        assert sorted(channel.json_body) in (
            ["errcode", "error"],
            ["errcode", "error", "retry_after_ms"],
            ["errcode", "error", "soft_logout"],
        )
        error = channel.json_body["error"]
        assert isinstance(error, str)
        return error

    def assert_token(self, channel: FakeChannel) -> dict[str, Any]:
        assert channel.code == 200, channel.result
        return claims(channel.json_body["jwt"])
