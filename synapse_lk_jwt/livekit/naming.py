# SPDX-License-Identifier: Apache-2.0
"""LiveKit room names and participant identities, derived from Matrix IDs.

MSC4195 defines the derivation. Most names are hashes, so that the SFU learns neither rooms nor
users. Every homeserver and client must derive the same names. Each endpoint has its own form of
identity: a client with the wrong one joins the call, but the others cannot decrypt its media.
"""

import hashlib
import re
from collections.abc import Iterator

from canonicaljson import encode_canonical_json
from unpaddedbase64 import encode_base64

# The slot of requests to `/sfu/get`, which has no field for it.
DEFAULT_SLOT = "m.call#ROOM"

# LiveKit rejects tokens with longer identities.
MAX_IDENTITY_BYTES = 256

# The check command and the checks at start use LiveKit rooms with this prefix, which are no calls.
CHECK_ROOM = "synapse-lk-jwt-check-"

# Digits between two colons are the port of the server, because the endpoints issue no token to a
# device whose ID begins with digits and a colon.
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
    """The identities whose noted owner may own this connection, itself among them.

    A hash contains no `#`, so the hash of a duplicate connection ends at the first `#`. Identities
    in plain text may contain more of them, but they name their user: see `user_of_device_identity`.
    A participant can choose an identity with hundreds of `#`. Trying each would take hundreds of
    hashes.
    """
    yield identity
    base, separator, _ = identity.partition("#")
    if separator:
        yield base


def hash_of_identity(identity: str) -> str:
    """The key of an identity in the table of owners: PostgreSQL cannot index long strings."""
    return _hash(identity)


def device_member_identity(user_id: str, device_id: str, member_id: str) -> str:
    """The participant identity of the service's `/get_token`."""
    return _hash(user_id, device_id, member_id)


def member_identity(user_id: str, member_id: str) -> str:
    """The participant identity of MSC4195's homeserver endpoints."""
    return _hash(user_id, member_id)
