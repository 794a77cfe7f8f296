# SPDX-License-Identifier: Apache-2.0
"""The owner of a participant, sealed into the attributes of the LiveKit access token.

Two of the three participant identities are hashes, which name no user. LiveKit returns the
attributes of a token in every webhook and in ListParticipants, and participants cannot change them
(unless `can_update_own_metadata` is on). So the module recognises its participants without a
database row for each token. The SFU and the other participants see random bytes.
"""

import json
import os
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from contextlib import suppress

import attr
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from synapse.types import get_domain_from_id

from synapse_lk_jwt.livekit.naming import is_connection_of
from synapse_lk_jwt.untrusted import parse_json

ATTRIBUTE = "synapse_lk_jwt"

_NONCE_BYTES = 12


@attr.s(auto_attribs=True, frozen=True, slots=True)
class ParticipantOwner:
    """The user that a token was issued to, and the call that it was issued for.

    Attributes:
        user_id: the user.
        room_id: the Matrix room.
        slot_id: the slot in it.
        issuer: the server name of the homeserver that issued the token. Several homeservers can
            share a LiveKit and its secret. None if the seal names no issuer.
    """

    user_id: str
    room_id: str
    slot_id: str
    issuer: str | None = None

    def is_issued_by(self, server_name: str) -> bool:
        """Whether a homeserver issued the token, or may have issued it."""
        return self.issuer in (None, server_name)

    def concerns(self, server_name: str) -> bool:
        """Whether a homeserver issued the token, or is the user's homeserver."""
        return self.is_issued_by(server_name) or get_domain_from_id(self.user_id) == server_name


class OwnerSealer:
    """Seals and opens with keys that only holders of the SFU's API secrets can derive."""

    def __init__(self, secret: str, *others: str) -> None:
        """
        Args:
            secret: the API secret to seal with.
            others: further API secrets to open with. A participant keeps the attributes of the
                token that it joined with, also after an admin has changed the secret.
        """
        self._cipher, *self._others = map(_cipher, (secret, *others))

    def seal(self, owner: ParticipantOwner, identity: str) -> dict[str, str]:
        """The attributes for the token of a participant identity."""
        nonce = os.urandom(_NONCE_BYTES)
        parts = [identity, owner.user_id, owner.room_id, owner.slot_id, owner.issuer]
        text = json.dumps(parts).encode("ascii")
        sealed = nonce + self._cipher.encrypt(nonce, text, None)
        return {ATTRIBUTE: urlsafe_b64encode(sealed).decode("ascii")}

    def open(self, attributes: Mapping[str, str], identity: str) -> ParticipantOwner | None:
        """The owner of a participant, from its attributes.

        Returns:
            None if no holder of the secret sealed it. Also None if it was sealed for an identity
            that is neither this one nor the one that this duplicates.
        """
        sealed = attributes.get(ATTRIBUTE)
        if sealed is None:
            return None
        try:
            data = urlsafe_b64decode(sealed)
            text = self._decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:])
            sealed_for, *owner = parse_json(text)
            return ParticipantOwner(*owner) if is_connection_of(identity, sealed_for) else None
        except (ValueError, TypeError, InvalidTag):
            return None

    def _decrypt(self, nonce: bytes, sealed: bytes) -> bytes:
        for cipher in (self._cipher, *self._others):
            with suppress(InvalidTag):
                return cipher.decrypt(nonce, sealed, None)
        raise InvalidTag


def _cipher(secret: str) -> AESGCM:
    key = HKDF(SHA256(), 32, salt=None, info=b"synapse-lk-jwt: owner of a participant")
    return AESGCM(key.derive(secret.encode("utf-8")))
