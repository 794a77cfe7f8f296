# SPDX-License-Identifier: Apache-2.0
"""What the core raises, as Matrix errors."""

from collections.abc import Iterator
from contextlib import contextmanager

from synapse.api.errors import Codes, SynapseError

from synapse_lk_jwt.issuer import NotInRoom
from synapse_lk_jwt.sfu.rooms import SfuError


@contextmanager
def as_matrix_errors() -> Iterator[None]:
    """Turns errors of the core into the ones that clients are told.

    503 and not 502 for the SFU: a CDN in front of Synapse replaces a 502 by a page of its own
    without CORS headers, in which a browser sees a dead network.
    """
    try:
        yield
    except NotInRoom:
        raise SynapseError(403, "You are not joined to this room", Codes.FORBIDDEN) from None
    except SfuError:
        raise SynapseError(503, "Unable to create room on SFU", Codes.UNKNOWN) from None
