# SPDX-License-Identifier: Apache-2.0
"""Sends prepared HTTP/1.1 requests, and checks only the status of the answers."""

import asyncio
import time
from collections.abc import Iterator

import attr


@attr.s(auto_attribs=True, frozen=True)
class Result:
    """The measured times.

    Attributes:
        seconds: the seconds from the first request to the last answer.
        times: the seconds of each request.
    """

    seconds: float
    times: list[float]

    @property
    def per_second(self) -> float:
        """Requests per second."""
        return len(self.times) / self.seconds

    def quantile(self, part: float) -> float:
        """The seconds that this part of the requests stayed below."""
        return sorted(self.times)[min(len(self.times) - 1, int(len(self.times) * part))]


class WrongAnswer(Exception):
    """An answer is not 200. The message contains it."""


class _Connection(asyncio.Protocol):
    """Sends one request after the other, and waits for each answer."""

    def __init__(
        self, requests: Iterator[bytes], until: float, times: list[float], pause: float
    ) -> None:
        self._requests = requests
        self._until = until
        self._times = times
        self._pause = pause
        self._answer = b""
        self._sent = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self) -> None:
        request = next(self._requests, None)
        self._sent = time.perf_counter()
        if request is None or self._sent > self._until:
            self._transport.close()
            if not self.done.done():
                self.done.set_result(None)
            return
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if not _is_complete(self._answer):
            return
        if not self._answer.startswith(b"HTTP/1.1 200"):
            self.done.set_exception(WrongAnswer(self._answer.decode("utf-8", "replace")))
            self._transport.close()
            return
        self._times.append(time.perf_counter() - self._sent)
        self._answer = b""
        if self._pause:
            asyncio.get_running_loop().call_later(self._pause, self.send)
        else:
            self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(WrongAnswer("the connection was closed"))


def _is_complete(answer: bytes) -> bool:
    head, found, body = answer.partition(b"\r\n\r\n")
    if not found:
        return False
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            return len(body) >= int(line[15:])
    return body.endswith(b"0\r\n\r\n")


async def run(
    port: int, requests: list[bytes], connections: int, seconds: float, pause: float = 0.0
) -> Result:
    """Sends requests until the time is over or all have been sent.

    Args:
        port: the port on 127.0.0.1.
        requests: whole HTTP requests, each of which is sent once.
        connections: the number of connections, each with one request at a time.
        seconds: the maximum duration.
        pause: the seconds that each connection waits between an answer and the next request.

    Raises:
        WrongAnswer: if any answer is not 200.
    """
    loop = asyncio.get_running_loop()
    times: list[float] = []
    left = iter(requests)
    until = time.perf_counter() + seconds + 60
    opened = []
    for _ in range(connections):
        _, connection = await loop.create_connection(
            lambda: _Connection(left, until, times, pause), "127.0.0.1", port
        )
        opened.append(connection)
    began = time.perf_counter()
    for connection in opened:
        connection._until = began + seconds
        connection.send()
    await asyncio.gather(*(connection.done for connection in opened))
    return Result(time.perf_counter() - began, times)
