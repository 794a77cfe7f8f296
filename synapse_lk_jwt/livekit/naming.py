# SPDX-License-Identifier: Apache-2.0
"""LiveKit room names and participant identities, derived from Matrix IDs.

Both are hashed so that the SFU learns neither rooms nor users, and must come out the same on every
homeserver and client: MSC4195 gives the derivation. The three identities must never be mixed; a
wrong one connects the call and decrypts nothing.
"""

import hashlib
import re
from collections.abc import Iterator

from canonicaljson import encode_canonical_json
from unpaddedbase64 import encode_base64

# The slot that clients mean when they ask `/sfu/get`, which has no field for it.
DEFAULT_SLOT = "m.call#ROOM"

# LiveKit refuses longer ones.
MAX_IDENTITY_BYTES = 256

# The names of LiveKit rooms that are of no call begin so: the checks make them up.
CHECK_ROOM = "synapse-lk-jwt-check-"

# A device that begins with digits and a colon gets no token: these are the port of the server.
_DEVICE_IDENTITY = re.compile(
    r"(@[^:]*:(?:\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::[0-9]+(?=:))?):.*", re.DOTALL
)


def _hash(*parts: str) -> str:
    return encode_base64(hashlib.sha256(encode_canonical_json(parts)).digest())


def livekit_room_name(room_id: str, slot_id: str) -> str:
    """The LiveKit room of a slot (MSC4143) of a Matrix room; MSC4195, 'LiveKit room name'."""
    return _hash(room_id, slot_id)


def device_identity(user_id: str, device_id: str) -> str:
    """The participant identity of `/sfu/get`: user and device in plain text."""
    return f"{user_id}:{device_id}"


def user_of_device_identity(identity: str) -> str | None:
    """The user of an identity that `device_identity` made, or of a duplicate connection of it."""
    match = _DEVICE_IDENTITY.fullmatch(identity)
    return match and match[1]


def is_connection_of(identity: str, base: str) -> bool:
    """Whether an identity is `base`, or a duplicate connection of its holder.

    The holder of a token can also connect as `identity#anything` (LiveKit's `?publish=`).
    """
    return identity == base or identity.startswith(f"{base}#")


def possible_bases(identity: str) -> Iterator[str]:
    """The identities whose owner may be noted for this connection, itself among them.

    A hash has no `#` in it, so that a duplicate connection of a hashed identity begins with the
    hash and the first `#`. Identities in plain text may have more of them, and name their user
    themselves: see `user_of_device_identity`. To try each `#` would be hundreds of hashes for one
    participant.
    """
    yield identity
    base, separator, _ = identity.partition("#")
    if separator:
        yield base


def hash_of_identity(identity: str) -> str:
    """What the owner of an identity is noted by: PostgreSQL's indexes take no long strings."""
    return _hash(identity)


def device_member_identity(user_id: str, device_id: str, member_id: str) -> str:
    """The participant identity of the service's `/get_token`."""
    return _hash(user_id, device_id, member_id)


def member_identity(user_id: str, member_id: str) -> str:
    """The participant identity of MSC4195's homeserver endpoints."""
    return _hash(user_id, member_id)
