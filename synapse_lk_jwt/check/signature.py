# SPDX-License-Identifier: Apache-2.0
"""How a running Synapse knows that it is asked by somebody who may read its configuration.

The key is derived from LiveKit's API secret and is not that secret: participants hold tokens that
are signed with it, and nothing of LiveKit's must pass for a question of the check command.
"""

import jwt
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

LIFETIME_SEC = 300


def _key(secret: str) -> bytes:
    key = HKDF(SHA256(), 32, salt=None, info=b"synapse-lk-jwt: check command")
    return key.derive(secret.encode("utf-8"))


def sign(secret: str, now_ms: int) -> str:
    """The `Authorization` header of a question.

    Args:
        secret: LiveKit's API secret.
        now_ms: milliseconds since the epoch.
    """
    return f"Bearer {jwt.encode({'exp': now_ms // 1000 + LIFETIME_SEC}, _key(secret))}"


def is_signed(secret: str, authorization: str, now_ms: int) -> bool:
    """Whether the header of that name was made with `sign`, and not long ago."""
    try:
        claims = jwt.decode(
            authorization.removeprefix("Bearer "),
            _key(secret),
            algorithms=["HS256"],
            # Against Synapse's clock, and generously: nothing but reading comes of it.
            options={"require": ["exp"], "verify_exp": False},
        )
    except (jwt.InvalidTokenError, ValueError):
        return False
    expires = claims["exp"]
    return isinstance(expires, int) and abs(now_ms // 1000 - expires) <= 2 * LIFETIME_SEC
