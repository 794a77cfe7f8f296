# SPDX-License-Identifier: Apache-2.0
"""Requests to LiveKit: to its API with the module's key, and requests of clients."""

from collections.abc import Callable

from google.protobuf.message import DecodeError, Message
from livekit.api import VideoGrants
from livekit.protocol.models import ParticipantInfo
from livekit.protocol.room import (
    CreateRoomRequest,
    DeleteRoomRequest,
    ListParticipantsRequest,
    ListParticipantsResponse,
    ListRoomsRequest,
    ListRoomsResponse,
)

from synapse_lk_jwt.check.probe import NoAnswer, Request, Steps
from synapse_lk_jwt.check.setup import Setup
from synapse_lk_jwt.livekit.requests import room_service_request
from synapse_lk_jwt.livekit.tokens import TokenSigner

# The smallest offer that LiveKit accepts. No media ever follows.
WHIP_OFFER = "\r\n".join(
    (
        "v=0",
        "o=- 0 0 IN IP4 127.0.0.1",
        "s=-",
        "t=0 0",
        "a=group:BUNDLE 0",
        "m=audio 9 UDP/TLS/RTP/SAVPF 111",
        "c=IN IP4 0.0.0.0",
        "a=mid:0",
        "a=sendonly",
        "a=rtcp-mux",
        "a=ice-ufrag:check",
        "a=ice-pwd:synapse-lk-jwt-check-only",
        f"a=fingerprint:sha-256 {':'.join(['00'] * 32)}",
        "a=setup:actpass",
        "a=rtpmap:111 opus/48000/2",
        "",
    )
).encode("ascii")


class LiveKit:
    """LiveKit's API, used with the module's key, and the requests that clients send to it."""

    def __init__(self, setup: Setup, time_msec: Callable[[], int]) -> None:
        """
        Args:
            setup: has the address and the key of LiveKit.
            time_msec: milliseconds since the epoch.
        """
        module = setup.module
        self.url = module.livekit_internal_url
        self.signer = TokenSigner(module.livekit_key, module.livekit_secret, time_msec)

    def room_service(self, method: str, message: Message, grants: VideoGrants) -> Request:
        """A request to LiveKit's RoomService."""
        request = room_service_request(self.url, method, message, grants, self.signer)
        return Request("POST", request.url, request.headers, request.body)

    def list_rooms(self, *names: str) -> Request:
        """A request for the rooms of these names, or for all."""
        message = ListRoomsRequest(names=names)
        return self.room_service("ListRooms", message, VideoGrants(room_list=True))

    def create_room(self, livekit_room: str) -> Request:
        """A request for a room that LiveKit deletes by itself soon after."""
        message = CreateRoomRequest(name=livekit_room, empty_timeout=30, departure_timeout=1)
        return self.room_service("CreateRoom", message, VideoGrants(room_create=True))

    def delete_room(self, livekit_room: str) -> Request:
        """A request to delete a room."""
        message = DeleteRoomRequest(room=livekit_room)
        return self.room_service("DeleteRoom", message, VideoGrants(room_create=True))

    def validate(self, token: str) -> Request:
        """A request whether a token would let its holder into a room. No participant joins.

        Clients put the token into the URL, which may be logged. So this request has it in a header.
        """
        return Request("GET", f"{self.url}/rtc/validate", {"Authorization": f"Bearer {token}"})

    def connect(self, url: str, token: str) -> Request:
        """A request that opens a WebSocket, as a client does. The connection ends with the answer.

        Twisted's client does not return a 101, and reports that no response arrived.

        Args:
            url: LiveKit's URL for clients, with `http` in place of `ws`.
            token: a participant's token.
        """
        headers = {
            "Authorization": f"Bearer {token}",
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "c3luYXBzZS1say1qd3QtIQ==",
        }
        return Request("GET", f"{url}/rtc?protocol=15", headers)

    def publish(self, token: str) -> Request:
        """A request to publish over WHIP (RFC 9725), which creates the room."""
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/sdp"}
        return Request("POST", f"{self.url}/whip/v1", headers, WHIP_OFFER)

    def token_for(self, livekit_room: str) -> str:
        """A token of no user, to listen in a room that exists."""
        return self.signer.participant_token(
            "synapse-lk-jwt-check",
            livekit_room,
            may_create_room=False,
            can_publish=False,
            can_update_own_metadata=False,
            attributes={},
            lifetime_ms=60_000,
        )

    def exists(self, livekit_room: str) -> Steps[bool]:
        """Whether LiveKit has a room.

        Raises:
            NoAnswer: if LiveKit does not list its rooms.
        """
        answer = yield self.list_rooms(livekit_room)
        try:
            if answer.status == 200:
                return bool(ListRoomsResponse.FromString(answer.body).rooms)
        except DecodeError:
            pass
        raise NoAnswer(f"LiveKit answers {answer.status} to ListRooms")

    def participants(self, livekit_room: str) -> Steps[list[ParticipantInfo]]:
        """The participants of a room; none if the room does not exist.

        Raises:
            NoAnswer: if LiveKit does not list them.
        """
        message = ListParticipantsRequest(room=livekit_room)
        grants = VideoGrants(room_admin=True, room=livekit_room)
        answer = yield self.room_service("ListParticipants", message, grants)
        if answer.status == 404:
            return []
        error = answer.json
        is_unavailable = isinstance(error, dict) and error.get("code") == "unavailable"
        # With `enable_psrpc_for_get_list_participants` no node answers for a room that does not
        # exist.
        if is_unavailable and not (yield from self.exists(livekit_room)):
            return []
        try:
            if answer.status == 200:
                return list(ListParticipantsResponse.FromString(answer.body).participants)
        except DecodeError:
            pass
        raise NoAnswer(f"LiveKit answers {answer.status} to ListParticipants")
