# SPDX-License-Identifier: Apache-2.0
"""An SFU that takes a given time to make a room, and counts what it is asked.

python -m benchmarks.stub_sfu PORT DELAY_MS

Who is in its rooms is what it was told: `PUT /rooms` with `{room: {identity: {attribute: value}}}`
adds people, `PUT /gone` with `{room: {identity: {}}}` takes some away. `GET /count` tells how often
it was asked to make a room, `GET /removed` who was removed and when: `[[room, identity, seconds]]`,
and `GET /asked` when each method was asked first and last: `{method: [times, first, last]}`.
"""

import asyncio
import json
import sys
import time
from collections.abc import Callable

from google.protobuf.message import Message
from livekit.protocol.models import ParticipantInfo, Room
from livekit.protocol.room import (
    ListParticipantsRequest,
    ListParticipantsResponse,
    ListRoomsResponse,
    RemoveParticipantResponse,
    RoomParticipantIdentity,
)


class Sfu:
    """What the stub knows, and how it answers."""

    def __init__(self, delay_sec: float) -> None:
        self._delay_sec = delay_sec
        self._rooms: dict[str, dict[str, dict[str, str]]] = {}
        self._removed: list[tuple[str, str, float]] = []
        self._asked: dict[str, tuple[int, float, float]] = {}
        self._methods: dict[str, Callable[[bytes], Message]] = {
            "ListRooms": self._list_rooms,
            "ListParticipants": self._list_participants,
            "RemoveParticipant": self._remove_participant,
        }

    async def answer(self, verb: str, path: str, body: bytes) -> bytes:
        """The body of the answer to one request."""
        if verb == "PUT":
            self._told(path, json.loads(body))
            return b"{}"
        if verb == "GET":
            times, _, _ = self._asked.get("CreateRoom", (0, 0, 0))
            told: dict[str, object] = {
                "/count": times,
                "/removed": self._removed,
                "/asked": self._asked,
            }
            return json.dumps(told[path]).encode("ascii")
        method = path.rpartition("/")[2]
        now = time.monotonic()
        times, first, _ = self._asked.get(method, (0, now, now))
        self._asked[method] = (times + 1, first, now)
        if method in self._methods:
            return self._methods[method](body).SerializeToString()
        await asyncio.sleep(self._delay_sec)
        room = Room(name="room", num_participants=1, creation_time=int(time.time()))
        return room.SerializeToString()

    def _told(self, path: str, told: dict[str, dict[str, dict[str, str]]]) -> None:
        for room, people in told.items():
            there = self._rooms.setdefault(room, {})
            if path == "/rooms":
                there.update(people)
            else:
                for identity in people:
                    there.pop(identity, None)
        if path == "/rooms":
            self._asked.clear()

    def _list_rooms(self, body: bytes) -> Message:
        return ListRoomsResponse(
            rooms=[
                Room(name=name, num_participants=len(people))
                for name, people in self._rooms.items()
            ]
        )

    def _list_participants(self, body: bytes) -> Message:
        people = self._rooms.get(ListParticipantsRequest.FromString(body).room, {})
        return ListParticipantsResponse(
            participants=[
                ParticipantInfo(
                    identity=identity,
                    sid=f"PA_{identity}",
                    state=ParticipantInfo.State.ACTIVE,
                    attributes=attributes,
                )
                for identity, attributes in people.items()
            ]
        )

    def _remove_participant(self, body: bytes) -> Message:
        which = RoomParticipantIdentity.FromString(body)
        self._removed.append((which.room, which.identity, time.monotonic()))
        self._rooms.get(which.room, {}).pop(which.identity, None)
        return RemoveParticipantResponse()


async def serve(sfu: Sfu, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers on one connection."""
    while head := await reader.readuntil(b"\r\n\r\n"):
        first, *lines = head.split(b"\r\n")
        length = 0
        for line in lines:
            if line.lower().startswith(b"content-length:"):
                length = int(line[15:])
        verb, path, _ = first.decode("ascii").split(" ")
        body = await sfu.answer(verb, path, await reader.readexactly(length))
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/protobuf\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )


async def main(port: int, delay_sec: float) -> None:
    """Serves until it is ended."""
    sfu = Sfu(delay_sec)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(sfu, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", port, limit=2**26)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]) / 1000))
