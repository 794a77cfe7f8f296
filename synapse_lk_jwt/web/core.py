# SPDX-License-Identifier: Apache-2.0
"""What stands behind all endpoints."""

import attr

from synapse_lk_jwt.homeserver import Homeserver
from synapse_lk_jwt.issuer import Issuer
from synapse_lk_jwt.leaves import DelayedLeaves
from synapse_lk_jwt.limits import Limits


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Core:
    """What endpoints hand requests to, once they have read them.

    Attributes:
        homeserver: knows users and rooms.
        issuer: hands out tokens.
        limits: how often it does.
        leaves: takes on delayed leaves.
        livekit_url: the SFU, as clients are told.
    """

    homeserver: Homeserver
    issuer: Issuer
    limits: Limits
    leaves: DelayedLeaves
    livekit_url: str
