# SPDX-License-Identifier: Apache-2.0
"""What the core raises, as Matrix errors."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from synapse.api.errors import Codes, SynapseError

from synapse_lk_jwt.issuer import NotInRoom
from synapse_lk_jwt.remote import RemoteFailure, RemoteRefusal
from synapse_lk_jwt.sfu.rooms import SfuError

logger = logging.getLogger(__name__)


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
        raise SynapseError(403, "You are not joined to this room", Codes.FORBIDDEN) from None
    except SfuError:
        raise SynapseError(503, "Unable to create room on SFU", Codes.UNKNOWN) from None
    except RemoteRefusal as e:
        raise SynapseError(e.status, "The other homeserver refuses", e.errcode) from None
    except RemoteFailure as e:
        logger.info("No token of another homeserver: %s", e)
        raise SynapseError(502, "The other homeserver gave no token", Codes.UNKNOWN) from None


def check_url(url: str, livekit_url: str) -> None:
    """Refuses requests for another SFU than ours.

    Raises:
        SynapseError: 400 `M_INVALID_PARAM`.
    """
    if url != livekit_url:
        raise SynapseError(400, "url is not an SFU of this homeserver", Codes.INVALID_PARAM)


def no_such_delayed_event() -> SynapseError:
    """The error for a delayed event that is not there, or not this user's, or of another room."""
    return SynapseError(
        400, "delay_id is no delayed event of yours in this room", Codes.INVALID_PARAM
    )
