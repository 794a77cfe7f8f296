# SPDX-License-Identifier: Apache-2.0
"""A stub SFU with invented participants. It can be slow or hang, and counts its requests.

python -m benchmarks.stub_sfu PORT DELAY_MS

DELAY_MS is how long CreateRoom takes. These requests change the stub:

- `PUT /rooms` with `{room: {identity: {attribute: value}}}` adds participants, and resets the
  counts of `/asked`. `PUT /gone` with `{room: {identity: {}}}` removes participants, and with
  `{room: {}}` the room.
- `PUT /delay` with `{method: milliseconds}` delays the answers of methods.
- `PUT /hang` with `{"rooms": [room]}` leaves requests about these rooms unanswered, with
  `{"rooms": null}` all requests, with `{"rooms": []}` none. A request that arrived while the stub
  hung never gets an answer.

These requests read what it has recorded:

- `GET /count`: the number of CreateRoom requests.
- `GET /removed`: which participants were removed and when, `[[room, identity, seconds]]`.
- `GET /asked`: the first and last request of each method, `{method: [times, first, last]}`.
- `GET /flight`: the number of unanswered requests, and the highest one since the last call,
  `[now, most]`.
"""

import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from google.protobuf.message import Message
from livekit.protocol.models import ParticipantInfo, Room
from livekit.protocol.room import (
    CreateRoomRequest,
    DeleteRoomRequest,
    DeleteRoomResponse,
    ListParticipantsRequest,
    ListParticipantsResponse,
    ListRoomsRequest,
    ListRoomsResponse,
    RemoveParticipantResponse,
    RoomParticipantIdentity,
)


class NotFound(Exception):
    """The room or participant does not exist."""


class Hangs(Exception):
    """The stub leaves the request unanswered."""


class Sfu:
    """The stub's rooms and counts, and its answers."""

    def __init__(self, create_sec: float) -> None:
        self._delay_sec = {"CreateRoom": create_sec}
        self._rooms: dict[str, dict[str, dict[str, str]]] = {}
        self._hanging: frozenset[str] | None = frozenset()
        self._in_flight = 0
        self._most_in_flight = 0
        self._removed: list[tuple[str, str, float]] = []
        self._asked: dict[str, tuple[int, float, float]] = {}
        # How to read the request, which field names the room, and the answer.
        self._methods: dict[str, tuple[Callable[[bytes], Any], str, Callable[[Any], Message]]] = {
            "CreateRoom": (CreateRoomRequest.FromString, "name", self._create_room),
            "DeleteRoom": (DeleteRoomRequest.FromString, "room", self._delete_room),
            "ListRooms": (ListRoomsRequest.FromString, "", self._list_rooms),
            "ListParticipants": (ListParticipantsRequest.FromString, "room", self._participants),
            "GetParticipant": (RoomParticipantIdentity.FromString, "room", self._participant),
            "RemoveParticipant": (RoomParticipantIdentity.FromString, "room", self._remove),
        }

    def set(self, path: str, body: Any) -> None:
        """Processes a PUT request."""
        if path == "/delay":
            self._delay_sec.update({method: ms / 1000 for method, ms in body.items()})
        elif path == "/hang":
            self._hanging = None if body["rooms"] is None else frozenset(body["rooms"])
        elif path == "/rooms":
            self._asked.clear()
            for room, participants in body.items():
                self._rooms.setdefault(room, {}).update(participants)
        elif path == "/gone":
            for room, participants in body.items():
                for identity in participants:
                    self._rooms.get(room, {}).pop(identity, None)
                if not participants:
                    self._rooms.pop(room, None)

    def get(self, path: str) -> object:
        """The answer to a GET."""
        if path == "/flight":
            most, self._most_in_flight = self._most_in_flight, self._in_flight
            return [self._in_flight, most]
        times, _, _ = self._asked.get("CreateRoom", (0, 0, 0))
        return {"/count": times, "/removed": self._removed, "/asked": self._asked}[path]

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Counts a request until it is answered, or its connection closed."""
        self._in_flight += 1
        self._most_in_flight = max(self._most_in_flight, self._in_flight)
        try:
            yield
        finally:
            self._in_flight -= 1

    async def answer(self, method: str, body: bytes) -> Message:
        """The answer to a request of RoomService.

        Raises:
            NotFound, Hangs
        """
        now = time.monotonic()
        times, first, _ = self._asked.get(method, (0, now, now))
        self._asked[method] = (times + 1, first, now)
        read, field, answer = self._methods[method]
        request = read(body)
        if self._hanging is None or (field and getattr(request, field) in self._hanging):
            raise Hangs()
        delay_sec = self._delay_sec.get(method, 0)
        if delay_sec:
            await asyncio.sleep(delay_sec)
        return answer(request)

    def _create_room(self, request: CreateRoomRequest) -> Message:
        self._rooms.setdefault(request.name, {})
        return Room(name=request.name, num_participants=1, creation_time=int(time.time()))

    def _delete_room(self, request: DeleteRoomRequest) -> Message:
        if self._rooms.pop(request.room, None) is None:
            raise NotFound()
        return DeleteRoomResponse()

    def _list_rooms(self, request: ListRoomsRequest) -> Message:
        return ListRoomsResponse(
            rooms=[
                Room(name=name, num_participants=len(participants))
                for name, participants in self._rooms.items()
                if not request.names or name in request.names
            ]
        )

    def _participants(self, request: ListParticipantsRequest) -> Message:
        participants = self._rooms.get(request.room, {})
        return ListParticipantsResponse(
            participants=[_info(*participant) for participant in participants.items()]
        )

    def _participant(self, request: RoomParticipantIdentity) -> Message:
        attributes = self._rooms.get(request.room, {}).get(request.identity)
        if attributes is None:
            raise NotFound()
        return _info(request.identity, attributes)

    def _remove(self, request: RoomParticipantIdentity) -> Message:
        if self._rooms.get(request.room, {}).pop(request.identity, None) is None:
            raise NotFound()
        self._removed.append((request.room, request.identity, time.monotonic()))
        return RemoveParticipantResponse()


def _info(identity: str, attributes: dict[str, str]) -> ParticipantInfo:
    return ParticipantInfo(
        identity=identity,
        sid=f"PA_{identity}",
        state=ParticipantInfo.State.ACTIVE,
        attributes=attributes,
    )


async def serve(sfu: Sfu, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers the requests of one connection."""
    while head := await reader.readuntil(b"\r\n\r\n"):
        first, *lines = head.split(b"\r\n")
        length = 0
        for line in lines:
            if line.lower().startswith(b"content-length:"):
                length = int(line[15:])
        verb, path, _ = first.decode("ascii").split(" ")
        body = await reader.readexactly(length)
        status, content_type = "200 OK", "application/json"
        if verb == "PUT":
            sfu.set(path, json.loads(body))
            answer = b"{}"
        elif verb == "GET":
            answer = json.dumps(sfu.get(path)).encode("ascii")
        else:
            with sfu.in_flight():
                try:
                    message = await sfu.answer(path.rpartition("/")[2], body)
                    content_type = "application/protobuf"
                    answer = message.SerializeToString()
                except NotFound:
                    status = "404 Not Found"
                    answer = b'{"code": "not_found", "msg": "not there"}'
                except Hangs:
                    # Until the client closes the connection.
                    await reader.read()
                    raise ConnectionError from None
        writer.write(
            f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n"
            f"Content-Length: {len(answer)}\r\n\r\n".encode("ascii")
            + answer
        )


async def main(port: int, create_sec: float) -> None:
    """Serves until the process is stopped."""
    sfu = Sfu(create_sec)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(sfu, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", port, limit=2**26)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]) / 1000))
