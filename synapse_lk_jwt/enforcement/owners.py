# SPDX-License-Identifier: Apache-2.0
"""The users of participants, if participants can replace the attributes of their token.

With `can_update_own_metadata: true`, LiveKit lets participants replace their attributes before the
first webhook, and with them the sealed owner. So the module notes the owner of each identity in the
database when it issues the token. The noted owner takes precedence over the sealed one.
"""

from collections.abc import Iterable, Sequence

import attr

from synapse_lk_jwt.livekit.naming import hash_of_identity, possible_bases
from synapse_lk_jwt.livekit.participants import CallParticipant, Listing
from synapse_lk_jwt.livekit.tables import OwnerTable

# A poll may list a room this much later than a participant joined, in milliseconds.
UNSEEN_MS = 600_000


class ParticipantOwners:
    """Notes the owners of participant identities, and applies them to participants."""

    def __init__(self, table: OwnerTable, tokens_usable_ms: int, *, is_on: bool) -> None:
        """
        Args:
            table: the noted owners.
            tokens_usable_ms: how long a participant may hold a token, in milliseconds.
            is_on: whether participants can replace their attributes. If they cannot, nothing is
                noted or read.
        """
        self._table = table
        self._kept_ms = tokens_usable_ms + UNSEEN_MS
        self._is_on = is_on

    async def note(self, livekit_room: str, identity: str, user_id: str) -> bool:
        """Notes the owner of an identity, before a token is issued for it.

        Returns:
            False if the user has as many identities in that LiveKit room as one user may have.
        """
        return not self._is_on or await self._table.note(livekit_room, identity, user_id)

    async def resolve(
        self, livekit_room: str, participants: Sequence[CallParticipant]
    ) -> Sequence[CallParticipant]:
        """The participants, each with the noted user if one is noted."""
        noted = await self._table.in_room(livekit_room) if self._is_on else {}
        if not noted:
            return participants
        resolved = []
        for participant in participants:
            hashes = map(hash_of_identity, possible_bases(participant.identity))
            user_id = next((noted[h] for h in hashes if h in noted), participant.user_id)
            resolved.append(attr.evolve(participant, user_id=user_id))
        return resolved

    async def resolve_listing(self, livekit_room: str, listing: Listing) -> Listing:
        """The listing, with the participants as `resolve` returns them."""
        participants = await self.resolve(livekit_room, listing.participants)
        return attr.evolve(listing, participants=participants)

    async def keep(self, livekit_room: str, participants: Iterable[CallParticipant]) -> None:
        """Notes that participants are in a call, so that `forget_unseen` keeps their owners."""
        if self._is_on:
            bases = {base for p in participants for base in possible_bases(p.identity)}
            await self._table.keep(livekit_room, bases)

    async def forget_unseen(self) -> None:
        """Forgets the owners of identities that can no longer be in a call."""
        if self._is_on:
            await self._table.forget(self._kept_ms)
