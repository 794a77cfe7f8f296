# SPDX-License-Identifier: Apache-2.0
"""The errors that endpoints answer with."""

import logging
from collections.abc import Awaitable, Callable, Coroutine
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from synapse.api.errors import (
    Codes,
    LimitExceededError,
    SynapseError,
    UnrecognizedRequestError,
)

from synapse_lk_jwt import metrics
from synapse_lk_jwt.issuer import NotInRoom
from synapse_lk_jwt.livekit.errors import SfuError
from synapse_lk_jwt.livekit.tables import SLOTS_RETRY_AFTER_MS, TooManySlots
from synapse_lk_jwt.remote_tokens import RemoteFailure, RemoteRefusal

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

# The cause of an error that does not name one, by its HTTP status.
_CAUSES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    413: "bad_request",
    429: "rate_limited",
}


class Refusal(SynapseError):
    """A Matrix error whose HTTP status does not determine its cause.

    Attributes:
        cause: a label of the metric `refusals`.
    """

    def __init__(self, cause: str, code: int, msg: str, errcode: str) -> None:
        super().__init__(code, msg, errcode)
        self.cause = cause


def raises_matrix_errors(
    endpoint: metrics.Endpoint,
) -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Coroutine[Any, Any, R]]]:
    """Decorates the handler of an endpoint: turns its errors into Matrix errors, and counts them.

    Args:
        endpoint: the endpoint, for the metric.
    """

    def decorate(handler: Callable[P, Awaitable[R]]) -> Callable[P, Coroutine[Any, Any, R]]:
        @wraps(handler)
        async def handle(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return await handler(*args, **kwargs)
            except UnrecognizedRequestError:
                # The path does not exist for this client, so no endpoint has refused the request.
                raise
            except Exception as e:
                # Every error is raised again. Synapse answers 500 unless it is a SynapseError.
                error = _matrix_error(e)
                metrics.refusals.labels(endpoint, _cause(error)).inc()
                if error is e:
                    raise
                raise error from None

        return handle

    return decorate


def _cause(error: Exception) -> str:
    if isinstance(error, Refusal):
        return error.cause
    code = error.code if isinstance(error, SynapseError) else 500
    return _CAUSES.get(code, "internal_error")


def _matrix_error(error: Exception) -> Exception:
    """The Matrix error for an error of the module. Other errors are returned as they are.

    The status for the SFU is 503 and not 502. A CDN in front of Synapse replaces a 502 by its own
    page without CORS headers, which a browser reports as a network failure. MSC4195 requires 502
    when another homeserver fails.
    """
    if isinstance(error, NotInRoom):
        return Refusal("not_in_room", 403, "You are not joined to this room", Codes.FORBIDDEN)
    if isinstance(error, TooManySlots):
        return LimitExceededError("synapse_lk_jwt_slots", retry_after_ms=SLOTS_RETRY_AFTER_MS)
    if isinstance(error, SfuError):
        return Refusal("sfu", 503, "Unable to create room on SFU", Codes.UNKNOWN)
    if isinstance(error, RemoteRefusal):
        text = "The other homeserver rejected the request"
        return Refusal("other_homeserver_refused", error.status, text, error.errcode)
    if isinstance(error, RemoteFailure):
        logger.info("Another homeserver issued no token: %s", error)
        text = "The other homeserver did not issue a token"
        return Refusal("other_homeserver_failed", 502, text, Codes.UNKNOWN)
    return error


def other_sfu() -> SynapseError:
    """The error for a URL that is not our SFU's."""
    return Refusal("other_sfu", 400, "url is not an SFU of this homeserver", Codes.INVALID_PARAM)


def unnamed_sfu() -> SynapseError:
    """The error for the SFU of another homeserver that the client does not name.

    A homeserver without this endpoint answers 404 as well. The client then requests the token from
    the service of that SFU.
    """
    text = "url is not an SFU of this homeserver. Name its homeserver in server_name"
    return Refusal("other_sfu", 404, text, Codes.NOT_FOUND)


def no_such_delayed_event() -> SynapseError:
    """The error for a delayed event that does not exist or that the user may not delegate."""
    text = "No such delayed event for this user in this room"
    return Refusal("no_such_delayed_event", 400, text, Codes.INVALID_PARAM)
