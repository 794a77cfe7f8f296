# SPDX-License-Identifier: Apache-2.0
"""An SFU with a call in every room, that takes a given time to answer and counts what it is asked.

python -m benchmarks.stub_sfu PORT DELAY_MS
"""

import asyncio
import sys
import time

from livekit.protocol.models import Room

asked = 0


async def answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_sec: float
) -> None:
    """Answers CreateRoom, and `GET /count` with the number of these, on one connection."""
    global asked
    while head := await reader.readuntil(b"\r\n\r\n"):
        length = 0
        for line in head.split(b"\r\n"):
            if line.lower().startswith(b"content-length:"):
                length = int(line[15:])
        await reader.readexactly(length)
        if head.startswith(b"GET"):
            body = str(asked).encode()
        else:
            asked += 1
            await asyncio.sleep(delay_sec)
            room = Room(name="room", num_participants=1, creation_time=int(time.time()))
            body = room.SerializeToString()
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/protobuf\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )


async def main(port: int, delay_sec: float) -> None:
    """Serves until it is ended."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer, delay_sec)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]) / 1000))
