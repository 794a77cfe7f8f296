# SPDX-License-Identifier: Apache-2.0
"""MSC4195's client-server endpoints: for clients, by their Matrix access token."""

import re

from synapse.api.errors import Codes, SynapseError
from synapse.http.servlet import RestServlet
from synapse.http.site import SynapseRequest
from synapse.module_api import Requester
from synapse.types import JsonDict

from synapse_lk_jwt.api.answers import respond
from synapse_lk_jwt.api.bodies import (
    HomeserverDelegateRequest,
    HomeserverGetTokenRequest,
    read_json_object,
)
from synapse_lk_jwt.api.errors import (
    as_matrix_errors,
    check_url,
    counts_refusals,
    no_such_delayed_event,
    no_such_sfu,
    other_sfu,
)
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
from synapse_lk_jwt.remote_tokens import RemoteSfus


def _patterns(name: str) -> tuple["re.Pattern[str]", ...]:
    versions = r"(?:v1|unstable/io\.element\.msc4195)"
    return (re.compile(f"^/_matrix/client/{versions}/rtc/livekit/{name}$"),)


async def _requester(homeserver: Homeserver, request: SynapseRequest) -> Requester:
    """Who asks; authenticated before anything of the body is looked at."""
    requester = await homeserver.users.get_user_by_req(request, allow_guest=True)
    if not await homeserver.users.is_active(requester.user.to_string()):
        # Synapse itself turns away all of these but the suspended.
        raise SynapseError(401, "This account cannot be used", Codes.UNAUTHORIZED)
    return requester


class GetTokenRestServlet(RestServlet):
    """A LiveKit access token for the SFU of this homeserver or of another one.

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

    PATTERNS = _patterns("get_token")
    CATEGORY = "MatrixRTC requests"

    def __init__(self, services: Services, remote_sfus: RemoteSfus) -> None:
        super().__init__()
        self._services = services
        self._remote_sfus = remote_sfus

    @counts_refusals("client_get_token")
    async def on_POST(self, request: SynapseRequest) -> None:
        """Handles a request."""
        requester = await _requester(self._services.homeserver, request)
        user_id = requester.user.to_string()
        body = HomeserverGetTokenRequest.from_json(read_json_object(request))
        await self._services.homeserver.users.check_auth_blocking(user_id)
        await self._services.limits.ask_for_token(user_id, body.room_id)
        with as_matrix_errors():
            await self._services.issuer.check_membership(user_id, body.room_id, strict=True)
            # Our SFU's URL decides, whichever server the client names with it.
            if is_same_url(body.url, self._services.livekit_url):
                identity = member_identity(user_id, body.member_id)
                member = CallMember(user_id, body.room_id, body.slot_id, (identity,))
                token = await self._services.issuer.issue(member, "client_get_token")
            elif body.server_name is None:
                raise no_such_sfu()
            elif self._services.homeserver.is_own_name(body.server_name):
                raise other_sfu()
            else:
                token = await self._ask(body.server_name, user_id, body)
        respond(request, 200, {"jwt": token})

    async def _ask(self, server_name: str, user_id: str, body: HomeserverGetTokenRequest) -> str:
        room_id = body.room_id
        homeserver = self._services.homeserver
        host = await homeserver.rooms.host_in_room(server_name, room_id)
        if host is None and not await homeserver.rooms.has_partial_state(room_id):
            raise NotInRoom()
        # What is signed is what was checked, and nothing else that a client sent.
        return await self._remote_sfus.get_token(
            host or server_name,
            {
                "user_id": user_id,
                "url": body.url,
                "room_id": room_id,
                "slot_id": body.slot_id,
                "member_id": body.member_id,
            },
        )


class DelegateDelayedLeaveRestServlet(RestServlet):
    """Has the homeserver send a client's leave when the client is gone.

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

    PATTERNS = _patterns("delegate_delayed_leave")
    CATEGORY = "MatrixRTC requests"

    def __init__(self, services: Services) -> None:
        super().__init__()
        self._services = services

    @counts_refusals("client_delegate_delayed_leave")
    async def on_POST(self, request: SynapseRequest) -> tuple[int, JsonDict]:
        """Handles a request."""
        requester = await _requester(self._services.homeserver, request)
        user_id = requester.user.to_string()
        body = HomeserverDelegateRequest.from_json(read_json_object(request))
        await self._services.limits.ask_for_token(user_id, body.room_id)
        with as_matrix_errors():
            await self._services.issuer.check_membership(user_id, body.room_id, strict=True)
        if body.url is not None:
            check_url(body.url, self._services.livekit_url)
        identities = [member_identity(user_id, body.member_id)]
        if requester.device_id is not None:
            # The client may have joined with a token of the service endpoints.
            identities += [
                device_identity(user_id, requester.device_id),
                device_member_identity(user_id, requester.device_id, body.member_id),
            ]
        member = CallMember(user_id, body.room_id, body.slot_id, tuple(identities))
        if not await self._services.leaves.delegate(member, body.delay_id):
            raise no_such_delayed_event()
        return 200, {}
