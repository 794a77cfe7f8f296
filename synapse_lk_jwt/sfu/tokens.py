# SPDX-License-Identifier: Apache-2.0
"""LiveKit access tokens.

The claims are livekit-api's. Its `AccessToken` class is left out because it reads the machine's
clock, while all of this follows Synapse's.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import attr
import jwt
from livekit.api import VideoGrants
from livekit.api.access_token import Claims

# Long enough for the one request that it is made for, and for clocks that are a little apart.
API_TOKEN_LIFETIME_SEC = 60


@attr.s(auto_attribs=True, frozen=True, slots=True)
class TokenSigner:
    """Signs tokens with the SFU's API key.

    Attributes:
        key: LiveKit's API key (`iss`).
        secret: the secret of that key.
        time_msec: Synapse's clock, milliseconds since the epoch.
    """

    key: str
    secret: str = attr.ib(repr=False)
    time_msec: Callable[[], int]

    def participant_token(
        self,
        identity: str,
        livekit_room: str,
        *,
        can_publish: bool,
        can_update_own_metadata: bool,
        lifetime_ms: int,
    ) -> str:
        """A token to join one LiveKit room as one participant.

        `roomCreate` is always false: the grant also lets its holder delete any room.

        Args:
            identity: the participant identity (`sub`).
            livekit_room: the LiveKit room name.
            can_publish: whether the participant may publish, data included.
            can_update_own_metadata: whether it may change its name, metadata and attributes.
            lifetime_ms: milliseconds until the token cannot be used any more.
        """
        video = {**_video_claim(can_publish, can_update_own_metadata), "room": livekit_room}
        return self._sign({"video": video}, lifetime_ms // 1000, identity)

    def api_token(self, grants: VideoGrants) -> str:
        """A token for one request to LiveKit's server API."""
        return self._sign(Claims(video=grants).asdict(), API_TOKEN_LIFETIME_SEC, identity="")

    def _sign(self, claims: dict[str, Any], lifetime_sec: int, identity: str) -> str:
        now = self.time_msec() // 1000
        claims.update(sub=identity, iss=self.key, nbf=now, exp=now + lifetime_sec)
        return jwt.encode(claims, self.secret, algorithm="HS256")


@lru_cache
def _video_claim(can_publish: bool, can_update_own_metadata: bool) -> Mapping[str, Any]:
    """What all tokens of a kind have in common; livekit-api takes longer for it than to sign."""
    grants = VideoGrants(
        room_join=True,
        room_create=False,
        can_subscribe=True,
        can_publish=can_publish,
        can_publish_data=can_publish,
        can_update_own_metadata=can_update_own_metadata,
        hidden=False,
    )
    claims: dict[str, Any] = Claims(video=grants).asdict()
    return MappingProxyType(claims["video"])
