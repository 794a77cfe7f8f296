# SPDX-License-Identifier: Apache-2.0
"""Which users get a token at which endpoint, as a table."""

import inspect
import json
from collections.abc import Callable
from typing import Any

from parameterized import parameterized
from synapse.appservice import ApplicationService
from synapse.types import UserID

from tests.harness.base import ModuleTestCase, response

TOKEN = (200, None)
UNAUTHORIZED = (401, "M_UNAUTHORIZED")
FORBIDDEN = (403, "M_FORBIDDEN")
# Synapse itself rejects the access token.
UNKNOWN_TOKEN = (401, "M_UNKNOWN_TOKEN")
LOCKED = (401, "M_USER_LOCKED")
# Local users cannot use the federation endpoint. Remote users have no access token.
NOT_POSSIBLE = None

#                                    sfu/get, get_token | client get_token | federation get_token
MATRIX: dict[str, tuple[Any, Any, Any, Any]] = {
    "local member":                    (TOKEN, TOKEN, TOKEN, NOT_POSSIBLE),
    "local non-member":                (FORBIDDEN, FORBIDDEN, FORBIDDEN, NOT_POSSIBLE),
    "guest in the room":               (TOKEN, TOKEN, TOKEN, NOT_POSSIBLE),
    "guest not in the room":           (FORBIDDEN, FORBIDDEN, FORBIDDEN, NOT_POSSIBLE),
    "deactivated":                     (UNAUTHORIZED, UNAUTHORIZED, UNKNOWN_TOKEN, NOT_POSSIBLE),
    "locked":                          (UNAUTHORIZED, UNAUTHORIZED, LOCKED, NOT_POSSIBLE),
    "suspended":                       (UNAUTHORIZED, UNAUTHORIZED, UNAUTHORIZED, NOT_POSSIBLE),
    "application service user":        (TOKEN, TOKEN, TOKEN, NOT_POSSIBLE),
    "remote member":                   (TOKEN, TOKEN, NOT_POSSIBLE, TOKEN),
    "remote non-member":               (FORBIDDEN, FORBIDDEN, NOT_POSSIBLE, FORBIDDEN),
    "of a server not in the room":     (FORBIDDEN, FORBIDDEN, NOT_POSSIBLE, FORBIDDEN),
    "of a server shut out by the ACL": (FORBIDDEN, FORBIDDEN, NOT_POSSIBLE, FORBIDDEN),
    "named by another server":         (UNAUTHORIZED, UNAUTHORIZED, NOT_POSSIBLE, FORBIDDEN),
}  # fmt: skip


class AuthorizationTests(ModuleTestCase):
    def check(self, row: str, user_id: str, access_token: str | None, openid_token: Any) -> None:
        sfu_get, get_token, client, federation = MATRIX[row]
        asked: list[tuple[Any, Callable[[], Any]]] = [
            (sfu_get, lambda: self.post("/sfu/get", self.sfu_get_body(openid_token=openid_token))),
            (
                get_token,
                lambda: self.post(
                    "/get_token", self.get_token_body(user_id, openid_token=openid_token)
                ),
            ),
            (client, lambda: self.post_homeserver(self.homeserver_body(), access_token)),
            (
                federation,
                lambda: self.post_federation(self.homeserver_body(user_id=user_id)),
            ),
        ]
        seen = []
        for expected, ask in asked:
            if expected is NOT_POSSIBLE:
                seen.append(NOT_POSSIBLE)
                continue
            channel = ask()
            seen.append((channel.code, channel.json_body.get("errcode")))
        assert tuple(seen) == MATRIX[row], row

    def local(self, name: str) -> tuple[str, str, Any]:
        user_id = self.register_user(name, "password")
        access_token = self.login(name, "password")
        return user_id, access_token, self.openid_token(user_id, access_token)

    def join(self, user_id: str, access_token: str) -> None:
        self.helper.join(self.room_id, user_id, tok=access_token)

    def test_endpoints_with_local_user_serve_members_only(self) -> None:
        self.check("local member", self.alice, self.alices_token, self.openid_token())
        self.check("local non-member", *self.local("stranger"))

    def test_endpoints_with_guest_serve_members_only(self) -> None:
        self.get_success(self.store.register_user("@guest:test", make_guest=True))
        self.get_success(
            self.store.add_access_token_to_user("@guest:test", "guest_token", None, None)
        )
        self.get_success(self.store.insert_open_id_token("guests", 2**52, "@guest:test"))
        # Synapse issues no OpenID tokens to guests, so the test stores one.
        openid_token = {"access_token": "guests", "matrix_server_name": "test"}
        self.check("guest not in the room", "@guest:test", "guest_token", openid_token)
        self.join_remotely("@guest:test")
        self.check("guest in the room", "@guest:test", "guest_token", openid_token)

    @parameterized.expand(["locked", "suspended", "deactivated"])
    def test_endpoints_with_inactive_user_reject_the_request(self, status: str) -> None:
        user_id, access_token, openid_token = self.local(status)
        self.join(user_id, access_token)
        set_status = getattr(self.store, f"set_user_{status}_status")
        self.get_success(set_status(user_id, True))
        if status == "deactivated":
            self.get_success(self.store.user_delete_access_tokens(user_id))
        self.check(status, user_id, access_token, openid_token)

    def test_endpoints_with_user_of_application_service_serve_the_request(self) -> None:
        service = ApplicationService(
            "as_token",
            id="bridge",
            sender=self.hs_user("bridge"),
            namespaces={"users": [{"regex": "@bridged_.*", "exclusive": True}]},
        )
        self.store.services_cache.append(service)
        user_id = "@bridged_user:test"
        self.get_success(self.store.register_user(user_id, appservice_id="bridge"))
        self.join_remotely(user_id)
        self.get_success(self.store.insert_open_id_token("bridged", 2**52, user_id))
        path = "/_matrix/client/v1/rtc/livekit/get_token"
        channel = self.make_request(
            "POST",
            f"{path}?user_id={user_id}",
            self.homeserver_body(),
            access_token="as_token",
        )
        assert (channel.code, channel.json_body.get("errcode")) == TOKEN, channel.result
        token = {"access_token": "bridged", "matrix_server_name": "test"}
        for endpoint, body in (
            ("/sfu/get", self.sfu_get_body(openid_token=token)),
            ("/get_token", self.get_token_body(user_id, openid_token=token)),
        ):
            self.assert_token(self.post(endpoint, body))

    def hs_user(self, localpart: str) -> Any:
        user = UserID(localpart, "test")
        return user if _sender_is_user_id() else user.to_string()

    def test_endpoints_with_remote_user_serve_members_only(self) -> None:
        self.check("remote non-member", self.rita, None, self.remote_token(self.rita))
        self.check("of a server not in the room", self.rita, None, self.remote_token(self.rita))
        self.join_remotely(self.rita)
        self.check("remote member", self.rita, None, self.remote_token(self.rita))
        self.helper.send_state(
            self.room_id,
            "m.room.server_acl",
            {"allow": ["*"], "deny": [self.OTHER_SERVER_NAME]},
            tok=self.alices_token,
        )
        self.check("of a server shut out by the ACL", self.rita, None, self.remote_token(self.rita))

    def test_endpoints_with_server_that_names_a_user_of_another_server_reject_it(self) -> None:
        for user_id in ("@user:elsewhere.org", self.alice):
            self.others.always(response(200, json.dumps({"sub": user_id}).encode()))
            token = {"access_token": "t", "matrix_server_name": self.OTHER_SERVER_NAME}
            self.check("named by another server", user_id, None, token)


def _sender_is_user_id() -> bool:
    """Whether this Synapse expects the sender as an object. Older ones expect a string."""
    return "UserID" in str(inspect.signature(ApplicationService.__init__).parameters["sender"])
