# SPDX-License-Identifier: Apache-2.0
"""Why a request to LiveKit failed, and what an answer says about it."""

import json
from typing import ClassVar

from twisted.web.iweb import IResponse

from synapse_lk_jwt.livekit.proxies import is_down_behind_proxy, redirected_url
from synapse_lk_jwt.livekit.tokens import rejected_option

# What an admin does if another server answers.
SET_URL = "Set livekit_internal_url to LiveKit's own URL"


class SfuError(Exception):
    """A request to LiveKit failed. The text says why, for the log only.

    Attributes:
        cause: the kind of failure, a label of the metric `sfu_failures`.
    """

    cause: ClassVar[str]


class Unreachable(SfuError):
    """No connection to LiveKit, or a connection that broke."""

    cause = "no_connection"


class NoAnswer(SfuError):
    """LiveKit did not answer in time."""

    cause = "timeout"


class Unauthorized(SfuError):
    """LiveKit rejected the API key or its secret."""

    cause = "unauthorized"


class NotLiveKit(SfuError):
    """The answer is not one of LiveKit's API."""

    cause = "not_livekit"


class Refused(SfuError):
    """LiveKit works, but rejected this request.

    Attributes:
        code: LiveKit's error code.
    """

    cause = "refused"

    def __init__(self, text: str = "", code: str = "") -> None:
        super().__init__(text)
        self.code = code


class NotFound(Refused):
    """No such room, or no such participant in it."""


class NoNode(Refused):
    """No node of LiveKit answers for a room."""


def error_of_redirect(response: IResponse, path: str) -> SfuError:
    """The error for a redirect.

    Args:
        response: the redirect.
        path: the path of the request below `livekit_internal_url`.
    """
    location = (response.headers.getRawHeaders("Location") or [""])[0]
    url = redirected_url(location, path)
    if url is None:
        return NotLiveKit(f"it redirects to another page ({response.code}). {SET_URL}")
    where = "https" if url.startswith("https:") else "another URL"
    text = f"it redirects to {where} ({response.code}). Write livekit_internal_url: {url}"
    return NotLiveKit(text)


def error_of_answer(status: int, content_type: str, body: bytes, token: str) -> SfuError:
    """The error for an HTTP response that is no success, from LiveKit or a proxy in front of it.

    Args:
        status: the HTTP status.
        content_type: the header of that name.
        body: the body.
        token: the API token of the request, which must not be logged.
    """
    if status in (401, 403):
        # LiveKit's text quotes the token.
        option = rejected_option(body) or "livekit_key and livekit_secret"
        return Unauthorized(
            f"it rejected {option} ({status}). Compare keys: in LiveKit's configuration"
        )
    try:
        # Twirp's errors are JSON, also for requests in protobuf.
        error = json.loads(body)
        code, message = str(error["code"])[:40], str(error.get("msg", ""))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return _error_of_proxy(status, content_type)
    if status == 404 and code == "not_found":
        return NotFound()
    message = message.replace(token, "…")[:200]
    refused = NoNode if code == "unavailable" else Refused
    return refused(f"it answers {status} {code!r}: {message!r}", code)


def _error_of_proxy(status: int, content_type: str) -> SfuError:
    """The error for an answer that is no Twirp error, and so no answer of LiveKit."""
    if is_down_behind_proxy(status, is_twirp=False):
        return Unreachable(
            f"a proxy answers {status}: LiveKit is down behind it. Start LiveKit, or correct the"
            " port that the proxy forwards to"
        )
    if status == 407:
        return Unreachable("the proxy requires a user and a password (407)")
    if content_type.startswith("text/html"):
        return NotLiveKit(f"a web page ({status}) answers. {SET_URL}")
    return NotLiveKit(f"it answers {status}. {SET_URL}")
