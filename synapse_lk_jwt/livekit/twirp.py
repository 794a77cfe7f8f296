# SPDX-License-Identifier: Apache-2.0
"""Requests to LiveKit's RoomService: how they are sent, repeated, limited and logged.

LiveKit's server API is Twirp, which is protobuf over HTTP POST
(https://twitchtv.github.io/twirp/docs/spec_v7.html). livekit-api has a client for it, but on
asyncio, which does not run on Synapse's reactor.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from livekit.api import VideoGrants
from twisted.internet.error import ConnectError, DNSLookupError
from twisted.web.client import ResponseFailed
from twisted.web.http_headers import Headers
from twisted.web.iweb import IResponse

from synapse_lk_jwt import metrics
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.compat.http import NETWORK_ERRORS, BodyTooLarge, TimedOut, read_body, within
from synapse_lk_jwt.livekit.errors import (
    SET_URL,
    NoAnswer,
    NotFound,
    NotLiveKit,
    Refused,
    SfuError,
    Unreachable,
    error_of_answer,
    error_of_redirect,
)
from synapse_lk_jwt.livekit.failure_log import FailureLog
from synapse_lk_jwt.livekit.proxies import is_redirect
from synapse_lk_jwt.livekit.requests import RoomServiceRequest, room_service_request
from synapse_lk_jwt.livekit.stream import Unreadable
from synapse_lk_jwt.livekit.tokens import TokenSigner

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
T = TypeVar("T")

TIMEOUT_SEC = 10
MAX_ANSWER_BYTES = 1024 * 1024

# Synapse's client logs the first argument of an exception, and raises IndexError if it has none.
_CONNECTION_ERRORS = (*NETWORK_ERRORS, IndexError)

# The scope of the failures that make LiveKit as a whole unusable; other scopes are methods.
_ALL = ""


class TwirpClient:
    """Sends requests to LiveKit's RoomService."""

    def __init__(
        self, homeserver: Homeserver, api_url: str, signer: TokenSigner, proxy_url: str | None
    ) -> None:
        """
        Args:
            homeserver: provides the HTTP client and the clock.
            api_url: the URL of LiveKit's API, `http(s)://`, without a slash at the end.
            signer: the SFU's API key.
            proxy_url: the forward proxy between this process and LiveKit, for the log.
        """
        self._homeserver = homeserver
        self._api_url = api_url
        self._signer = signer
        # How the log names LiveKit.
        self._livekit = api_url
        if proxy_url is not None:
            self._livekit += f" through the proxy {proxy_url}"
        self._failures = FailureLog(homeserver.reactor)

    async def call(
        self,
        method: str,
        request: Message,
        grants: VideoGrants,
        read: Callable[[IResponse], Awaitable[T]],
        *,
        expected: tuple[type[SfuError], ...] = (NotFound,),
        timeout_sec: float = TIMEOUT_SEC,
    ) -> T:
        """Calls a method of RoomService, and once more if the connection breaks.

        Args:
            method: the name of the method.
            request: its argument.
            grants: what the API token of the request allows.
            read: reads the body of a successful answer. It is called again for a second attempt.
            expected: failures that the caller handles, and that are not reported here.
            timeout_sec: how long all of it may take, in seconds.

        Raises:
            SfuError: if LiveKit rejects the request, or does not answer in time.
        """
        signed_request = room_service_request(self._api_url, method, request, grants, self._signer)

        async def post() -> T:
            return await self._post(signed_request, read)

        duration = metrics.sfu_request_seconds.labels(method)
        try:
            with metrics.timing(duration, self._homeserver.reactor):
                answer = await self._in_time(method, post, timeout_sec)
        except expected as e:
            if isinstance(e, NotFound):
                self._succeeded(method)
            raise
        except SfuError as e:
            self.report(method, e)
            raise
        self._succeeded(method)
        return answer

    def report(self, method: str, error: SfuError) -> None:
        """Counts and logs a failure. Callers report expected ones that they cannot handle."""
        metrics.sfu_failures.labels(method, error.cause).inc()
        text, check_command = str(error).rstrip("."), self._homeserver.check_command
        if not isinstance(error, Refused):
            if self._failures.is_due(_ALL, text):
                logger.error(
                    "LiveKit at %s cannot be used, so calls cannot be started: %s. %s",
                    self._livekit,
                    text,
                    check_command,
                )
        # The text of such an error can name a room, so its code distinguishes it from others.
        elif self._failures.is_due(method, error.code):
            logger.error(
                "LiveKit at %s rejected %s: %s. %s", self._livekit, method, text, check_command
            )

    def _succeeded(self, method: str) -> None:
        self._failures.end(method)
        if self._failures.end(_ALL):
            logger.info("LiveKit at %s can be used again", self._livekit)

    async def _in_time(
        self, method: str, post: Callable[[], Awaitable[T]], timeout_sec: float
    ) -> T:
        """Sends a request, and once more if the connection breaks within the time limit.

        Raises:
            SfuError: for every failure of LiveKit or of the network.
        """
        reactor = self._homeserver.reactor
        deadline = reactor.seconds() + timeout_sec

        async def post_twice() -> T:
            try:
                return await post()
            except (SfuError, BodyTooLarge):
                raise
            except _CONNECTION_ERRORS as e:
                # Cancelling the request breaks its connection, too.
                if reactor.seconds() >= deadline:
                    raise
                # LiveKit or a proxy may have closed a connection that Synapse kept open, and
                # clients do not repeat a request for a token.
                logger.debug("%s of LiveKit failed (%s), trying once more", method, e)
                return await post()

        try:
            return await within(timeout_sec, self._homeserver.clock, post_twice)
        except TimedOut:
            raise NoAnswer(f"no answer within {timeout_sec} s") from None
        except BodyTooLarge:
            raise NotLiveKit(f"its answer is too large. {SET_URL}") from None
        except (ConnectError, DNSLookupError) as e:
            raise Unreachable(f"no connection: {e}") from None
        except _CONNECTION_ERRORS as e:
            raise Unreachable(f"the connection broke: {type(e).__name__}: {e}") from None

    async def _post(
        self, request: RoomServiceRequest, read: Callable[[IResponse], Awaitable[T]]
    ) -> T:
        """Sends a request once.

        Raises:
            SfuError: if the answer is no success.
        """
        path = request.url.removeprefix(self._api_url)
        headers = Headers({name: [value] for name, value in request.headers.items()})
        try:
            response = await self._homeserver.http.request(
                "POST", request.url, request.body, headers
            )
        except ResponseFailed as e:
            # Synapse's client does not follow the redirect of a POST, and raises this instead.
            if e.response is None or not is_redirect(e.response.code):
                raise
            raise error_of_redirect(e.response, path) from None
        if is_redirect(response.code):
            raise error_of_redirect(response, path)
        content_type = (response.headers.getRawHeaders("Content-Type") or [""])[0]
        if response.code != 200 or not content_type.startswith("application/protobuf"):
            answer = await read_body(response, MAX_ANSWER_BYTES)
            raise error_of_answer(response.code, content_type, answer, request.token)
        try:
            return await read(response)
        except (DecodeError, Unreadable):
            raise NotLiveKit(f"its answer cannot be read. {SET_URL}") from None


def message(answer: type[M]) -> Callable[[IResponse], Awaitable[M]]:
    """Reads an answer that is one small message."""

    async def read(response: IResponse) -> M:
        return answer.FromString(await read_body(response, MAX_ANSWER_BYTES))

    return read
