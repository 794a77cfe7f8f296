# SPDX-License-Identifier: Apache-2.0
"""LiveKit's RoomService: one method for each RPC.

https://docs.livekit.io/reference/other/roomservice-api/
"""

from contextlib import suppress

from livekit.api import VideoGrants
from livekit.protocol.models import Room
from livekit.protocol.room import (
    CreateRoomRequest,
    DeleteRoomRequest,
    DeleteRoomResponse,
    ListParticipantsRequest,
    ListRoomsRequest,
    ListRoomsResponse,
    RemoveParticipantResponse,
    RoomParticipantIdentity,
)

from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.livekit.errors import NoAnswer, NoNode, NotFound
from synapse_lk_jwt.livekit.listings import ListingReader, read_participant, read_rooms
from synapse_lk_jwt.livekit.ownership import OwnerSealer
from synapse_lk_jwt.livekit.participants import CallParticipant, Listing, call_participant
from synapse_lk_jwt.livekit.questions import SharedQuestions
from synapse_lk_jwt.livekit.twirp import TwirpClient, message

# An answer about one participant is small, and a leave waits for it.
PARTICIPANT_TIMEOUT_SEC = 5

# How long LiveKit keeps a room that no participant has joined yet, and one that all have left.
EMPTY_TIMEOUT_SEC = 300
DEPARTURE_TIMEOUT_SEC = 20


def _room_admin(livekit_room: str) -> VideoGrants:
    return VideoGrants(room_admin=True, room=livekit_room)


class RoomService:
    """LiveKit's API for rooms.

    Every method raises SfuError if LiveKit rejects the request, or does not answer in time. The
    limit is ten seconds unless the method states another one. `SharedQuestions` shares requests
    about the same room or participant, because many callers need the same answer when a large call
    ends.
    """

    def __init__(self, homeserver: Homeserver, twirp: TwirpClient, sealer: OwnerSealer) -> None:
        """
        Args:
            homeserver: provides the clock.
            twirp: sends the requests.
            sealer: opens the owners of participants.
        """
        self._clock = homeserver.clock
        self._twirp = twirp
        self._sealer = sealer
        self._listings: SharedQuestions[str, Listing] = SharedQuestions()
        self._participants: SharedQuestions[tuple[str, str], CallParticipant | None] = (
            SharedQuestions()
        )
        self._removals: SharedQuestions[tuple[str, str], bool] = SharedQuestions()

    async def create_room(self, livekit_room: str) -> Room:
        """Creates a room, or returns the existing one of that name unchanged."""
        request = CreateRoomRequest(
            name=livekit_room,
            empty_timeout=EMPTY_TIMEOUT_SEC,
            departure_timeout=DEPARTURE_TIMEOUT_SEC,
            max_participants=0,
        )
        grants = VideoGrants(room_create=True)
        return await self._twirp.call("CreateRoom", request, grants, message(Room))

    async def list_rooms(self) -> dict[str, int]:
        """All rooms of the SFU, each with the number of its participants.

        LiveKit updates that number with a delay. A room whose name is longer than any call's is
        left out.
        """
        grants = VideoGrants(room_list=True)
        return await self._twirp.call("ListRooms", ListRoomsRequest(), grants, read_rooms)

    async def list_participants(self, livekit_room: str) -> Listing:
        """The participants of a room at a time after this call; none if it does not exist.

        Raises:
            NoNode: if the room exists, and the node that hosts it does not answer.
        """

        async def ask() -> Listing:
            return await self._list_participants(livekit_room)

        return await self._listings.ask(livekit_room, ask)

    async def get_participant(self, livekit_room: str, identity: str) -> CallParticipant | None:
        """A participant of a room at a time after this call; None if it is absent.

        Unlike a listing, the answer's size does not depend on other participants. LiveKit has five
        seconds to answer.

        Raises:
            NoNode: if the room exists, and the node that hosts it does not answer.
        """

        async def ask() -> CallParticipant | None:
            return await self._get_participant(livekit_room, identity)

        return await self._participants.ask((livekit_room, identity), ask)

    async def remove_participant(self, livekit_room: str, identity: str) -> bool:
        """Ends a participant's connection. Its token can still be used for another one.

        Returns:
            Whether the participant was in the room.
        """

        async def ask() -> bool:
            return await self._remove_participant(livekit_room, identity)

        return await self._removals.ask((livekit_room, identity), ask)

    async def delete_room(self, livekit_room: str) -> None:
        """Ends a call for all of its participants."""
        request = DeleteRoomRequest(room=livekit_room)
        grants = VideoGrants(room_create=True)
        with suppress(NotFound):
            await self._twirp.call("DeleteRoom", request, grants, message(DeleteRoomResponse))

    async def _list_participants(self, livekit_room: str) -> Listing:
        reader = ListingReader(livekit_room, self._sealer, self._clock.time_msec())
        try:
            return await self._twirp.call(
                "ListParticipants",
                ListParticipantsRequest(room=livekit_room),
                _room_admin(livekit_room),
                reader.read,
                expected=(NotFound, NoNode, NoAnswer),
            )
        except NotFound:
            return reader.empty()
        except NoNode:
            if await self._exists(livekit_room):
                raise
            return reader.empty()
        except NoAnswer as e:
            listing = reader.partial()
            if listing is None:
                self._twirp.report("ListParticipants", e)
                raise
            return listing

    async def _get_participant(self, livekit_room: str, identity: str) -> CallParticipant | None:
        try:
            info = await self._twirp.call(
                "GetParticipant",
                RoomParticipantIdentity(room=livekit_room, identity=identity),
                _room_admin(livekit_room),
                read_participant,
                expected=(NotFound, NoNode),
                timeout_sec=PARTICIPANT_TIMEOUT_SEC,
            )
        except NotFound:
            return None
        except NoNode:
            if await self._exists(livekit_room):
                raise
            return None
        # The identity in the answer is not trusted, because the request already names it.
        info.identity = identity
        return call_participant(info, livekit_room, self._sealer)

    async def _remove_participant(self, livekit_room: str, identity: str) -> bool:
        request = RoomParticipantIdentity(room=livekit_room, identity=identity)
        if hasattr(request, "revoke_token_ts"):
            # In seconds. Without a time, a LiveKit that revokes tokens also rejects the tokens of
            # the next minute, such as those of users who are invited again. Older livekit-protocol
            # packages do not have the field.
            request.revoke_token_ts = self._clock.time_msec() // 1000
        try:
            await self._twirp.call(
                "RemoveParticipant",
                request,
                _room_admin(livekit_room),
                message(RemoveParticipantResponse),
                expected=(NotFound, NoNode, NoAnswer),
            )
        except NotFound:
            return False
        except (NoNode, NoAnswer) as e:
            # LiveKit waits for a participant who is just leaving, and then reports a failure.
            if await self._get_participant(livekit_room, identity) is not None:
                self._twirp.report("RemoveParticipant", e)
                raise
        return True

    async def _exists(self, livekit_room: str) -> bool:
        """Whether a room exists, after LiveKit reported that no node answers for it.

        With LiveKit's `enable_psrpc_for_get_list_participants` no node answers for a room that does
        not exist, either.
        """
        request = ListRoomsRequest(names=[livekit_room])
        grants = VideoGrants(room_list=True)
        rooms = await self._twirp.call("ListRooms", request, grants, message(ListRoomsResponse))
        return bool(rooms.rooms)
