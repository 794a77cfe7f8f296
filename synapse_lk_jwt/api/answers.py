# SPDX-License-Identifier: Apache-2.0
"""Answers, sent at once.

Synapse encodes the answers of its own endpoints on a thread, because some of them are huge. For one
as small as a token that takes longer than all that is done to make it.
"""

import json

from synapse.http.server import respond_with_json_bytes
from synapse.http.site import SynapseRequest
from synapse.types import JsonDict


def respond(request: SynapseRequest, code: int, content: JsonDict) -> None:
    """Answers a request, with CORS headers, unless it was given up meanwhile.

    Args:
        request: what is answered; its handler has nothing more to return to Synapse.
        code: the HTTP status.
        content: a small JSON object.
    """
    body = json.dumps(content, separators=(",", ":")).encode("ascii")
    respond_with_json_bytes(request, code, body, send_cors=True)
