# SPDX-License-Identifier: Apache-2.0
"""LiveKit access tokens, and the signatures of LiveKit's webhooks.

The claims are livekit-api's. This module does not use its `AccessToken` class, because that reads
the machine's clock and not Synapse's.
"""

import hmac
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import attr
import jwt
from jwt.utils import base64url_decode
from livekit.api import VideoGrants
from livekit.api.access_token import Claims

from synapse_lk_jwt.untrusted import parse_json

# Long enough for one request, and for a small difference between the clocks.
API_TOKEN_LIFETIME_SEC = 60

# The largest difference between LiveKit's clock and ours; livekit-api allows the same.
LEEWAY_SEC = 60

# The claim `roomPreset` with a room configuration that no LiveKit has. LiveKit resolves the name
# only when it creates a room, and fails then; the holder can join a room that exists. LiveKit's own
# `auto_create: false` is no substitute, because `/whip/v1` creates rooms regardless of it.
MUST_NOT_CREATE = "synapse_lk_jwt.must_not_create"


class InvalidSignature(Exception):
    """LiveKit has not signed a webhook. The text names the cause, for the log only.

    Attributes:
        cause: `bad_signature`, `wrong_time` or `wrong_body`.
    """

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause


@attr.s(auto_attribs=True, frozen=True, slots=True)
class TokenSigner:
    """Signs tokens with the SFU's API key.

    Attributes:
        key: LiveKit's API key (`iss`).
        secret: the secret of that key.
        time_msec: Synapse's clock, milliseconds since the epoch.
        other_pairs: further keys and secrets that LiveKit may sign webhooks with.
    """

    key: str
    secret: str = attr.ib(repr=False)
    time_msec: Callable[[], int]
    other_pairs: Mapping[str, str] = attr.ib(factory=dict, repr=False)
    # PyJWT inspects a plain secret at each call, which takes longer than the signature.
    _jwk: jwt.PyJWK = attr.ib(init=False, repr=False, eq=False)

    @_jwk.default
    def _make_jwk(self) -> jwt.PyJWK:
        secret = urlsafe_b64encode(self.secret.encode("utf-8")).decode("ascii")
        return jwt.PyJWK({"kty": "oct", "alg": "HS256", "k": secret})

    def has_key(self, key: object) -> bool:
        """Whether an API key is one of ours."""
        return isinstance(key, str) and (key == self.key or key in self.other_pairs)

    def participant_token(
        self,
        identity: str,
        livekit_room: str,
        *,
        may_create_room: bool,
        can_publish: bool,
        can_update_own_metadata: bool,
        attributes: Mapping[str, str],
        lifetime_ms: int,
    ) -> str:
        """A token to join one LiveKit room as one participant.

        `roomCreate` is always false: the grant also lets its holder delete any room.

        Args:
            identity: the participant identity (`sub`).
            livekit_room: the LiveKit room name.
            may_create_room: whether LiveKit may create the room when the participant connects.
            can_publish: whether the participant may publish, data included.
            can_update_own_metadata: whether it may change its name, metadata and attributes.
            attributes: LiveKit returns them wherever it describes the participant.
            lifetime_ms: milliseconds until the token expires.
        """
        video = {**_video_claim(can_publish, can_update_own_metadata), "room": livekit_room}
        claims: dict[str, Any] = {"video": video, "attributes": attributes}
        if not may_create_room:
            claims["roomPreset"] = MUST_NOT_CREATE
        return self._sign(claims, lifetime_ms // 1000, identity)

    def api_token(self, grants: VideoGrants) -> str:
        """A token for one request to LiveKit's server API."""
        return self._sign(Claims(video=grants).asdict(), API_TOKEN_LIFETIME_SEC, identity="")

    def verify_webhook(self, authorization: str) -> str:
        """Checks that LiveKit has signed a webhook recently.

        The rules are livekit-api's `WebhookReceiver`, which reads the machine's clock
        (https://docs.livekit.io/home/server/webhooks/).

        Args:
            authorization: the header of that name, a JWT.

        Returns:
            The hash of the body that LiveKit has signed, for `verify_webhook_body`.

        Raises:
            InvalidSignature: if LiveKit has not signed it, or has signed it too long ago.
        """
        key, secret = self.key, self.secret
        named = unverified_claims(authorization).get("iss")
        if isinstance(named, str) and named in self.other_pairs:
            key, secret = named, self.other_pairs[named]
        try:
            claims = jwt.decode(
                authorization,
                secret,
                algorithms=["HS256"],
                issuer=key,
                options={
                    "require": ["exp"],
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                    "verify_aud": False,
                },
            )
        except (jwt.InvalidTokenError, ValueError) as e:
            # Some of PyJWT's messages quote the token.
            raise InvalidSignature("bad_signature", type(e).__name__) from None
        now = self.time_msec() / 1000
        try:
            is_current = claims.get("nbf", 0) - LEEWAY_SEC <= now <= claims["exp"] + LEEWAY_SEC
        except TypeError:
            is_current = False
        if not is_current:
            raise InvalidSignature("wrong_time", "it is too old, or the clocks differ")
        return str(claims.get("sha256", ""))

    def _sign(self, claims: dict[str, Any], lifetime_sec: int, identity: str) -> str:
        now = self.time_msec() // 1000
        claims.update(sub=identity, iss=self.key, nbf=now, exp=now + lifetime_sec)
        return jwt.encode(claims, self._jwk)


def unverified_claims(token: str) -> Mapping[str, Any]:
    """The claims of a JWT, which prove nothing; empty if this is no JWT."""
    try:
        claims = parse_json(base64url_decode(token.split(".")[1]))
    except (ValueError, IndexError):
        return {}
    return claims if isinstance(claims, dict) else {}


def verify_webhook_body(signed: str, sha256: bytes) -> None:
    """Checks that a webhook has the body that LiveKit has signed.

    Args:
        signed: the hash that `TokenSigner.verify_webhook` returned.
        sha256: the hash of the body that was received.

    Raises:
        InvalidSignature: if LiveKit has signed another body.
    """
    if not hmac.compare_digest(signed.encode("utf-8", "replace"), b64encode(sha256)):
        raise InvalidSignature("wrong_body", "LiveKit signed another body")


@lru_cache
def _video_claim(can_publish: bool, can_update_own_metadata: bool) -> Mapping[str, Any]:
    """The claim `video` without the room. livekit-api needs longer for it than for a signature."""
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


def rejected_option(body: bytes) -> str | None:
    """The option that LiveKit's 401 concerns, according to its text.

    LiveKit 1.13.6 changed `invalid token` to `invalid authorization token`.

    Returns:
        `livekit_key` if LiveKit does not know the key, `livekit_secret` if LiveKit has another
        secret for it or its clock differs, None if the text is another.
    """
    if body.startswith(b"invalid API key"):
        return "livekit_key"
    if body.startswith((b"invalid token", b"invalid authorization token")):
        return "livekit_secret"
    return None
