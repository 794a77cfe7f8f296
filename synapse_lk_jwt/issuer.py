# SPDX-License-Identifier: Apache-2.0
"""Issues LiveKit access tokens to users who have been authenticated."""

import attr
from synapse.api.errors import LimitExceededError
from synapse.types import get_domain_from_id

from synapse_lk_jwt import metrics
from synapse_lk_jwt.auth.access import Access
from synapse_lk_jwt.auth.room_access import RoomAccessRule
from synapse_lk_jwt.call_member import CallMember
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.enforcement.owners import UNSEEN_MS, ParticipantOwners
from synapse_lk_jwt.livekit.ownership import OwnerSealer, ParticipantOwner
from synapse_lk_jwt.livekit.room_cache import RoomCache
from synapse_lk_jwt.livekit.tokens import TokenSigner


class NotInRoom(Exception):
    """The user may not be in a call of the Matrix room."""


@attr.s(auto_attribs=True, frozen=True, slots=True, kw_only=True)
class Issuer:
    """Issues LiveKit access tokens.

    Attributes:
        homeserver: the accounts of local users.
        access: which users have full access, and which users may publish.
        room_access: which users may be in a call of a Matrix room.
        rooms: ensures the LiveKit rooms of full-access users.
        owners: notes the owner of an identity, if its participant can replace the sealed one.
        signer: signs the tokens.
        sealer: seals their owners into them.
        token_lifetime_ms: milliseconds that a token can be used.
        can_update_own_metadata: the LiveKit grant of that name.
    """

    homeserver: Homeserver
    access: Access
    room_access: RoomAccessRule
    rooms: RoomCache
    owners: ParticipantOwners
    signer: TokenSigner
    sealer: OwnerSealer
    token_lifetime_ms: int
    can_update_own_metadata: bool

    async def check_membership(self, user_id: str, room_id: str, *, strict: bool = False) -> None:
        """Rejects users who may not be in a call of a Matrix room.

        Args:
            user_id: the user, authenticated.
            room_id: the Matrix room.
            strict: whether MSC4195's rule applies; see `RoomAccessRule.of_request`.

        Raises:
            NotInRoom: if the user may not be in a call of that room.
        """
        access = await self.room_access.of_request(user_id, room_id, strict=strict)
        if not access.is_allowed:
            raise NotInRoom()

    async def issue(self, member: CallMember, endpoint: metrics.Endpoint) -> str:
        """Ensures the LiveKit room for users with full access, and signs a token.

        Args:
            member: the user, authenticated and allowed in the call. The token is for the first
                participant identity.
            endpoint: the endpoint that received the request.

        Returns:
            The token, a JWT.

        Raises:
            SfuError: if LiveKit could not create the room.
            LimitExceededError: if the user has requested too many identities of this call.
            TooManySlots: if the Matrix room has too many live slots for another one.
        """
        user_id, identity, livekit_room = member.user_id, member.identities[0], member.livekit_room
        server_name = get_domain_from_id(user_id)
        permissions = self.access.permissions(
            server_name, await self.homeserver.users.standing(user_id)
        )
        if not await self.owners.note(livekit_room, identity, user_id):
            raise LimitExceededError("synapse_lk_jwt_owners", retry_after_ms=UNSEEN_MS)
        if permissions.has_full_access:
            await self.rooms.ensure_room(livekit_room, member.room_id)
        owner = ParticipantOwner(
            user_id, member.room_id, member.slot_id, self.homeserver.server_name
        )
        token = self.signer.participant_token(
            identity,
            livekit_room,
            may_create_room=permissions.has_full_access,
            can_publish=permissions.can_publish,
            can_update_own_metadata=self.can_update_own_metadata,
            attributes=self.sealer.seal(owner, identity),
            lifetime_ms=self.token_lifetime_ms,
        )
        metrics.tokens.labels(
            endpoint,
            "local" if server_name == self.homeserver.server_name else "remote",
            "full" if permissions.has_full_access else "restricted",
        ).inc()
        return token
