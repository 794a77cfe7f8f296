# SPDX-License-Identifier: Apache-2.0
"""A participant as this module sees it: bounded, and with its owner resolved once.

Webhooks and answers of LiveKit hold strings that a participant chooses. They become one of these
classes where they come in, and no protobuf travels further.
"""

from collections.abc import Sequence

import attr
from livekit.protocol.models import ParticipantInfo

from synapse_lk_jwt.identifiers import is_clean
from synapse_lk_jwt.livekit.naming import MAX_IDENTITY_BYTES, livekit_room_name
from synapse_lk_jwt.livekit.ownership import OwnerSealer, ParticipantOwner

# LiveKit limits the identity in a token to 256 bytes, and appends `#` and the value of `publish`
# afterwards. No client needs more than this for both.
MAX_WHOLE_IDENTITY_BYTES = MAX_IDENTITY_BYTES + 64


@attr.s(auto_attribs=True, frozen=True, slots=True)
class CallParticipant:
    """One session of one participant.

    Attributes:
        identity: the participant identity, `MAX_WHOLE_IDENTITY_BYTES` at most.
        sid: LiveKit's name for the session.
        state: how far its connection is, a `ParticipantInfo.State`.
        disconnect_reason: why it ended, a `DisconnectReason`.
        joined_at: when it joined, in seconds since the epoch.
        owner: whose participant it is, as sealed into the token for this very LiveKit room; None if
            neither this homeserver nor another one with the same secret sealed it.
    """

    identity: str
    sid: str
    state: int
    disconnect_reason: int
    joined_at: int
    owner: ParticipantOwner | None

    @property
    def can_be_stored(self) -> bool:
        """Whether PostgreSQL stores the identity: a duplicate connection can have a NUL in it."""
        return is_clean(self.identity)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Listing:
    """The participants of a LiveKit room at some time.

    Attributes:
        asked_ms: when LiveKit was asked, in milliseconds since the epoch.
        participants: all participants of users but those below.
        too_long: whole identities above `MAX_WHOLE_IDENTITY_BYTES`. No client has one. They are
            good for nothing but removing these participants.
        is_complete: False if there are more participants, or identities too long to be named.
    """

    asked_ms: int
    participants: Sequence[CallParticipant]
    too_long: Sequence[str] = ()
    is_complete: bool = True


def is_of_user(info: ParticipantInfo) -> bool:
    """Whether a participant may be a user's: agents, recorders, SIP callers and the like are not.

    LiveKit takes the kind from the token, and this module signs tokens of the standard kind only.
    """
    return info.kind == ParticipantInfo.Kind.STANDARD


def is_too_long(identity: str) -> bool:
    """Whether an identity is longer than any client's, with whatever it is followed by."""
    return (
        len(identity) > MAX_WHOLE_IDENTITY_BYTES
        or len(identity.encode("utf-8", "replace")) > MAX_WHOLE_IDENTITY_BYTES
    )


def call_participant(
    info: ParticipantInfo, livekit_room: str, sealer: OwnerSealer
) -> CallParticipant:
    """What a webhook or a listing says of a participant.

    Args:
        info: as LiveKit sent it. The identity must not be too long.
        livekit_room: the LiveKit room that it is in.
        sealer: opens the owner.
    """
    owner = sealer.open(info.attributes, info.identity)
    if owner is not None and livekit_room_name(owner.room_id, owner.slot_id) != livekit_room:
        owner = None
    return CallParticipant(
        info.identity, info.sid[:64], info.state, info.disconnect_reason, info.joined_at, owner
    )
