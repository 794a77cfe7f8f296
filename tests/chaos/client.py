# SPDX-License-Identifier: Apache-2.0
"""Some clients in their own process, so that killing it kills them without a disconnect.

python -m tests.chaos.client

The process reads orders from standard input and writes reports to standard output. Both have one
JSON object a line. The process ends at the end of its input.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time

from livekit import rtc

# This import turns off the log of LiveKit's client.
import testbed.call  # noqa: F401

RETRY_SEC = 0.5
# How often a removed client connects again with the same token.
STUBBORN = 2

REMOVED = (rtc.DisconnectReason.PARTICIPANT_REMOVED, rtc.DisconnectReason.ROOM_DELETED)


class Client:
    """One participant, which reconnects with the same token after a lost connection.

    LiveKit's client tries for twenty seconds. Browsers try for longer, and so does this class.
    """

    def __init__(self, who: str, url: str, jwt: str) -> None:
        self._who = who
        self._url = url
        self._jwt = jwt
        self._room: rtc.Room | None = None
        self._is_wanted = True
        self._is_quiet = False
        self._task = asyncio.create_task(self._stay())

    async def leave(self) -> None:
        """Disconnects, so that LiveKit learns of it at once."""
        self._is_wanted = False
        if self._room is not None:
            await self._room.disconnect()
        await self._task

    def again(self) -> Client:
        """Connects a second time, which makes LiveKit end the first connection."""
        if self._room is None:
            # This client is connecting already.
            return self
        self._is_wanted = False
        self._is_quiet = True
        return Client(self._who, self._url, self._jwt)

    async def leave_after(self, second: Client) -> None:
        """Leaves once a second client has connected, if LiveKit has not ended this one already."""
        while second._room is None and not second._task.done():  # noqa: ASYNC110 - Simple.
            await asyncio.sleep(0.05)
        await self.leave()

    async def _stay(self) -> None:
        removed = 0
        while self._is_wanted and removed <= STUBBORN:
            room = rtc.Room()
            gone: asyncio.Future[rtc.DisconnectReason.ValueType] = asyncio.Future()
            room.on("reconnecting", lambda: self._report("out", "reconnecting"))
            room.on("reconnected", lambda: self._report("in", ""))
            room.on(
                "disconnected", lambda reason, gone=gone: gone.done() or gone.set_result(reason)
            )
            try:
                # A cancelled `connect` leaves its native part in the call for ever, so no time
                # limit.
                await room.connect(self._url, self._jwt)
            except rtc.ConnectError:
                self._report("out", "refused")
                await asyncio.sleep(RETRY_SEC)
                continue
            self._room = room
            self._report("in", "")
            if not self._is_wanted:
                await room.disconnect()
            reason = await gone
            self._report("out", rtc.DisconnectReason.Name(reason))
            self._room = None
            if reason in REMOVED:
                removed += 1
            await asyncio.sleep(RETRY_SEC)

    def _report(self, what: str, why: str) -> None:
        if self._is_quiet:
            return
        report = {"who": self._who, "is": what, "why": why, "at": time.time()}
        print(json.dumps(report), flush=True)


async def main() -> None:
    """Follows orders until the input ends."""
    clients: dict[str, Client] = {}
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(orders), sys.stdin
    )
    under_way = set()
    while line := await orders.readline():
        order = json.loads(line)
        who = order["who"]
        client = clients.get(who)
        todo = None
        if order["do"] == "again" and client is not None:
            clients[who] = client.again()
            if clients[who] is not client:
                todo = client.leave_after(clients[who])
        elif client is not None:
            todo = clients.pop(who).leave()
        if todo is not None:
            task = asyncio.create_task(todo)
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        if order["do"] == "join":
            clients[who] = Client(who, order["url"], order["jwt"])


if __name__ == "__main__":
    asyncio.run(main())
    # LiveKit's native part would print errors while Python shuts down.
    os._exit(0)
