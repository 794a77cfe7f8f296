# SPDX-License-Identifier: Apache-2.0
"""Requests to the module's endpoints, in the form that clients send."""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode
from typing import Any

from testbed.http import Answer, http
from testbed.matrix import User

PREFIX = "/_synapse/client/livekit/jwt"
SLOT = "m.call#ROOM"


def sfu_get_body(user: User, room_id: str, **more: Any) -> dict[str, Any]:
    """A body for `/sfu/get` with a new OpenID token. `more` replaces and adds fields."""
    return {
        "room": room_id,
        "openid_token": more.get("openid_token") or user.openid_token(),
        "device_id": user.device_id,
        **more,
    }


def get_token_body(user: User, room_id: str, **more: Any) -> dict[str, Any]:
    """A body for `/get_token` with a new OpenID token. `more` replaces and adds fields."""
    return {
        "room_id": room_id,
        "slot_id": SLOT,
        "openid_token": more.get("openid_token") or user.openid_token(),
        "member": {
            "id": f"member-of-{user.device_id}",
            "claimed_user_id": user.user_id,
            "claimed_device_id": user.device_id,
        },
        **more,
    }


def post(client_url: str, endpoint: str, body: Any, timeout: float = 30.0) -> Answer:
    """Send a request to an endpoint of the service.

    Args:
        client_url: the URL of the main process or of a worker.
        endpoint: the path below the prefix, for example `/sfu/get`.
        body: bytes are sent as they are, anything else as JSON.
        timeout: seconds.
    """
    return http("POST", client_url + PREFIX + endpoint, body, timeout=timeout)


def claims(jwt: str) -> dict[str, Any]:
    """The claims of a LiveKit access token, without a check of its signature."""
    payload = jwt.split(".")[1]
    said = json.loads(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    assert isinstance(said, dict)
    return said


def homeserver_body(user: User, room_id: str, url: str, **more: Any) -> dict[str, Any]:
    """A body for MSC4195's client-server `get_token`. `more` replaces and adds fields."""
    return {
        "url": url,
        "room_id": room_id,
        "slot_id": SLOT,
        "member_id": f"member-of-{user.device_id}",
        **more,
    }


def homeserver_get_token(user: User, body: Any, prefix: str = "v1") -> Answer:
    """Send a request to MSC4195's client-server `get_token`, with the user's access token.

    Args:
        user: the user. Their process gets the request.
        body: the body, sent as JSON.
        prefix: `v1`, or `unstable/io.element.msc4195`.
    """
    return user.call("POST", f"/_matrix/client/{prefix}/rtc/livekit/get_token", body)


def homeserver_delegate(user: User, body: Any, prefix: str = "v1") -> Answer:
    """Send a request to MSC4195's client-server `delegate_delayed_leave`."""
    path = f"/_matrix/client/{prefix}/rtc/livekit/delegate_delayed_leave"
    return user.call("POST", path, body)
