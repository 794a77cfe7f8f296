# SPDX-License-Identifier: Apache-2.0
"""Requests to LiveKit's RoomService, independent of the HTTP client that sends them.

LiveKit's server API is Twirp, which is protobuf over HTTP POST
(https://docs.livekit.io/reference/other/roomservice-api/).
"""

import attr
from google.protobuf.message import Message
from livekit.api import VideoGrants

from synapse_lk_jwt.livekit.tokens import TokenSigner

# The path of RoomService's methods below LiveKit's URL.
ROOM_SERVICE = "/twirp/livekit.RoomService"


@attr.s(auto_attribs=True, frozen=True, slots=True)
class RoomServiceRequest:
    """A POST to LiveKit's API.

    Attributes:
        url: the whole URL.
        token: the token for this one request.
        body: the encoded message.
    """

    url: str
    token: str = attr.ib(repr=False)
    body: bytes

    @property
    def headers(self) -> dict[str, str]:
        """The headers, the token among them."""
        return {
            "Authorization": f"Bearer {self.token}",
            "Content-Type": "application/protobuf",
        }


def room_service_request(
    api_url: str, method: str, message: Message, grants: VideoGrants, signer: TokenSigner
) -> RoomServiceRequest:
    """A request to one method of RoomService.

    Args:
        api_url: where LiveKit's API is, without a slash at the end.
        method: the name of the method, such as `ListRooms`.
        message: its argument.
        grants: what the token for this request allows.
        signer: signs that token.
    """
    token = signer.api_token(grants)
    url = f"{api_url}{ROOM_SERVICE}/{method}"
    return RoomServiceRequest(url, token, message.SerializeToString())
