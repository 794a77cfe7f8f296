# SPDX-License-Identifier: Apache-2.0
"""Which participants of delegations are connected to the SFU."""

from collections.abc import Collection, Iterable, Mapping

from livekit.protocol.models import ParticipantInfo

from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.livekit.client import RoomService
from synapse_lk_jwt.livekit.participants import CallParticipant, Listing

# Up to this many participants of one room are queried one by one. Other participants cannot slow
# that down. For more participants, one listing of the whole room costs less.
MAX_QUERIED_ONE_BY_ONE = 10


class ParticipantLookup:
    """Finds some participants of a LiveKit room by the cheapest query."""

    def __init__(self, homeserver: Homeserver, rooms: RoomService) -> None:
        self._homeserver = homeserver
        self._rooms = rooms

    async def find(self, livekit_room: str, identities: Collection[str]) -> Listing:
        """A listing that is complete with regard to these identities.

        Raises:
            SfuError: if LiveKit rejects the request, or does not answer in time.
        """
        if len(identities) > MAX_QUERIED_ONE_BY_ONE:
            listing = await self._rooms.list_participants(livekit_room)
            if listing.is_complete:
                return listing
        queried_ts = self._homeserver.clock.time_msec()
        found = [await self._rooms.get_participant(livekit_room, i) for i in identities]
        return Listing(queried_ts, [participant for participant in found if participant])


def by_identity(listing: Listing) -> dict[str, CallParticipant]:
    """The participants of a listing, by their identities."""
    return {participant.identity: participant for participant in listing.participants}


def connected_sessions(
    listed: Mapping[str, CallParticipant], identities: Iterable[str], *, was_connected: bool
) -> dict[str, str]:
    """The identities that are connected, with their sessions.

    Args:
        listed: participants of the LiveKit room, by their identities.
        identities: the participant identities of a delegation. Duplicate connections, which have
            identities of their own, do not count.
        was_connected: whether one of them has been connected. Until then a participant counts only
            if it is ACTIVE: a connection that is being set up may still fail.
    """
    disconnected = ParticipantInfo.State.DISCONNECTED
    active = ParticipantInfo.State.ACTIVE
    found = [listed[identity] for identity in identities if identity in listed]
    return {
        p.identity: p.sid
        for p in found
        if (p.state != disconnected if was_connected else p.state == active)
    }
