# SPDX-License-Identifier: Apache-2.0
"""What the core raises, as Matrix errors, and what these are counted as."""

import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from synapse.api.errors import Codes, LimitExceededError, SynapseError

from synapse_lk_jwt import metrics
from synapse_lk_jwt.identifiers import is_same_url
from synapse_lk_jwt.issuer import NotInRoom
from synapse_lk_jwt.livekit.client import SfuError
from synapse_lk_jwt.livekit.tables import SLOTS_RETRY_AFTER_MS, TooManySlots
from synapse_lk_jwt.remote_tokens import RemoteFailure, RemoteRefusal

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

# What those that have no cause of their own are counted as, by their HTTP status.
_CAUSES: dict[int, metrics.RefusalCause] = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    413: "bad_request",
    429: "rate_limited",
}


class Refusal(SynapseError):
    """A Matrix error whose HTTP status does not tell its cause."""

    def __init__(self, cause: metrics.RefusalCause, code: int, msg: str, errcode: str) -> None:
        super().__init__(code, msg, errcode)
        self.cause: metrics.RefusalCause = cause


def counts_refusals(
    endpoint: metrics.Endpoint,
) -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Coroutine[Any, Any, R]]]:
    """Decorates the handler of an endpoint, and counts the errors that it ends with."""

    def decorate(handler: Callable[P, Awaitable[R]]) -> Callable[P, Coroutine[Any, Any, R]]:
        @wraps(handler)
        async def counted(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return await handler(*args, **kwargs)
            except Exception as e:
                metrics.refusals.labels(endpoint, _cause(e)).inc()
                raise

        return counted

    return decorate


def _cause(error: Exception) -> metrics.RefusalCause:
    if isinstance(error, Refusal):
        return error.cause
    code = error.code if isinstance(error, SynapseError) else 500
    return _CAUSES.get(code, "internal_error")


@contextmanager
def as_matrix_errors() -> Iterator[None]:
    """Turns errors of the core into the ones that clients are told.

    503 and not 502 for the SFU: a CDN in front of Synapse replaces a 502 by a page of its own
    without CORS headers, in which a browser sees a dead network. 502 for other homeservers is what
    MSC4195 says.
    """
    try:
        yield
    except NotInRoom:
        raise Refusal(
            "not_in_room", 403, "You are not joined to this room", Codes.FORBIDDEN
        ) from None
    except TooManySlots:
        raise LimitExceededError(
            "synapse_lk_jwt_slots", retry_after_ms=SLOTS_RETRY_AFTER_MS
        ) from None
    except SfuError:
        raise Refusal("sfu", 503, "Unable to create room on SFU", Codes.UNKNOWN) from None
    except RemoteRefusal as e:
        raise Refusal(
            "other_homeserver_refused", e.status, "The other homeserver refuses", e.errcode
        ) from None
    except RemoteFailure as e:
        logger.info("No token of another homeserver: %s", e)
        raise Refusal(
            "other_homeserver_failed", 502, "The other homeserver gave no token", Codes.UNKNOWN
        ) from None


def check_url(url: str, livekit_url: str) -> None:
    """Refuses requests for another SFU than ours.

    Raises:
        SynapseError: 400 `M_INVALID_PARAM`.
    """
    if not is_same_url(url, livekit_url):
        raise other_sfu()


def other_sfu() -> SynapseError:
    """The error for a URL that is not our SFU's."""
    return Refusal("other_sfu", 400, "url is not an SFU of this homeserver", Codes.INVALID_PARAM)


def no_such_sfu() -> SynapseError:
    """The error for another server's SFU whose server the client does not name.

    The same as of a homeserver without this endpoint: the client then asks the service of that SFU.
    """
    return Refusal(
        "other_sfu", 404, "url is not an SFU of this homeserver; name its server", Codes.NOT_FOUND
    )


def no_such_delayed_event() -> SynapseError:
    """The error for a delayed event that is not there, or not this user's, or of another room."""
    return Refusal(
        "no_such_delayed_event",
        400,
        "delay_id is no delayed event of yours in this room",
        Codes.INVALID_PARAM,
    )
