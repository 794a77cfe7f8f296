# SPDX-License-Identifier: Apache-2.0
"""Signs requests of one homeserver to another, as the server-server API specifies."""

from __future__ import annotations

from typing import Any

from signedjson.key import decode_signing_key_base64
from signedjson.sign import sign_json

from testbed.synapse import Synapse


def authorization(origin: Synapse, destination: str, method: str, path: str, content: Any) -> str:
    """The `Authorization` header of a request.

    Args:
        origin: the homeserver that sends the request.
        destination: the server name of the homeserver that receives it.
        method: the HTTP method.
        path: the path, with the query.
        content: the body as a JSON value.
    """
    request = {
        "method": method,
        "uri": path,
        "origin": origin.server_name,
        "destination": destination,
        "content": content,
    }
    algorithm, version, seed = (origin.directory / "signing.key").read_text().split()
    key = decode_signing_key_base64(algorithm, version, seed)
    signed = sign_json(request, origin.server_name, key)
    ((key_id, signature),) = signed["signatures"][origin.server_name].items()
    return (
        f'X-Matrix origin="{origin.server_name}",key="{key_id}",sig="{signature}",'
        f'destination="{destination}"'
    )
