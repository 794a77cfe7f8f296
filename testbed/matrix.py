# SPDX-License-Identifier: Apache-2.0
"""The parts of the Matrix client-server API and of Synapse's admin API that the tests use."""

from __future__ import annotations

import hashlib
import hmac
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, urlencode

from testbed.http import Answer, http

_transaction = itertools.count()


@dataclass(frozen=True)
class User:
    """A user who is logged in on the homeserver process at `client_url`."""

    client_url: str
    user_id: str
    device_id: str
    access_token: str

    def at(self, client_url: str) -> User:
        """The same user, with another process of the same homeserver."""
        return replace(self, client_url=client_url)

    def call(self, method: str, path: str, body: Any = None) -> Answer:
        """Send a request with this user's access token."""
        headers = {"Authorization": f"Bearer {self.access_token}"}
        return http(method, self.client_url + path, body, headers)

    def whoami(self) -> Answer:
        return self.call("GET", "/_matrix/client/v3/account/whoami")

    def create_room(
        self,
        version: str | None = None,
        preset: str = "private_chat",
        invite: Sequence[str] = (),
        initial_state: Sequence[dict[str, Any]] = (),
        power_levels: dict[str, Any] | None = None,
    ) -> str:
        """Create a room and return its ID.

        Args:
            version: the room version; None for the homeserver's default.
            preset: the preset of `createRoom`.
            invite: the IDs of users to invite.
            initial_state: the `initial_state` of `createRoom`.
            power_levels: overrides for the preset's `m.room.power_levels`.
        """
        body: dict[str, Any] = {
            "preset": preset,
            "invite": list(invite),
            "initial_state": list(initial_state),
        }
        if version is not None:
            body["room_version"] = version
        if power_levels is not None:
            body["power_level_content_override"] = power_levels
        room_id = self.call("POST", "/_matrix/client/v3/createRoom", body).ok()["room_id"]
        assert isinstance(room_id, str)
        return room_id

    def invite(self, room_id: str, user_id: str) -> None:
        self._in_room(room_id, "invite", {"user_id": user_id})

    def join(self, room_id: str, via: Sequence[str] = ()) -> None:
        """Join a room. `via` names homeservers that are in the room."""
        query = urlencode([("via", server) for server in via] + [("server_name", s) for s in via])
        self.call("POST", f"/_matrix/client/v3/join/{_path(room_id)}?{query}", {}).ok()

    def leave(self, room_id: str) -> None:
        self._in_room(room_id, "leave", {})

    def kick(self, room_id: str, user_id: str) -> None:
        self._in_room(room_id, "kick", {"user_id": user_id})

    def ban(self, room_id: str, user_id: str) -> None:
        self._in_room(room_id, "ban", {"user_id": user_id})

    def send_state(self, room_id: str, kind: str, content: Any, key: str = "") -> None:
        path = f"/_matrix/client/v3/rooms/{_path(room_id)}/state/{_path(kind)}/{_path(key)}"
        self.call("PUT", path, content).ok()

    def state(self, room_id: str, kind: str, key: str = "") -> dict[str, Any] | None:
        """The content of a state event, or None if the event does not exist."""
        path = f"/_matrix/client/v3/rooms/{_path(room_id)}/state/{_path(kind)}/{_path(key)}"
        answer = self.call("GET", path)
        if answer.status == 404:
            return None
        content = answer.ok()
        assert isinstance(content, dict)
        return content

    def delay_state(
        self, room_id: str, kind: str, content: Any, key: str = "", delay_ms: int = 3_600_000
    ) -> str:
        """Schedule a state event (MSC4140) and return its delay ID."""
        path = f"/_matrix/client/v3/rooms/{_path(room_id)}/state/{_path(kind)}/{_path(key)}"
        query = f"?org.matrix.msc4140.delay={delay_ms}"
        delay_id = self.call("PUT", path + query, content).ok()["delay_id"]
        assert isinstance(delay_id, str)
        return delay_id

    def delayed(self) -> list[dict[str, Any]]:
        """Delayed events of this user that have not been sent yet."""
        path = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events"
        events = self.call("GET", path).ok()["delayed_events"]
        assert isinstance(events, list)
        return events

    def timeline(self, room_id: str) -> list[dict[str, Any]]:
        """The last hundred events of a room, the newest first."""
        path = f"/_matrix/client/v3/rooms/{_path(room_id)}/messages?dir=b&limit=100"
        chunk = self.call("GET", path).ok()["chunk"]
        assert isinstance(chunk, list)
        return chunk

    def send_text(self, room_id: str, text: str) -> str:
        """Send a message and return its event ID."""
        path = f"/_matrix/client/v3/rooms/{_path(room_id)}/send/m.room.message/{next(_transaction)}"
        event_id = self.call("PUT", path, {"msgtype": "m.text", "body": text}).ok()["event_id"]
        assert isinstance(event_id, str)
        return event_id

    def membership(self, room_id: str, user_id: str) -> str | None:
        """The membership of `user_id` in this homeserver's view of the room, or None."""
        path = f"/_matrix/client/v3/rooms/{_path(room_id)}/state/m.room.member/{_path(user_id)}"
        answer = self.call("GET", path)
        if answer.status == 404:
            return None
        membership = answer.ok()["membership"]
        assert isinstance(membership, str)
        return membership

    def openid_token(self) -> dict[str, Any]:
        """A new OpenID token, in the form that clients send to the service."""
        path = f"/_matrix/client/v3/user/{_path(self.user_id)}/openid/request_token"
        token = self.call("POST", path, {}).ok()
        assert isinstance(token, dict)
        return token

    def profile(self, user_id: str) -> Answer:
        """The profile of a user. The homeserver fetches a remote one over federation."""
        return self.call("GET", f"/_matrix/client/v3/profile/{_path(user_id)}")

    def deactivate(self, user_id: str, erase: bool = False) -> None:
        """Deactivate a user. This and the following methods need a server admin."""
        path = f"/_synapse/admin/v1/deactivate/{_path(user_id)}"
        self.call("POST", path, {"erase": erase}).ok()

    def lock(self, user_id: str, locked: bool = True) -> None:
        self.call("PUT", f"/_synapse/admin/v2/users/{_path(user_id)}", {"locked": locked}).ok()

    def suspend(self, user_id: str, suspended: bool = True) -> None:
        path = f"/_synapse/admin/v1/suspend/{_path(user_id)}"
        self.call("PUT", path, {"suspend": suspended}).ok()

    def _in_room(self, room_id: str, action: str, body: dict[str, Any]) -> None:
        self.call("POST", f"/_matrix/client/v3/rooms/{_path(room_id)}/{action}", body).ok()


def register(client_url: str, shared_secret: str, name: str, admin: bool = False) -> User:
    """Create an account with Synapse's `registration_shared_secret` and log in to it."""
    url = f"{client_url}/_synapse/admin/v1/register"
    nonce = http("GET", url).ok()["nonce"]
    password = f"password of {name}"
    signed = "\0".join([nonce, name, password, "admin" if admin else "notadmin"])
    answer = http(
        "POST",
        url,
        {
            "nonce": nonce,
            "username": name,
            "password": password,
            "admin": admin,
            "mac": hmac.new(shared_secret.encode(), signed.encode(), hashlib.sha1).hexdigest(),
        },
    ).ok()
    return _user(client_url, answer)


def log_in(client_url: str, name: str) -> User:
    """Log in to an account of `register` with a new device."""
    answer = http(
        "POST",
        f"{client_url}/_matrix/client/v3/login",
        {
            "type": "m.login.password",
            "identifier": {"type": "m.id.user", "user": name},
            "password": f"password of {name}",
        },
    ).ok()
    return _user(client_url, answer)


def _user(client_url: str, answer: dict[str, Any]) -> User:
    return User(client_url, answer["user_id"], answer["device_id"], answer["access_token"])


def _path(part: str) -> str:
    return quote(part, safe="")
