# SPDX-License-Identifier: Apache-2.0
"""MSC4195's client-server endpoints, which clients call with their Matrix access token."""

import re

import attr
from synapse.api.errors import Codes, SynapseError
from synapse.http.servlet import RestServlet
from synapse.http.site import SynapseRequest
from synapse.module_api import Requester
from synapse.types import JsonDict

from synapse_lk_jwt.api import fields
from synapse_lk_jwt.api.endpoint import respond
from synapse_lk_jwt.api.errors import (
    no_such_delayed_event,
    other_sfu,
    raises_matrix_errors,
    unnamed_sfu,
)
from synapse_lk_jwt.api.fields import optional, read_body, required
from synapse_lk_jwt.api.services import Services
from synapse_lk_jwt.call_member import CallMember
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.identifiers import is_same_url
from synapse_lk_jwt.issuer import NotInRoom
from synapse_lk_jwt.livekit.naming import (
    device_identity,
    device_member_identity,
    member_identity,
)
from synapse_lk_jwt.msc4195 import ANY_VERSION, DELEGATE_DELAYED_LEAVE, GET_TOKEN, client_path
from synapse_lk_jwt.remote_tokens import RemoteSfus


def _patterns(endpoint: str) -> tuple["re.Pattern[str]", ...]:
    return (re.compile(f"^{client_path(endpoint, ANY_VERSION)}$"),)


async def _requester(homeserver: Homeserver, request: SynapseRequest) -> Requester:
    """Returns the user who sent a request. Handlers call this before they read the body."""
    requester = await homeserver.users.get_user_by_req(request, allow_guest=True)
    if not await homeserver.users.is_active(requester.user.to_string()):
        # Synapse itself rejects all inactive users except suspended ones.
        raise SynapseError(401, "This account cannot be used", Codes.UNAUTHORIZED)
    return requester


@attr.s(auto_attribs=True, frozen=True, slots=True)
class GetTokenBody:
    """The body of `get_token`. Without `server_name` the SFU is one of this homeserver."""

    url: str = required(fields.url)
    room_id: str = required(fields.room_id)
    slot_id: str = required(fields.string)
    member_id: str = fields.member_id()
    server_name: str | None = optional(fields.server_name)


class GetTokenRestServlet(RestServlet):
    """Issues a token for the SFU of this homeserver, or fetches one for another homeserver's SFU.

    POST /_matrix/client/v1/rtc/livekit/get_token HTTP/1.1
    Authorization: Bearer …

    {
        "url": "wss://sfu.example.org",
        "room_id": "!room:example.org",
        "slot_id": "m.call#ROOM",
        "member_id": "member",
        "server_name": "example.org"
    }
    """

    PATTERNS = _patterns(GET_TOKEN)
    CATEGORY = "MatrixRTC requests"

    def __init__(self, services: Services, remote_sfus: RemoteSfus) -> None:
        super().__init__()
        self._services = services
        self._remote_sfus = remote_sfus

    @raises_matrix_errors("client_get_token")
    async def on_POST(self, request: SynapseRequest) -> None:
        """Handles a request."""
        requester = await _requester(self._services.homeserver, request)
        user_id = requester.user.to_string()
        body = read_body(request, GetTokenBody)
        identity = member_identity(user_id, body.member_id)
        member = CallMember(user_id, body.room_id, body.slot_id, (identity,))
        await self._services.homeserver.users.check_auth_blocking(user_id)
        await self._services.admit(member, strict=True)
        # Only the URL decides, because a client may name another server for this SFU.
        if is_same_url(body.url, self._services.livekit_url):
            token = await self._services.issuer.issue(member, "client_get_token")
        else:
            token = await self._fetch(user_id, body)
        respond(request, 200, {"jwt": token})

    async def _fetch(self, user_id: str, body: GetTokenBody) -> str:
        """Fetches a token from another homeserver, which must take part in the Matrix room."""
        homeserver = self._services.homeserver
        if body.server_name is None:
            raise unnamed_sfu()
        if homeserver.is_own_name(body.server_name):
            raise other_sfu()
        host = await homeserver.rooms.host_in_room(body.server_name, body.room_id)
        if host is None and not await homeserver.rooms.has_partial_state(body.room_id):
            raise NotInRoom()
        # This homeserver signs only what it has checked, and nothing else that the client sent.
        return await self._remote_sfus.get_token(
            host or body.server_name,
            {
                "user_id": user_id,
                "url": body.url,
                "room_id": body.room_id,
                "slot_id": body.slot_id,
                "member_id": body.member_id,
            },
        )


@attr.s(auto_attribs=True, frozen=True, slots=True)
class DelegateDelayedLeaveBody:
    """The body of `delegate_delayed_leave`. Without `url` the SFU is the one of this homeserver."""

    url: str | None = optional(fields.url)
    room_id: str = required(fields.room_id)
    slot_id: str = required(fields.string)
    member_id: str = fields.member_id()
    delay_id: str = required(fields.string)


class DelegateDelayedLeaveRestServlet(RestServlet):
    """Accepts a client's delayed leave. The module sends it when the participant has left.

    POST /_matrix/client/v1/rtc/livekit/delegate_delayed_leave HTTP/1.1
    Authorization: Bearer …

    {
        "url": "wss://sfu.example.org",
        "room_id": "!room:example.org",
        "slot_id": "m.call#ROOM",
        "member_id": "member",
        "delay_id": "syd_…"
    }
    """

    PATTERNS = _patterns(DELEGATE_DELAYED_LEAVE)
    CATEGORY = "MatrixRTC requests"

    def __init__(self, services: Services) -> None:
        super().__init__()
        self._services = services

    @raises_matrix_errors("client_delegate_delayed_leave")
    async def on_POST(self, request: SynapseRequest) -> tuple[int, JsonDict]:
        """Handles a request."""
        requester = await _requester(self._services.homeserver, request)
        user_id, device_id = requester.user.to_string(), requester.device_id
        body = read_body(request, DelegateDelayedLeaveBody)
        identities = [member_identity(user_id, body.member_id)]
        if device_id is not None:
            # The client may have joined with a token of the service endpoints.
            identities += [
                device_identity(user_id, device_id),
                device_member_identity(user_id, device_id, body.member_id),
            ]
        member = CallMember(user_id, body.room_id, body.slot_id, tuple(identities))
        await self._services.admit(member, strict=True)
        if body.url is not None and not is_same_url(body.url, self._services.livekit_url):
            raise other_sfu()
        if not await self._services.leaves.delegate(member, body.delay_id):
            raise no_such_delayed_event()
        return 200, {}
