# SPDX-License-Identifier: Apache-2.0
"""MSC4195's server-server endpoint: tokens of our SFU for the users of other homeservers."""

from typing import Any

from synapse.api.errors import Codes, SynapseError
from synapse.types import JsonDict, get_domain_from_id

from synapse_lk_jwt.api.bodies import FederationGetTokenRequest, Fields
from synapse_lk_jwt.api.errors import as_matrix_errors, check_url, counts_refusals
from synapse_lk_jwt.api.services import Services
from synapse_lk_jwt.call_member import CallMember
from synapse_lk_jwt.compat.federation_servlet import BaseFederationServlet
from synapse_lk_jwt.livekit.naming import member_identity


class GetTokenFederationServlet(BaseFederationServlet):
    """A LiveKit access token for a user of the homeserver that signs the request.

    POST /_matrix/federation/v1/rtc/livekit/get_token HTTP/1.1
    Authorization: X-Matrix …

    {
        "user_id": "@user:example.com",
        "url": "wss://sfu.example.org",
        "room_id": "!room:example.org",
        "slot_id": "m.call#ROOM",
        "member_id": "member"
    }
    """

    PREFIX = r"/_matrix/federation/(?:v1|unstable/io\.element\.msc4195)"
    PATH = "/rtc/livekit/get_token"
    CATEGORY = "Federation requests"

    def __init__(self, services: Services, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._services = services

    @counts_refusals("federation_get_token")
    async def on_POST(
        self, origin: str, content: JsonDict, query: dict[bytes, list[bytes]]
    ) -> tuple[int, JsonDict]:
        """Handles a request that `origin` has signed."""
        body = FederationGetTokenRequest.from_json(Fields(content))
        if get_domain_from_id(body.user_id) != origin:
            raise SynapseError(403, "The user is not one of yours", Codes.FORBIDDEN)
        await self._services.limits.ask_for_token(body.user_id, body.room_id)
        with as_matrix_errors():
            await self._services.issuer.check_membership(body.user_id, body.room_id, strict=True)
            check_url(body.url, self._services.livekit_url)
            identity = member_identity(body.user_id, body.member_id)
            member = CallMember(body.user_id, body.room_id, body.slot_id, (identity,))
            token = await self._services.issuer.issue(member, "federation_get_token")
        return 200, {"jwt": token}
