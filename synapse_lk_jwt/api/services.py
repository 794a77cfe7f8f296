# SPDX-License-Identifier: Apache-2.0
"""What all endpoints share."""

import attr

from synapse_lk_jwt.api.rate_limits import Limits
from synapse_lk_jwt.call_member import CallMember
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.delegation.service import DelegationService
from synapse_lk_jwt.issuer import Issuer


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Services:
    """What endpoints use after they have read a request.

    Attributes:
        homeserver: reads users and rooms.
        issuer: issues LiveKit access tokens.
        limits: limits how often a user may request a token.
        leaves: accepts delegated leaves.
        livekit_url: the SFU's URL for clients.
        livekit_proxy: the URL of the forward proxy between this process and LiveKit; None without
            one.
    """

    homeserver: Homeserver
    issuer: Issuer
    limits: Limits
    leaves: DelegationService
    livekit_url: str
    livekit_proxy: str | None

    async def admit(self, member: CallMember, *, strict: bool = False) -> None:
        """Counts a request of a verified user, then checks that the user may be in the call.

        Args:
            member: the user and the call.
            strict: whether MSC4195's rule applies, which no option turns off.

        Raises:
            LimitExceededError: 429, if the user has sent too many requests.
            NotInRoom: if the user may not be in a call of that Matrix room.
        """
        await self.limits.count_token_request(member.user_id, member.room_id)
        await self.issuer.check_membership(member.user_id, member.room_id, strict=strict)
