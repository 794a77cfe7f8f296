# SPDX-License-Identifier: Apache-2.0
"""Signs a request of the check command, so that Synapse answers only with the right secret.

The key is derived from LiveKit's API secret. It is not that secret itself, because participants
hold tokens that are signed with the secret. None of these tokens may pass for a signature.
"""

from hashlib import sha256

import jwt
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

# How old a request may be, and how far the command's clock may be from Synapse's.
TOLERATED_SEC = 120


def _key(secret: str) -> bytes:
    key = HKDF(SHA256(), 32, salt=None, info=b"synapse-lk-jwt: check command")
    return key.derive(secret.encode("utf-8"))


def _digest(body: bytes) -> str:
    # Only the path below the prefix is signed, because a proxy may serve the prefix elsewhere.
    return sha256(b"POST /check\n" + body).hexdigest()


def sign(secret: str, body: bytes, now_ms: int) -> str:
    """The `Authorization` header of a request.

    Args:
        secret: LiveKit's API secret.
        body: the body that the header covers.
        now_ms: milliseconds since the epoch.
    """
    claims = {"iat": now_ms // 1000, "sha256": _digest(body)}
    return f"Bearer {jwt.encode(claims, _key(secret))}"


def is_signed(secret: str, authorization: str, body: bytes, now_ms: int) -> bool:
    """Whether `sign` made this header for this body within the tolerated time."""
    try:
        claims = jwt.decode(
            authorization.removeprefix("Bearer "),
            _key(secret),
            algorithms=["HS256"],
            # PyJWT reads the machine's clock, which is not Synapse's in its test harness.
            options={"require": ["iat"], "verify_iat": False},
        )
    except (jwt.InvalidTokenError, ValueError):
        return False
    signed_sec = claims["iat"]
    return (
        type(signed_sec) is int
        and abs(now_ms // 1000 - signed_sec) <= TOLERATED_SEC
        and claims.get("sha256") == _digest(body)
    )
