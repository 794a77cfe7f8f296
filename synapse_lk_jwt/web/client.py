# SPDX-License-Identifier: Apache-2.0
"""MSC4195's client-server endpoint: tokens for clients, by their Matrix access token."""

import re

from synapse.api.errors import Codes, SynapseError
from synapse.http.servlet import RestServlet
from synapse.http.site import SynapseRequest

from synapse_lk_jwt.homeserver import Homeserver
from synapse_lk_jwt.issuer import Issuer, NotInRoom
from synapse_lk_jwt.limits import Limits
from synapse_lk_jwt.remote import RemoteSfus
from synapse_lk_jwt.sfu.names import member_identity
from synapse_lk_jwt.web.answers import respond
from synapse_lk_jwt.web.errors import as_matrix_errors, check_url
from synapse_lk_jwt.web.requests import HomeserverGetTokenRequest, read_json_object


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

    PATTERNS = (
        re.compile(r"^/_matrix/client/(?:v1|unstable/io\.element\.msc4195)/rtc/livekit/get_token$"),
    )
    CATEGORY = "MatrixRTC requests"

    def __init__(
        self,
        homeserver: Homeserver,
        issuer: Issuer,
        limits: Limits,
        remote_sfus: RemoteSfus,
        livekit_url: str,
    ) -> None:
        super().__init__()
        self._homeserver = homeserver
        self._issuer = issuer
        self._limits = limits
        self._remote_sfus = remote_sfus
        self._livekit_url = livekit_url

    async def on_POST(self, request: SynapseRequest) -> None:
        """Handles a request; the user is authenticated before anything of the body is looked at."""
        requester = await self._homeserver.get_user_by_req(request, allow_guest=True)
        user_id = requester.user.to_string()
        if not await self._homeserver.is_active(user_id):
            # Synapse itself turns away all of these but the suspended.
            raise SynapseError(401, "This account cannot be used", Codes.UNAUTHORIZED)
        body = HomeserverGetTokenRequest.from_json(read_json_object(request))
        await self._limits.ask_for_token(user_id, body.room_id)
        with as_matrix_errors():
            await self._issuer.check_membership(user_id, body.room_id, strict=True)
            if body.server_name in (None, self._homeserver.server_name):
                check_url(body.url, self._livekit_url)
                identity = member_identity(user_id, body.member_id)
                token = await self._issuer.issue(user_id, body.room_id, body.slot_id, identity)
            else:
                token = await self._ask(body.server_name, user_id, body)
        respond(request, 200, {"jwt": token})

    async def _ask(self, server_name: str, user_id: str, body: HomeserverGetTokenRequest) -> str:
        room_id = body.room_id
        if not await self._homeserver.is_in_room(
            server_name, room_id
        ) and not await self._homeserver.has_partial_state(room_id):
            raise NotInRoom()
        # What is signed is what was checked, and nothing else that a client sent.
        return await self._remote_sfus.get_token(
            server_name,
            {
                "user_id": user_id,
                "url": body.url,
                "room_id": room_id,
                "slot_id": body.slot_id,
                "member_id": body.member_id,
            },
        )
