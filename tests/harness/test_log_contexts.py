# SPDX-License-Identifier: Apache-2.0
"""Requests to other servers keep Synapse's log context.

Without it the log shows no request ID, and Synapse accounts the work to no request.
"""

import json
from collections.abc import Callable
from typing import Any

from synapse.logging import context as contexts
from synapse.logging.context import (
    SENTINEL_CONTEXT,
    PreserveLoggingContext,
    current_context,
    set_current_context,
)
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http_headers import Headers

from synapse_lk_jwt.auth.openid import InvalidToken, user_of_remote_token
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.compat.http import read_body, within
from synapse_lk_jwt.remote_tokens import RemoteSfus
from tests.harness.base import ModuleTestCase

# Synapse does not export it to type checkers.
log_context: Any = vars(contexts)["LoggingContext"]


class Response:
    """A response whose body arrives when the test calls `finish`."""

    def __init__(self, code: int, body: bytes) -> None:
        # The log context that the body is read in.
        self.read_in: str | None = None
        self.code = code
        self.headers = Headers()
        self._body = body

    def deliverBody(self, protocol: Any) -> None:
        self.read_in = str(current_context())
        self._protocol = protocol

    def finish(self) -> None:
        with PreserveLoggingContext():
            self._protocol.dataReceived(self._body)
            self._protocol.connectionLost(Failure(ResponseDone()))


class Agent:
    """Resets the log context of its caller, as Synapse's agent does."""

    def __init__(self) -> None:
        self.waiting: list[Deferred[Any]] = []
        # The log contexts of its requests.
        self.asked_in: list[str] = []

    def request(self, *_args: Any) -> "Deferred[Any]":
        self.asked_in.append(str(current_context()))
        self.waiting.append(Deferred())
        set_current_context(SENTINEL_CONTEXT)
        return self.waiting[-1]

    def answer(self, response: Response) -> None:
        with PreserveLoggingContext():
            self.waiting[-1].callback(response)


class LogContextTests(ModuleTestCase):
    def prepare(self, reactor: Any, clock: Any, hs: Any) -> None:
        super().prepare(reactor, clock, hs)
        self.agent = Agent()
        hs.get_federation_http_client().agent = self.agent
        self.homeserver = Homeserver(hs.get_module_api())
        self.seen: list[str] = []

    def note(self) -> None:
        self.seen.append(str(current_context()))

    def run_in_context(self, call: Callable[[], Any]) -> list[Any]:
        """Runs an async function in a new log context, and notes the context that it ends in."""
        results: list[Any] = []

        async def run() -> None:
            with log_context(name="POST-1", server_name="test"):
                try:
                    results.append(await call())
                except InvalidToken as e:
                    results.append(e)
                self.note()

        with PreserveLoggingContext():
            ensureDeferred(run())
            # A function that waits resets the context of its caller.
            assert current_context() is SENTINEL_CONTEXT
        return results

    async def look_up(self) -> str:
        return await user_of_remote_token(self.homeserver, self.OTHER_SERVER_NAME, "token")

    def test_federation_request_and_its_body_keep_the_log_context(self) -> None:
        async def ask() -> bytes:
            response = await self.homeserver.federation.request("GET", "other.example.com", "/x")
            self.note()
            body = await read_body(response, 100)
            self.note()
            return body

        results = self.run_in_context(lambda: within(10, self.homeserver.clock, ask))
        response = Response(200, b"body")
        self.agent.answer(response)
        response.finish()
        assert results == [b"body"]
        assert self.seen == ["POST-1"] * 3

    def test_openid_look_up_keeps_the_log_context(self) -> None:
        results = self.run_in_context(self.look_up)
        response = Response(200, json.dumps({"sub": self.rita}).encode())
        self.agent.answer(response)
        response.finish()
        assert results == [self.rita]
        assert [*self.agent.asked_in, response.read_in, *self.seen] == ["POST-1"] * 3

    def test_openid_look_up_that_times_out_keeps_the_log_context(self) -> None:
        (*results,) = self.run_in_context(self.look_up)
        assert results == []
        self.reactor.advance(11)
        assert self.seen == ["POST-1"]

    def test_remote_token_at_the_second_path_keeps_the_log_context(self) -> None:
        unknown = Response(404, b'{"errcode": "M_UNRECOGNIZED", "error": ""}')
        good = Response(200, b'{"jwt": "a.b.c"}')
        sfus = RemoteSfus(self.homeserver)
        results = self.run_in_context(lambda: sfus.get_token(self.OTHER_SERVER_NAME, {}))
        for number, response in enumerate((unknown, good), 1):
            assert len(self.agent.waiting) == number
            self.agent.answer(response)
            response.finish()
        assert results == ["a.b.c"]
        assert self.agent.asked_in == ["POST-1"] * 2
        assert [unknown.read_in, good.read_in, *self.seen] == ["POST-1"] * 3
