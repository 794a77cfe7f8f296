# SPDX-License-Identifier: Apache-2.0
"""Some clients in a process of their own, so that they can die without a word.

python -m tests.chaos.client

Takes orders on standard input, tells what happens on standard output, both a JSON object a line,
and ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time

from livekit import rtc

# For its settings of the client's log.
import testbed.call  # noqa: F401

RETRY_SEC = 0.5
# Whoever is removed tries the token so often again.
STUBBORN = 2

REMOVED = (rtc.DisconnectReason.PARTICIPANT_REMOVED, rtc.DisconnectReason.ROOM_DELETED)


class Client:
    """One participant, who comes back with the same token when the connection is lost.

    LiveKit's client tries for twenty seconds by itself. Browsers go on for longer; so does this.
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
        """Ends the connection in an orderly way."""
        self._is_wanted = False
        if self._room is not None:
            await self._room.disconnect()
        await self._task

    def again(self) -> Client:
        """Connects a second time, by which LiveKit ends the first connection."""
        if self._room is None:
            # It is about to, already.
            return self
        self._is_wanted = False
        self._is_quiet = True
        return Client(self._who, self._url, self._jwt)

    async def give_way(self, second: Client) -> None:
        """Goes once a second connection is there, if LiveKit has not ended this one already."""
        while second._room is None and not second._task.done():
            await asyncio.sleep(0.05)
        await self.leave()

    async def _stay(self) -> None:
        removed = 0
        while self._is_wanted and removed <= STUBBORN:
            room = rtc.Room()
            gone: asyncio.Future[rtc.DisconnectReason.ValueType] = asyncio.Future()
            room.on("reconnecting", lambda: self._tell("out", "reconnecting"))
            room.on("reconnected", lambda: self._tell("in", ""))
            room.on(
                "disconnected", lambda reason, gone=gone: gone.done() or gone.set_result(reason)
            )
            try:
                # Not to be cancelled: the native part would go on, and be in the call for ever.
                await room.connect(self._url, self._jwt)
            except rtc.ConnectError:
                self._tell("out", "refused")
                await asyncio.sleep(RETRY_SEC)
                continue
            self._room = room
            self._tell("in", "")
            if not self._is_wanted:
                await room.disconnect()
            reason = await gone
            self._tell("out", rtc.DisconnectReason.Name(reason))
            self._room = None
            if reason in REMOVED:
                removed += 1
            await asyncio.sleep(RETRY_SEC)

    def _tell(self, what: str, why: str) -> None:
        if self._is_quiet:
            return
        report = {"who": self._who, "is": what, "why": why, "at": time.time()}
        print(json.dumps(report), flush=True)


async def main() -> None:
    """Follows orders until there are no more."""
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
                todo = client.give_way(clients[who])
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
    # LiveKit's native part would have a word to say, and there is nobody to hear it.
    os._exit(0)
