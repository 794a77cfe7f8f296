# SPDX-License-Identifier: Apache-2.0
"""What stands behind all endpoints."""

import attr

from synapse_lk_jwt.api.rate_limits import Limits
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.delegation.service import DelegationService
from synapse_lk_jwt.issuer import Issuer


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Services:
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
    leaves: DelegationService
    livekit_url: str
