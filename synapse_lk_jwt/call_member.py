# SPDX-License-Identifier: Apache-2.0
"""A user's membership of a call, as one value."""

import attr

from synapse_lk_jwt.livekit.naming import livekit_room_name


@attr.s(auto_attribs=True, frozen=True, slots=True)
class CallMember:
    """A user's membership of one call.

    Attributes:
        user_id: the user, verified.
        room_id: the Matrix room.
        slot_id: the slot (MSC4143) in that room.
        identities: the participant identities that the user may have on the SFU, at least one. A
            token is issued for the first one.
    """

    user_id: str
    room_id: str
    slot_id: str
    identities: tuple[str, ...]

    @property
    def livekit_room(self) -> str:
        """The name of the LiveKit room of this call; MSC4195, 'LiveKit room name'."""
        return livekit_room_name(self.room_id, self.slot_id)
