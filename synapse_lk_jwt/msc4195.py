# SPDX-License-Identifier: Apache-2.0
"""The paths of MSC4195's endpoints.

Every endpoint has a stable path and an unstable one. Clients and servers from before the acceptance
of the MSC use the unstable one.
"""

import re

# An application service that claims these paths (MSC4512) receives the requests in our place.
PATH_PREFIX = "rtc/livekit"

GET_TOKEN = f"{PATH_PREFIX}/get_token"
DELEGATE_DELAYED_LEAVE = f"{PATH_PREFIX}/delegate_delayed_leave"

STABLE = "v1"
UNSTABLE = "unstable/io.element.msc4195"

# Either version, as a regular expression.
ANY_VERSION = f"(?:{STABLE}|{re.escape(UNSTABLE)})"


def client_path(endpoint: str, version: str = STABLE) -> str:
    """The path of a client-server endpoint, such as `GET_TOKEN`."""
    return f"/_matrix/client/{version}/{endpoint}"


def federation_path(endpoint: str, version: str = STABLE) -> str:
    """The path of a server-server endpoint, such as `GET_TOKEN`."""
    return f"/_matrix/federation/{version}/{endpoint}"
