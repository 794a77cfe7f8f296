# SPDX-License-Identifier: Apache-2.0
"""MSC4195's server-server endpoint, which other homeservers call for their users."""

from typing import Any

import attr
from synapse.api.errors import Codes, SynapseError
from synapse.types import JsonDict, get_domain_from_id

from synapse_lk_jwt.api import fields
from synapse_lk_jwt.api.errors import other_sfu, raises_matrix_errors
from synapse_lk_jwt.api.fields import from_json, required
from synapse_lk_jwt.api.services import Services
from synapse_lk_jwt.call_member import CallMember
from synapse_lk_jwt.compat.federation_servlet import BaseFederationServlet
from synapse_lk_jwt.identifiers import is_same_url
from synapse_lk_jwt.livekit.naming import member_identity
from synapse_lk_jwt.msc4195 import ANY_VERSION, GET_TOKEN, federation_path


@attr.s(auto_attribs=True, frozen=True, slots=True)
class GetTokenBody:
    """The body of `get_token`."""

    user_id: str = required(fields.user_id)
    url: str = required(fields.url)
    room_id: str = required(fields.room_id)
    slot_id: str = required(fields.string)
    member_id: str = fields.member_id()


class GetTokenFederationServlet(BaseFederationServlet):
    """Issues a token for our SFU, to a user of the homeserver that signs the request.

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

    PREFIX = ""
    PATH = federation_path(GET_TOKEN, ANY_VERSION)
    CATEGORY = "Federation requests"

    def __init__(self, services: Services, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._services = services

    @raises_matrix_errors("federation_get_token")
    async def on_POST(
        self, origin: str, content: JsonDict, query: dict[bytes, list[bytes]]
    ) -> tuple[int, JsonDict]:
        """Handles a request that `origin` has signed."""
        body = from_json(GetTokenBody, content)
        if get_domain_from_id(body.user_id) != origin:
            text = "user_id is not a user of the homeserver that signed the request"
            raise SynapseError(403, text, Codes.FORBIDDEN)
        identity = member_identity(body.user_id, body.member_id)
        member = CallMember(body.user_id, body.room_id, body.slot_id, (identity,))
        await self._services.admit(member, strict=True)
        if not is_same_url(body.url, self._services.livekit_url):
            raise other_sfu()
        token = await self._services.issuer.issue(member, "federation_get_token")
        return 200, {"jwt": token}
