# SPDX-License-Identifier: Apache-2.0
"""The rule "may this user be in a call of this Matrix room".

Token requests, webhooks, the poll and the removal after a membership change all use this rule, so
that they cannot disagree.
"""

from enum import Enum

import attr
from synapse.api.constants import Membership
from synapse.types import get_domain_from_id

from synapse_lk_jwt.compat.homeserver import Homeserver


class RoomAccess(Enum):
    """The answer to the question whether a user may be in a call of a Matrix room.

    The values complete the sentence "The user was removed: …" in log lines.
    """

    ALLOWED = "the user may be in the call"
    UNKNOWN = "this homeserver does not know who is joined to the room"
    """The user may be in the call: nothing that this homeserver knows speaks against it."""
    NOT_JOINED = "the user is not joined to the room"
    BANNED = "the user, the user's server or the room itself is banned"
    """A moderator banned the user, the room's ACL denies the user's server, or an admin of this
    homeserver blocked the room."""
    INACTIVE = "the account is deactivated, locked, suspended, erased or expired"

    @property
    def is_allowed(self) -> bool:
        """Whether the user may be in the call."""
        return self in (RoomAccess.ALLOWED, RoomAccess.UNKNOWN)


@attr.s(auto_attribs=True, frozen=True, slots=True, kw_only=True)
class RoomAccessRule:
    """The rule of one homeserver.

    Attributes:
        homeserver: the source of memberships, ACLs and accounts.
        require_room_membership: whether users must be joined to the Matrix room to get a token.
        believe_rooms_elsewhere: whether users may be in calls of Matrix rooms that this homeserver
            is not in.
    """

    homeserver: Homeserver
    require_room_membership: bool
    believe_rooms_elsewhere: bool

    async def of_request(self, user_id: str, room_id: str, *, strict: bool = False) -> RoomAccess:
        """The access of a user who requests a token.

        Synapse caches what this reads, except the membership of a user who is not joined.

        Args:
            user_id: the user, authenticated and with an active account.
            room_id: the Matrix room.
            strict: whether MSC4195's rule applies, which no option turns off: the user must be
                joined, and this homeserver must be in the room.
        """
        homeserver = self.homeserver
        # This check precedes the others. A room that was shut down has no local members, so the
        # rules below would believe the users of other homeservers.
        if await homeserver.rooms.is_blocked(room_id):
            return RoomAccess.BANNED
        must_be_joined = strict or self.require_room_membership
        if must_be_joined and homeserver.is_mine(user_id):
            return await self._of_member(user_id, room_id)
        if not await homeserver.rooms.is_host_joined(homeserver.server_name, room_id):
            is_believed = self.believe_rooms_elsewhere and not strict
            return RoomAccess.UNKNOWN if is_believed else RoomAccess.NOT_JOINED
        if must_be_joined:
            return await self._of_member(user_id, room_id)
        return RoomAccess.ALLOWED

    async def of_participant(
        self,
        user_id: str,
        room_id: str,
        *,
        is_issued_here: bool = True,
        has_membership_changed: bool = False,
    ) -> RoomAccess:
        """The access of a user who is in a call, or may hold a token for one.

        Args:
            user_id: the user of the participant.
            room_id: the Matrix room of the call.
            is_issued_here: whether this homeserver issued the participant's token. If it did not,
                users of other homeservers are judged only by their membership of a room that this
                homeserver is in: the homeserver that issued the token has rules of its own.
            has_membership_changed: whether the membership of the user has just changed. If so, a
                user who left is removed even without `require_room_membership`.
        """
        homeserver = self.homeserver
        is_mine = homeserver.is_mine(user_id)
        if is_mine and not await homeserver.users.is_active(user_id):
            return RoomAccess.INACTIVE
        if is_issued_here or is_mine:
            access = await self.of_request(user_id, room_id)
        elif not await homeserver.rooms.is_host_joined(homeserver.server_name, room_id):
            access = RoomAccess.UNKNOWN
        elif self.require_room_membership:
            access = await self._of_member(user_id, room_id)
        else:
            access = RoomAccess.ALLOWED
        if has_membership_changed and access.is_allowed and not self.require_room_membership:
            return await self._of_leaver(user_id, room_id, access)
        return access

    async def _of_member(self, user_id: str, room_id: str) -> RoomAccess:
        """The access of a user who must be joined to a room that this homeserver is in."""
        homeserver = self.homeserver
        is_mine = homeserver.is_mine(user_id)
        # The room's state still contains the joins of users whose server the ACL denies.
        if not is_mine and not await homeserver.rooms.acl_allows(
            get_domain_from_id(user_id), room_id
        ):
            return RoomAccess.BANNED
        if await homeserver.rooms.is_joined(user_id, room_id):
            return RoomAccess.ALLOWED
        membership = await homeserver.rooms.membership(user_id, room_id)
        if membership == Membership.BAN:
            return RoomAccess.BANNED
        # Until Synapse completes its own join, it does not know all members of other homeservers.
        # It does know the memberships that later events have set.
        if (
            not is_mine
            and membership != Membership.LEAVE
            and await homeserver.rooms.has_partial_state(room_id)
        ):
            return RoomAccess.UNKNOWN
        return RoomAccess.NOT_JOINED

    async def _of_leaver(self, user_id: str, room_id: str, otherwise: RoomAccess) -> RoomAccess:
        """The access of a user who need not be joined, after a change of the membership."""
        if await self.homeserver.rooms.is_joined(user_id, room_id):
            return otherwise
        match await self.homeserver.rooms.membership(user_id, room_id):
            case Membership.BAN:
                return RoomAccess.BANNED
            case Membership.LEAVE | None:
                return RoomAccess.NOT_JOINED
        # An invitation or a knock is no leave.
        return otherwise
