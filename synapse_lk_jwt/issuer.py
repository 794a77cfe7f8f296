# SPDX-License-Identifier: Apache-2.0
"""The core: who asks, for which slot of which room, as whom in the call -> LiveKit access token."""

import attr
from synapse.api.constants import Membership
from synapse.api.errors import LimitExceededError
from synapse.types import get_domain_from_id

from synapse_lk_jwt import metrics
from synapse_lk_jwt.auth.access import Access
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.livekit.client import RoomService
from synapse_lk_jwt.livekit.naming import livekit_room_name
from synapse_lk_jwt.livekit.ownership import OwnerSealer, ParticipantOwner
from synapse_lk_jwt.livekit.tables import OwnerTable
from synapse_lk_jwt.livekit.tokens import TokenSigner

# LiveKit hands a connected client tokens of its own, which are good for this long.
REFRESHED_TOKEN_MS = 600_000

# The poll may see a participant only so often.
UNSEEN_MS = 600_000


class NotInRoom(Exception):
    """The user is not joined to the Matrix room or shut out by its ACL, or the room is blocked."""


@attr.s(auto_attribs=True, frozen=True, slots=True, kw_only=True)
class Issuer:
    """Hands out LiveKit access tokens to users who have been verified.

    Attributes:
        homeserver: knows who is in which room.
        access: the access rule.
        rooms: makes sure of LiveKit rooms.
        owners: notes whose an identity is, if its participant can change what LiveKit says of that.
        signer: signs the tokens.
        sealer: seals into them whose they are.
        require_room_membership: whether users must be joined to the Matrix room to get a token.
        believe_rooms_elsewhere: whether users of other servers get tokens for rooms that this
            homeserver is not in.
        token_lifetime_ms: milliseconds that a token can be used.
        can_update_own_metadata: the LiveKit grant of that name.
    """

    homeserver: Homeserver
    access: Access
    rooms: RoomService
    owners: OwnerTable
    signer: TokenSigner
    sealer: OwnerSealer
    require_room_membership: bool
    believe_rooms_elsewhere: bool
    token_lifetime_ms: int
    can_update_own_metadata: bool

    @property
    def usable_after_removal_ms(self) -> int:
        """How long a participant that was removed may hold a token, in milliseconds.

        LiveKit sends a new token with every connection, also with one that is ended at once.
        """
        return max(self.token_lifetime_ms, REFRESHED_TOKEN_MS)

    @property
    def owners_kept_ms(self) -> int | None:
        """How long owners are noted after they were last seen; None if tokens alone name them."""
        if not self.can_update_own_metadata:
            return None
        return self.usable_after_removal_ms + UNSEEN_MS

    async def check_membership(self, user_id: str, room_id: str, *, strict: bool = False) -> None:
        """Refuses those who cannot be in a call of a Matrix room.

        Args:
            user_id: who asks, verified.
            room_id: the Matrix room.
            strict: MSC4195's rule, which no configuration turns off: the user must be joined, to a
                room that this homeserver is in. Otherwise, in a room that it is not in, users of
                other servers are believed.

        Raises:
            NotInRoom: if the user may not be in a call of that room.
        """
        homeserver = self.homeserver
        # First, because this homeserver is not in a room that its admin has shut down, and who is
        # in such a room is not known here.
        if await homeserver.rooms.is_blocked(room_id):
            raise NotInRoom()
        must_be_joined = strict or self.require_room_membership
        if must_be_joined and homeserver.is_mine(user_id):
            if not await homeserver.rooms.is_joined(user_id, room_id):
                raise NotInRoom()
        elif not await homeserver.rooms.is_host_joined(homeserver.server_name, room_id):
            if strict or not self.believe_rooms_elsewhere:
                raise NotInRoom()
        elif must_be_joined and not await self._may_be_joined(user_id, room_id):
            raise NotInRoom()

    async def is_known_to_be_out(self, user_id: str, room_id: str) -> bool:
        """Whether a user of another server, with a token of another homeserver, is not in a room.

        That homeserver has rules of its own. What counts here is membership, as far as this
        homeserver knows it: in rooms that it is in.
        """
        homeserver = self.homeserver
        return (
            self.require_room_membership
            and await homeserver.rooms.is_host_joined(homeserver.server_name, room_id)
            and not await self._may_be_joined(user_id, room_id)
        )

    async def _may_be_joined(self, user_id: str, room_id: str) -> bool:
        """Whether a user of another server is joined to a room, as far as that is known here."""
        homeserver = self.homeserver
        if not await homeserver.rooms.acl_allows(get_domain_from_id(user_id), room_id):
            # Users of a server that was shut out stay joined in the room's state.
            return False
        if await homeserver.rooms.is_joined(user_id, room_id):
            return True
        # While a join of this homeserver is being completed not all members are known yet. Who has
        # left or is banned may be.
        return await homeserver.rooms.has_partial_state(room_id) and (
            await homeserver.rooms.membership(user_id, room_id)
            not in (Membership.LEAVE, Membership.BAN)
        )

    async def issue(
        self,
        user_id: str,
        room_id: str,
        slot_id: str,
        identity: str,
        endpoint: metrics.Endpoint,
    ) -> str:
        """Makes sure of the LiveKit room for those who may, and signs a token.

        Args:
            user_id: who asks, verified and checked for membership.
            room_id: the Matrix room.
            slot_id: the slot (MSC4143) in it.
            identity: the participant identity that the token is for.
            endpoint: where it is asked for.

        Returns:
            The token, a JWT.

        Raises:
            SfuError: if the LiveKit room could not be made.
            LimitExceededError: if the user has asked for too many identities of this call.
            TooManySlots: if the Matrix room has too many live slots for another one.
        """
        permissions = self.access.permissions(
            get_domain_from_id(user_id), await self.homeserver.users.standing(user_id)
        )
        livekit_room = livekit_room_name(room_id, slot_id)
        if self.can_update_own_metadata and not await self.owners.note(
            livekit_room, identity, user_id
        ):
            raise LimitExceededError("synapse_lk_jwt_owners", retry_after_ms=UNSEEN_MS)
        if permissions.has_full_access:
            await self.rooms.ensure_room(livekit_room, room_id)
        token = self.signer.participant_token(
            identity,
            livekit_room,
            may_create_room=permissions.has_full_access,
            can_publish=permissions.can_publish,
            can_update_own_metadata=self.can_update_own_metadata,
            attributes=self.sealer.seal(
                ParticipantOwner(user_id, room_id, slot_id, self.homeserver.server_name), identity
            ),
            lifetime_ms=self.token_lifetime_ms,
        )
        metrics.tokens.labels(
            endpoint,
            "local" if self.homeserver.is_mine(user_id) else "remote",
            "full" if permissions.has_full_access else "restricted",
        ).inc()
        return token
