# SPDX-License-Identifier: Apache-2.0
"""A participant as this module sees it: bounded, and with its owner resolved once.

Webhooks and answers of LiveKit hold strings that a participant chooses. They become one of these
classes where they enter the module, and no protobuf travels further.
"""

from collections.abc import Iterable, Sequence

import attr
from livekit.protocol.models import ParticipantInfo

from synapse_lk_jwt.identifiers import is_clean
from synapse_lk_jwt.livekit.naming import (
    MAX_IDENTITY_BYTES,
    livekit_room_name,
    user_of_device_identity,
)
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
        state: the state of its connection, a `ParticipantInfo.State`.
        disconnect_reason: why the session ended, a `DisconnectReason`.
        joined_at: when it joined, in seconds since the epoch.
        owner: the owner that was sealed into the token for this LiveKit room. None if no homeserver
            with the same secret sealed it.
        user_id: the user, None if unknown. The sealed owner names the user, else an identity in
            plain text does: lk-jwt-service seals no owner into its tokens. `ParticipantOwners`
            replaces the user if participants can replace the sealed owner.
    """

    identity: str
    sid: str
    state: int
    disconnect_reason: int
    joined_at: int
    owner: ParticipantOwner | None
    user_id: str | None

    @property
    def can_be_stored(self) -> bool:
        """Whether PostgreSQL can store the identity. That of a duplicate can contain a NUL."""
        return is_clean(self.identity)

    def is_issued_by(self, server_name: str) -> bool:
        """Whether a homeserver issued the token, or may have issued it."""
        return self.owner is None or self.owner.is_issued_by(server_name)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Listing:
    """The participants of a LiveKit room at some time.

    Attributes:
        requested_ts: when the module requested it, in milliseconds since the epoch.
        participants: all participants of users, except those in `too_long`.
        too_long: whole identities above `MAX_WHOLE_IDENTITY_BYTES`. No client has one. They are
            listed only to remove these participants.
        is_complete: False if there are more participants, or identities too long to be named.
    """

    requested_ts: int
    participants: Sequence[CallParticipant]
    too_long: Sequence[str] = ()
    is_complete: bool = True


def matrix_room(participants: Iterable[CallParticipant], server_name: str) -> str | None:
    """The Matrix room of a call, from the owners that concern a homeserver; None without any."""
    owners = (participant.owner for participant in participants)
    return next((o.room_id for o in owners if o and o.concerns(server_name)), None)


def is_shared(participants: Iterable[CallParticipant], server_name: str) -> bool:
    """Whether another homeserver, which uses the same LiveKit, issued one of the tokens."""
    return any(not participant.is_issued_by(server_name) for participant in participants)


def is_of_user(info: ParticipantInfo) -> bool:
    """Whether a participant may be a user's: agents, recorders, SIP callers and the like are not.

    LiveKit reads the kind from the token, and this module signs tokens of the standard kind only.
    """
    return info.kind == ParticipantInfo.Kind.STANDARD


def is_too_long(identity: str) -> bool:
    """Whether an identity is longer than any client's, with the part that LiveKit appends."""
    return (
        len(identity) > MAX_WHOLE_IDENTITY_BYTES
        or len(identity.encode("utf-8", "replace")) > MAX_WHOLE_IDENTITY_BYTES
    )


def call_participant(
    info: ParticipantInfo, livekit_room: str, sealer: OwnerSealer
) -> CallParticipant:
    """The participant that a webhook or a listing names.

    Args:
        info: as LiveKit sent it. The identity must not be too long.
        livekit_room: the LiveKit room that it is in.
        sealer: opens the owner.
    """
    owner = sealer.open(info.attributes, info.identity)
    if owner is not None and livekit_room_name(owner.room_id, owner.slot_id) != livekit_room:
        owner = None
    return CallParticipant(
        identity=info.identity,
        sid=info.sid[:64],
        state=info.state,
        disconnect_reason=info.disconnect_reason,
        joined_at=info.joined_at,
        owner=owner,
        user_id=owner.user_id if owner else user_of_device_identity(info.identity),
    )
