# SPDX-License-Identifier: Apache-2.0
"""The core: who asks, for which slot of which room, as whom in the call -> LiveKit access token."""

import attr
from synapse.types import get_domain_from_id

from synapse_lk_jwt.access import Access
from synapse_lk_jwt.homeserver import Homeserver
from synapse_lk_jwt.sfu.names import livekit_room_name
from synapse_lk_jwt.sfu.rooms import RoomService
from synapse_lk_jwt.sfu.tokens import TokenSigner


class NotInRoom(Exception):
    """The user is not joined to the Matrix room, or their server is shut out of it."""


@attr.s(auto_attribs=True, frozen=True, slots=True, kw_only=True)
class Issuer:
    """Hands out LiveKit access tokens to users who have been verified.

    Attributes:
        homeserver: knows who is in which room.
        access: the access rule.
        rooms: makes sure of LiveKit rooms.
        signer: signs the tokens.
        require_room_membership: whether a token takes being joined to the Matrix room.
        token_lifetime_ms: milliseconds that a token can be used.
        can_update_own_metadata: the LiveKit grant of that name.
    """

    homeserver: Homeserver
    access: Access
    rooms: RoomService
    signer: TokenSigner
    require_room_membership: bool
    token_lifetime_ms: int
    can_update_own_metadata: bool

    async def issue(self, user_id: str, room_id: str, slot_id: str, identity: str) -> str:
        """Checks membership, makes sure of the LiveKit room for those who may, and signs.

        Args:
            user_id: who asks, verified.
            room_id: the Matrix room.
            slot_id: the slot (MSC4143) in it.
            identity: the participant identity that the token is for.

        Returns:
            The token, a JWT.

        Raises:
            NotInRoom: if the user may not be in a call of that room.
            SfuError: if the LiveKit room could not be made.
        """
        if self.require_room_membership and not await self._may_be_in_room(user_id, room_id):
            raise NotInRoom()
        server = get_domain_from_id(user_id)
        livekit_room = livekit_room_name(room_id, slot_id)
        if self.access.has_full_access(server):
            await self.rooms.make_sure_of(livekit_room)
        return self.signer.participant_token(
            identity,
            livekit_room,
            can_publish=self.access.can_publish(server),
            can_update_own_metadata=self.can_update_own_metadata,
            lifetime_ms=self.token_lifetime_ms,
        )

    async def _may_be_in_room(self, user_id: str, room_id: str) -> bool:
        homeserver = self.homeserver
        if homeserver.is_mine(user_id):
            return await homeserver.is_joined(user_id, room_id)
        if not await homeserver.is_in_room(homeserver.server_name, room_id):
            # Nobody here can know who is in it.
            return True
        # Users of a server that was shut out stay joined in the room's state.
        if not await homeserver.acl_allows(get_domain_from_id(user_id), room_id):
            return False
        return await homeserver.is_joined(user_id, room_id) or await homeserver.has_partial_state(
            room_id
        )
