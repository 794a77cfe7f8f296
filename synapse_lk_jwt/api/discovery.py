# SPDX-License-Identifier: Apache-2.0
"""The stable path of MSC4143's discovery, for versions of Synapse without it."""

import re

from synapse.http.servlet import RestServlet
from synapse.http.site import SynapseRequest
from synapse.types import JsonDict

from synapse_lk_jwt.compat.homeserver import Homeserver


class TransportsRestServlet(RestServlet):
    """Lists the transports of this homeserver.

    GET /_matrix/client/v1/rtc/transports HTTP/1.1
    Authorization: Bearer …
    """

    PATTERNS = (re.compile("^/_matrix/client/v1/(?:rtc/transports)$"),)
    CATEGORY = "MatrixRTC requests"

    def __init__(self, homeserver: Homeserver) -> None:
        super().__init__()
        self._homeserver = homeserver

    async def on_GET(self, request: SynapseRequest) -> tuple[int, JsonDict]:
        """Handles a request."""
        # Guests can request tokens, so they need the transports.
        await self._homeserver.users.get_user_by_req(request, allow_guest=True)
        transports = self._homeserver.discovery.transports
        # MSC4143 renamed the key before its acceptance, and clients still read the old one.
        return 200, {"rtc_transports": transports, "transports": transports}
