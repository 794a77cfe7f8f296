# SPDX-License-Identifier: Apache-2.0
"""The module on a Synapse that delegates authentication to the Matrix Authentication Service.

A stand-in answers Synapse's introspection requests. MAS itself does not run here.
"""

import json
import secrets
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import attr
import pytest

from testbed import service
from testbed.http import http
from testbed.livekit import LiveKit
from testbed.matrix import User
from testbed.sets import module_config, running
from testbed.synapse import Synapse

SECRET = secrets.token_hex(16)
DEVICE = "DEVICE"
TRANSPORTS = "/_matrix/client/unstable/org.matrix.msc4143/rtc/transports"


class Introspection(ThreadingHTTPServer):
    """The introspection endpoint of MAS (RFC 7662).

    Attributes:
        tokens: the localpart of the user for each access token.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _IntrospectionHandler)
        self.tokens: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class _IntrospectionHandler(BaseHTTPRequestHandler):
    server: Introspection

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        username = self.server.tokens.get(parse_qs(body)["token"][0])
        is_synapse = self.headers["Authorization"] == f"Bearer {SECRET}"
        answer: dict[str, Any] = {"active": False}
        if self.path == "/oauth2/introspect" and is_synapse and username is not None:
            scope = "urn:matrix:client:api:*"
            answer = {
                "active": True,
                "scope": scope,
                "username": username,
                "device_id": DEVICE,
                "expires_in": 300,
            }
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Prints nothing."""


@attr.s(auto_attribs=True, frozen=True)
class Delegated:
    """A homeserver without passwords of its own, and its LiveKit."""

    synapse: Synapse
    livekit: LiveKit
    introspection: Introspection

    def user(self, name: str) -> User:
        """Creates a user and a device as MAS does."""
        headers = {"Authorization": f"Bearer {SECRET}"}
        for path, body in (
            ("provision_user", {"localpart": name}),
            ("upsert_device", {"localpart": name, "device_id": DEVICE}),
        ):
            url = f"{self.synapse.client_url}/_synapse/mas/{path}"
            assert http("POST", url, body, headers).status in (200, 201)
        token = f"mat_{secrets.token_hex(8)}"
        self.introspection.tokens[token] = name
        user_id = f"@{name}:{self.synapse.server_name}"
        return User(self.synapse.client_url, user_id, DEVICE, token)


@pytest.fixture(scope="module")
def delegated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Delegated]:
    directory = tmp_path_factory.mktemp("mas")
    introspection = Introspection()
    threading.Thread(target=introspection.serve_forever, daemon=True).start()
    settings = {
        "matrix_authentication_service": {
            "enabled": True,
            "endpoint": introspection.url,
            "secret": SECRET,
        },
        "password_config": {"enabled": False},
    }
    try:
        livekit = LiveKit(directory)
        synapse = Synapse("a", directory, module_config(livekit), settings)
        with running(livekit, synapse):
            yield Delegated(synapse, livekit, introspection)
    finally:
        introspection.shutdown()
        introspection.server_close()


def test_rtc_transports_with_token_of_mas_names_the_service(delegated: Delegated) -> None:
    alice = delegated.user("alice")
    [transport] = alice.call("GET", TRANSPORTS).ok()["rtc_transports"]
    assert transport["livekit_service_url"].endswith(service.PREFIX)


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [("/sfu/get", service.sfu_get_body), ("/get_token", service.get_token_body)],
)
def test_service_token_request_of_user_of_mas_gets_token(
    endpoint: str, body: Any, delegated: Delegated
) -> None:
    bob = delegated.user(f"bob{endpoint.replace('/', '_')}")
    answer = service.post(delegated.synapse.client_url, endpoint, body(bob, bob.create_room()))
    assert service.claims(answer.ok()["jwt"])["video"]["roomJoin"] is True


@pytest.mark.parametrize("prefix", ["v1", "unstable/io.element.msc4195"])
def test_homeserver_token_request_with_token_of_mas_gets_token(
    prefix: str, delegated: Delegated
) -> None:
    carol = delegated.user(f"carol_{prefix.partition('/')[0]}")
    body = service.homeserver_body(carol, carol.create_room(), delegated.livekit.url)
    answer = service.homeserver_get_token(carol, body, prefix)
    assert service.claims(answer.ok()["jwt"])["video"]["roomJoin"] is True


def test_homeserver_token_request_with_unknown_token_is_rejected_with_401(
    delegated: Delegated,
) -> None:
    stranger = User(delegated.synapse.client_url, "@x:x", DEVICE, "mat_unknown")
    body = service.homeserver_body(stranger, "!room:x", delegated.livekit.url)
    answer = service.homeserver_get_token(stranger, body)
    assert (answer.status, answer.json["errcode"]) == (401, "M_UNKNOWN_TOKEN")
