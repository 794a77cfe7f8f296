# SPDX-License-Identifier: Apache-2.0
"""Reads what LiveKit answers about rooms and participants, however large it is.

Participants choose the size of most of it. So an answer is read as a stream: only the fields that
this module needs are copied, each up to a largest size.
"""

from google.protobuf.message import DecodeError
from livekit.protocol.models import ParticipantInfo, Room
from twisted.web.iweb import IResponse

from synapse_lk_jwt.compat.http import stream_body
from synapse_lk_jwt.livekit.ownership import OwnerSealer
from synapse_lk_jwt.livekit.participants import (
    CallParticipant,
    Listing,
    call_participant,
    is_of_user,
    is_too_long,
)
from synapse_lk_jwt.livekit.stream import FieldReader, ItemsReader

# Listings are limited in time and number. They are not limited in size, because a participant
# could then make the others unlistable.
MAX_PARTICIPANTS = 10_000

# The identity of a duplicate connection can have a megabyte, and its removal needs all of it.
# LiveKit accepts 1 MiB of request headers, so a longer identity cannot come from a URL.
MAX_REMOVABLE_IDENTITY_BYTES = 2 * 1024 * 1024
MAX_TOO_LONG_BYTES = 16 * 1024 * 1024

# The fields that are copied of a participant, with the largest size of each in bytes. A small
# participant is copied whole.
PARTICIPANT_FIELDS = {
    ParticipantInfo.SID_FIELD_NUMBER: 64,
    ParticipantInfo.IDENTITY_FIELD_NUMBER: MAX_REMOVABLE_IDENTITY_BYTES,
    ParticipantInfo.STATE_FIELD_NUMBER: 0,
    ParticipantInfo.KIND_FIELD_NUMBER: 0,
    ParticipantInfo.JOINED_AT_FIELD_NUMBER: 0,
    ParticipantInfo.ATTRIBUTES_FIELD_NUMBER: 16 * 1024,
    ParticipantInfo.DISCONNECT_REASON_FIELD_NUMBER: 0,
}
ROOM_FIELDS = {
    Room.NAME_FIELD_NUMBER: 512,
    Room.NUM_PARTICIPANTS_FIELD_NUMBER: 0,
}


async def read_rooms(response: IResponse) -> dict[str, int]:
    """Reads an answer to ListRooms: the number of participants, by room name.

    A room whose name is longer than any call's is left out.

    Raises:
        Unreadable: if the answer is no protobuf message, or incomplete.
        google.protobuf.message.DecodeError: if a room cannot be read.
    """
    rooms: dict[str, int] = {}

    def receive(item: bytes, too_long: frozenset[int]) -> None:
        if not too_long:
            room = Room.FromString(item)
            rooms[room.name] = room.num_participants

    await _read_items(response, ItemsReader(ROOM_FIELDS, receive))
    return rooms


async def read_participant(response: IResponse) -> ParticipantInfo:
    """Reads an answer to GetParticipant.

    Raises:
        Unreadable: if the answer is no protobuf message, or incomplete.
        google.protobuf.message.DecodeError: likewise.
    """
    reader = FieldReader(PARTICIPANT_FIELDS)
    await stream_body(response, reader.write)
    return ParticipantInfo.FromString(reader.finish())


class ListingReader:
    """Reads an answer to ListParticipants."""

    def __init__(self, livekit_room: str, sealer: OwnerSealer, requested_ts: int) -> None:
        """
        Args:
            livekit_room: the LiveKit room.
            sealer: opens the owners of participants.
            requested_ts: the time of the request, in milliseconds since the epoch.
        """
        self._livekit_room = livekit_room
        self._sealer = sealer
        self._requested_ts = requested_ts
        self._begin()

    def _begin(self) -> None:
        self._participants: list[CallParticipant] = []
        self._too_long: list[str] = []
        self._too_long_bytes = 0
        self._is_complete = True
        self._has_begun = False

    async def read(self, response: IResponse) -> Listing:
        """Reads the answer.

        Raises:
            Unreadable: if the answer is no protobuf message, or incomplete.
        """
        # A first attempt may have failed halfway.
        self._begin()
        await _read_items(response, ItemsReader(PARTICIPANT_FIELDS, self._receive))
        return self._listing(self._is_complete)

    def partial(self) -> Listing | None:
        """The participants read so far of an answer that did not end in time; None without any.

        The time of an answer depends on its size, which the participants choose.
        """
        return self._listing(is_complete=False) if self._has_begun else None

    def empty(self) -> Listing:
        """The listing of a room that does not exist."""
        return Listing(self._requested_ts, ())

    def _listing(self, is_complete: bool) -> Listing:
        return Listing(
            self._requested_ts, tuple(self._participants), tuple(self._too_long), is_complete
        )

    def _receive(self, item: bytes, too_long: frozenset[int]) -> None:
        self._has_begun = True
        try:
            info = ParticipantInfo.FromString(item)
        except DecodeError:
            # One participant must not hide the others.
            self._is_complete = False
            return
        if not is_of_user(info):
            return
        identity = info.identity
        if (
            ParticipantInfo.IDENTITY_FIELD_NUMBER in too_long
            or len(self._participants) >= MAX_PARTICIPANTS
        ):
            self._is_complete = False
        elif not is_too_long(identity):
            self._participants.append(call_participant(info, self._livekit_room, self._sealer))
        elif self._too_long_bytes + len(identity) <= MAX_TOO_LONG_BYTES:
            self._too_long_bytes += len(identity)
            self._too_long.append(identity)
        else:
            self._is_complete = False


async def _read_items(response: IResponse, reader: ItemsReader) -> None:
    await stream_body(response, reader.write)
    reader.finish()
