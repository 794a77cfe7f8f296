# SPDX-License-Identifier: Apache-2.0
"""The service endpoints, in Synapse's test harness."""

import json
import logging
from itertools import product
from typing import Any
from unittest.mock import Mock, patch

from parameterized import parameterized
from synapse.api.errors import Codes, SynapseError
from synapse.http import RequestTimedOutError
from synapse.module_api import LoggingTransaction
from tests.test_utils import FakeResponse
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost, ConnectionRefusedError
from twisted.web.http_headers import Headers

from synapse_lk_jwt.livekit.tokens import MUST_NOT_CREATE
from tests.harness.base import SECRET, URL, ModuleTestCase, P, counting, protobuf, response

NOT_VALID = "The OpenID token is not valid"
GOOD = json.dumps({"sub": "@rita:other.example.com"}).encode()


class EndpointTests(ModuleTestCase):
    def test_sfu_get_for_a_member_issues_a_token_and_creates_the_room(self) -> None:
        channel = self.post("/sfu/get", self.sfu_get_body())
        said = self.assert_token(channel)
        assert channel.json_body == {"url": URL, "jwt": channel.json_body["jwt"]}
        now = int(self.reactor.seconds())
        assert now - 2 <= said.pop("nbf") <= now
        assert now + 898 <= said.pop("exp") <= now + 900
        (uri, room), *more = self.sfu.requests
        assert not more
        assert uri == "https://sfu.example.com/twirp/livekit.RoomService/CreateRoom"
        assert (room.empty_timeout, room.departure_timeout, room.max_participants) == (300, 20, 0)
        assert list(said.pop("attributes")) == ["synapse_lk_jwt"]
        assert said == {
            "iss": "APIkey",
            "sub": f"{self.alice}:DEVICE",
            "video": {
                "room": room.name,
                "roomJoin": True,
                "roomCreate": False,
                "canSubscribe": True,
                "canPublish": True,
                "canPublishData": True,
                "canUpdateOwnMetadata": False,
                "hidden": False,
            },
        }

    def test_get_token_for_the_default_slot_is_for_the_room_of_sfu_get_with_another_identity(
        self,
    ) -> None:
        first = self.assert_token(self.post("/sfu/get", self.sfu_get_body()))
        second = self.assert_token(self.post("/get_token", self.get_token_body()))
        assert second["video"]["room"] == first["video"]["room"]
        assert len(second["sub"]) == 43
        other = self.assert_token(self.post("/get_token", self.get_token_body(slot_id="other")))
        assert other["video"]["room"] != first["video"]["room"]

    def test_sfu_get_without_device_id_issues_a_token(self) -> None:
        body = self.sfu_get_body()
        del body["device_id"]
        assert self.assert_token(self.post("/sfu/get", body))["sub"] == f"{self.alice}:"

    def test_token_endpoints_while_delayed_events_are_off_ignore_a_delegation(self) -> None:
        delay = {"delay_id": "id", "delay_timeout": 18000, "delay_cs_api_url": "https://x"}
        with counting("refusals_total") as counted:
            self.assert_token(self.post("/sfu/get", self.sfu_get_body(**delay)))
            self.assert_token(self.post("/get_token", self.get_token_body(**delay)))
        assert counted == {}

    @parameterized.expand(["GET", "PUT", "DELETE", "PATCH", "wrapper", "HEAD"])
    def test_sfu_get_with_another_method_is_405_with_cors(self, method: str) -> None:
        channel = self.make_request(method, f"{P}/sfu/get", shorthand=False)
        assert channel.code == 405, channel.result
        assert channel.headers.hasHeader("Access-Control-Allow-Origin")

    @parameterized.expand(
        [
            "",
            "/",
            "/sfu",
            "/sfu/",
            "/sfu/get/x",
            "/get_tokens",
            "/healthz/x",
            "/delegate_delayed_leave",
            "/sfu_webhook/x",
        ]
    )
    def test_service_at_unknown_path_is_404_with_cors(self, path: str) -> None:
        channel = self.post(path, {})
        self.assert_error(channel, 404, Codes.UNRECOGNIZED)
        assert channel.headers.getRawHeaders("Access-Control-Allow-Origin") == ["*"]

    @parameterized.expand([("GET", 200), ("HEAD", 200), ("POST", 405)])
    def test_healthz_with_get_or_head_is_answered(self, method: str, code: int) -> None:
        assert self.make_request(method, f"{P}/healthz", shorthand=False).code == code

    @parameterized.expand(
        product(
            ["/sfu/get", "/get_token"],
            [
                (b"", 400, Codes.NOT_JSON),
                (b"{", 400, Codes.NOT_JSON),
                (b"\xff", 400, Codes.NOT_JSON),
                (b"[" * 60_000, 400, Codes.NOT_JSON),
                (b'{"a": NaN}', 400, Codes.NOT_JSON),
                (b"1" * 60_000, 400, Codes.NOT_JSON),
                (b"[]", 400, Codes.BAD_JSON),
                (b"1", 400, Codes.BAD_JSON),
                (b'"x"', 400, Codes.BAD_JSON),
                (b"null", 400, Codes.BAD_JSON),
                (b"{}", 400, Codes.BAD_JSON),
                (json.dumps({"x": "x" * 65_536}).encode(), 413, Codes.TOO_LARGE),
            ],
        )
    )
    def test_token_endpoint_with_a_body_that_is_no_object_rejects_it(
        self, endpoint: str, case: tuple[bytes, int, Codes]
    ) -> None:
        body, code, errcode = case
        self.assert_error(self.post(endpoint, body), code, errcode)

    def test_sfu_get_with_wrong_field_names_it(self) -> None:
        # tests/unit/test_fields.py has the cases.
        channel = self.post("/sfu/get", self.sfu_get_body(room="room"))
        error = self.assert_error(channel, 400, Codes.BAD_JSON)
        assert error == "room: must be a room ID"

    def test_sfu_get_with_device_id_that_makes_the_identity_too_long_names_it(self) -> None:
        channel = self.post("/sfu/get", self.sfu_get_body(device_id="x" * 250))
        error = self.assert_error(channel, 400, Codes.BAD_JSON)
        assert error == "device_id: is too long"


class OpenIdTests(ModuleTestCase):
    def refused(self, **token: Any) -> None:
        for channel in (
            self.post("/sfu/get", self.sfu_get_body(openid_token=token)),
            self.post("/get_token", self.get_token_body(openid_token=token)),
        ):
            assert self.assert_error(channel, 401, Codes.UNAUTHORIZED) == NOT_VALID

    def test_openid_token_that_is_unknown_or_expired_is_rejected_with_401(self) -> None:
        self.refused(access_token="unknown", matrix_server_name="test")
        token = self.openid_token()
        self.refused(**{**token, "matrix_server_name": self.OTHER_SERVER_NAME})
        self.reactor.advance(3601)
        self.refused(**token)

    def test_openid_token_of_local_user_is_verified_without_network(self) -> None:
        self.assert_token(self.post("/sfu/get", self.sfu_get_body()))
        assert self.others.requests == []

    def test_get_token_with_claimed_user_of_another_token_is_rejected_with_401(self) -> None:
        channel = self.post("/get_token", self.get_token_body("@bob:test"))
        assert self.assert_error(channel, 401, Codes.UNAUTHORIZED) == NOT_VALID

    @parameterized.expand(
        [
            ("set_user_locked_status", True),
            ("set_user_suspended_status", True),
            ("set_user_deactivated_status", True),
            ("mark_user_erased",),
        ]
    )
    def test_openid_token_of_user_who_is_inactive_since_is_rejected_with_401(
        self, method: str, *args: bool
    ) -> None:
        token = self.openid_token()
        self.assert_token(self.post("/sfu/get", self.sfu_get_body(openid_token=token)))
        self.get_success(getattr(self.store, method)(self.alice, *args))
        self.refused(**token)

    def test_openid_token_of_remote_user_is_looked_up_on_the_users_server(self) -> None:
        self.join_remotely(self.rita)
        token = self.remote_token(self.rita)
        said = self.assert_token(
            self.post("/get_token", self.get_token_body(self.rita, openid_token=token))
        )
        assert said["video"]["canPublish"] is True
        (method, uri, _), *_ = self.others.requests
        assert (method, uri) == (
            "GET",
            f"matrix-federation://{self.OTHER_SERVER_NAME}"
            "/_matrix/federation/v1/openid/userinfo?access_token=remote-token",
        )

    @parameterized.expand(
        [
            "@rita:elsewhere.org",
            "@alice:test",
            1,
            None,
            "rita",
            "@rita",
            (["@rita:x"],),
            "@ri\0ta:other.example.com",
            f"@{'x' * 255}:other.example.com",
            "@rita:other.example.com:8448",
        ]
    )
    def test_openid_look_up_that_names_no_user_of_that_server_is_rejected(self, sub: Any) -> None:
        self.refused(**self.remote_token(sub))

    @parameterized.expand(
        [
            (response(401, GOOD),),
            (response(302, GOOD),),
            (response(500, b""),),
            (response(200, b"no"),),
            (response(200, b"[]"),),
            (response(200, b"[" * 10_000),),
            (response(200, GOOD + b" " * 20_000),),
            (ConnectionLost(),),
            # A name that cannot be looked up, and an address that is blocked.
            (ValueError("the URL with the remote-token in it"),),
            (SynapseError(403, "the URL with the remote-token in it"),),
        ]
    )
    def test_openid_look_up_with_bad_answer_is_rejected_and_logs_no_token(
        self, answer: Any
    ) -> None:
        self.others.always(answer)
        with self.assertLogs("synapse_lk_jwt", logging.INFO) as logs:
            self.refused(access_token="remote-token", matrix_server_name=self.OTHER_SERVER_NAME)
        assert "remote-token" not in "".join(logs.output)

    def test_openid_look_up_with_a_programming_error_is_a_500_and_a_traceback(self) -> None:
        self.others.answer = lambda uri: TypeError("build_auth_headers takes another argument")
        token = {"access_token": "t", "matrix_server_name": self.OTHER_SERVER_NAME}
        with self.assertLogs(level=logging.ERROR) as logs:
            channel = self.post("/sfu/get", self.sfu_get_body(openid_token=token))
        self.assert_error(channel, 500, Codes.UNKNOWN)
        assert "TypeError: build_auth_headers" in "".join(logs.output)

    @parameterized.expand([*"\n\r\t\x1b\x7f\x85\x9f"])
    def test_openid_look_up_that_names_a_user_with_control_character_is_rejected(
        self, character: str
    ) -> None:
        self.refused(**self.remote_token(f"@ri{character}ta:{self.OTHER_SERVER_NAME}"))

    def test_openid_token_with_own_name_in_capitals_is_looked_up_here(self) -> None:
        token = {**self.openid_token(), "matrix_server_name": "TEST"}
        said = self.assert_token(self.post("/sfu/get", self.sfu_get_body(openid_token=token)))
        assert said["sub"] == f"{self.alice}:DEVICE"
        assert self.others.requests == []

    def test_openid_look_up_that_does_not_end_is_rejected_and_its_connection_closed(self) -> None:
        connections: list[Mock] = []

        class Endless(FakeResponse):
            def deliverBody(self, protocol: Any) -> None:
                connections.append(Mock(spec=["abortConnection"]))
                protocol.makeConnection(connections[-1])
                protocol.dataReceived(b"{")

        self.others.answer = lambda uri: Endless(
            code=200, body=b"", headers=Headers({"Content-Type": ["application/json"]})
        )
        token = {"access_token": "t", "matrix_server_name": self.OTHER_SERVER_NAME}
        channel = self.post("/sfu/get", self.sfu_get_body(openid_token=token), await_result=False)
        self.pump(0.09)
        self.reactor.advance(10)
        self.pump()
        assert channel.code == 401
        (connection,) = connections
        connection.abortConnection.assert_called_once_with()


class WhitelistTests(ModuleTestCase):
    def default_config(self) -> dict[str, Any]:
        return {**super().default_config(), "federation_domain_whitelist": ["elsewhere.org"]}

    def test_openid_token_of_server_that_is_not_on_the_whitelist_is_not_looked_up(self) -> None:
        token = self.remote_token(self.rita)
        channel = self.post("/sfu/get", self.sfu_get_body(openid_token=token))
        self.assert_error(channel, 401, Codes.UNAUTHORIZED)
        assert self.others.requests == []


class MembershipTests(ModuleTestCase):
    def ask(self, user_id: str, **more: Any) -> Any:
        if user_id == self.rita:
            more["openid_token"] = self.remote_token(user_id)
        return self.post("/get_token", self.get_token_body(user_id, **more))

    def test_get_token_for_local_user_who_left_is_rejected_with_403(self) -> None:
        self.assert_token(self.ask(self.alice))
        self.helper.leave(self.room_id, self.alice, tok=self.alices_token)
        self.assert_error(self.ask(self.alice), 403, Codes.FORBIDDEN)

    def test_get_token_for_local_user_in_unknown_room_is_rejected_with_403(self) -> None:
        self.assert_error(self.ask(self.alice, room_id="!unknown:test"), 403, Codes.FORBIDDEN)

    def test_get_token_for_remote_user_who_never_joined_is_rejected_with_403(self) -> None:
        self.assert_error(self.ask(self.rita), 403, Codes.FORBIDDEN)

    @parameterized.expand(["leave", "ban"])
    def test_get_token_for_remote_user_who_is_out_is_rejected_with_403(
        self, membership: str
    ) -> None:
        self.join_remotely(self.rita)
        self.assert_token(self.ask(self.rita))
        self.join_remotely(self.rita, membership)
        self.assert_error(self.ask(self.rita), 403, Codes.FORBIDDEN)

    def test_get_token_for_remote_user_in_room_elsewhere_is_issued(self) -> None:
        self.assert_token(self.ask(self.rita, room_id="!elsewhere:other.example.com"))

    def test_get_token_for_remote_user_in_room_with_partial_state_is_issued(self) -> None:
        self.assert_error(self.ask(self.rita), 403, Codes.FORBIDDEN)
        self.get_success(
            self.store.store_partial_state_room(
                self.room_id, {self.OTHER_SERVER_NAME}, 1, self.OTHER_SERVER_NAME
            )
        )
        self.store.is_partial_state_room.invalidate((self.room_id,))
        self.assert_token(self.ask(self.rita))

    def test_get_token_for_remote_user_of_server_that_the_acl_denies_is_rejected(
        self,
    ) -> None:
        self.join_remotely(self.rita)
        self.assert_token(self.ask(self.rita))
        self.helper.send_state(
            self.room_id,
            "m.room.server_acl",
            {"allow": ["*"], "deny": [self.OTHER_SERVER_NAME]},
            tok=self.alices_token,
        )
        self.assert_error(self.ask(self.rita), 403, Codes.FORBIDDEN)

    def test_token_endpoints_with_delegation_by_remote_user_reject_it_without_look_up(self) -> None:
        self.join_remotely(self.rita)
        channel = self.ask(self.rita, delay_id="id", delay_timeout=1)
        self.assert_error(channel, 400, Codes.BAD_JSON)
        body = self.sfu_get_body(
            openid_token=self.remote_token(self.rita), delay_id="id", delay_timeout=1
        )
        self.assert_error(self.post("/sfu/get", body), 400, Codes.BAD_JSON)
        # The rejection needs no request to the user's server.
        assert self.others.requests == []


class NoMembershipTests(ModuleTestCase):
    module_config = {"require_room_membership": False, "remote_can_publish": []}

    def test_tokens_without_room_membership_are_issued_to_verified_users(self) -> None:
        body = self.sfu_get_body(room="!unknown:test")
        assert self.assert_token(self.post("/sfu/get", body))["video"]["canPublish"] is True
        body = self.sfu_get_body(openid_token=self.remote_token(self.rita))
        video = self.assert_token(self.post("/sfu/get", body))["video"]
        assert (video["canPublish"], video["canPublishData"]) == (False, False)
        # The option does not apply to MSC4195's endpoints.
        channel = self.post_homeserver(self.homeserver_body(room_id="!unknown:test"))
        self.assert_error(channel, 403, Codes.FORBIDDEN)


class RoomTests(ModuleTestCase):
    # The poll would send requests of its own to LiveKit.
    module_config = {"sanity_check_interval": 0}

    def ask(self, **more: Any) -> Any:
        return self.post("/sfu/get", self.sfu_get_body(), **more)

    def unavailable(self) -> None:
        channel = self.ask()
        error = self.assert_error(channel, 503, Codes.UNKNOWN)
        assert error == "Unable to create room on SFU"

    def test_tokens_of_one_call_at_the_same_time_share_a_create_room_request(self) -> None:
        answer: Deferred[Any] = Deferred()
        self.sfu.answer = answer
        channels = [self.ask(await_result=False) for _ in range(10)]
        self.pump()
        assert len(self.sfu.requests) == 1
        answer.callback(self.sfu.room(age=100))
        self.pump()
        assert [channel.code for channel in channels] == [200] * 10

    @parameterized.expand(
        [
            (0, 0, True),
            (8, 0, True),
            (3600, 1, True),
            (12, 0, False),
            # LiveKit's clock differs, so the age is unknown.
            (-3600, 0, False),
        ]
    )
    def test_room_that_is_young_or_in_use_is_remembered(
        self, age: int, participants: int, is_remembered: bool
    ) -> None:
        self.sfu.answer = self.sfu.room(age=age, participants=participants)
        for _ in range(2):
            self.assert_token(self.ask())
        assert len(self.sfu.requests) == (1 if is_remembered else 2)
        self.reactor.advance(11)
        self.assert_token(self.ask())
        assert len(self.sfu.requests) == (2 if is_remembered else 3)

    def test_token_livekit_drops_the_connection_is_requested_once_more(self) -> None:
        self.sfu.answer = [ConnectionLost(), None]
        self.assert_token(self.ask())
        assert len(self.sfu.requests) == 2
        self.reactor.advance(11)
        self.sfu.answer = [ConnectionLost(), ConnectionLost(), None]
        self.unavailable()
        assert len(self.sfu.requests) == 4

    def test_token_livekit_dies_before_its_answer_is_rejected_with_503(self) -> None:
        broken = RequestTimedOutError("Timeout waiting for response from remote server")
        self.sfu.answer = [broken, broken, None]
        self.unavailable()
        self.assert_token(self.ask())

    def test_token_livekit_fails_in_several_ways_each_is_logged_once(self) -> None:
        page = response(502, b"<html>", "text/html")
        error = response(500, b'{"code": "internal", "msg": "no luck"}')
        with self.assertLogs("synapse_lk_jwt.livekit", logging.INFO) as logs:
            for answer in (
                ConnectionRefusedError(), ConnectionRefusedError(), page, page,
                response(401, b"invalid token: ..."), response(404, b"404 page not found"),
                error, error, protobuf(b"\xff"), protobuf(b"x" * 2**21), response(200, b"{}"),
            ):  # fmt: skip
                self.sfu.answer = answer
                self.unavailable()
            self.sfu.answer = None
            self.assert_token(self.ask())
        causes = [
            "no connection",
            "a proxy answers 502: LiveKit is down behind it",
            "rejected livekit_secret (401)",
            "answers 404. Set livekit_internal_url",
            "answers 500 'internal': 'no luck'",
            "cannot be read",
            "too large",
            "answers 200. Set livekit_internal_url",
            "can be used again",
        ]
        assert len(logs.output) == len(causes), logs.output
        for line, cause in zip(logs.output, causes, strict=True):
            assert cause in line

    def test_token_livekit_does_not_answer_in_time_is_rejected_with_503(self) -> None:
        # Synapse's client raises its own exception when a request is cancelled.
        never: Deferred[Any] = Deferred(lambda deferred: deferred.errback(IndexError()))
        self.sfu.answer = [never, None]
        channel = self.ask(await_result=False)
        self.pump(0.09)
        self.reactor.advance(10)
        self.pump()
        assert channel.code == 503
        assert len(self.sfu.requests) == 1

    def test_token_for_restricted_user_needs_no_request_to_livekit(self) -> None:
        self.join_remotely(self.rita)
        body = self.sfu_get_body(openid_token=self.remote_token(self.rita))
        claims = self.assert_token(self.post("/sfu/get", body))
        assert claims["roomPreset"] == MUST_NOT_CREATE
        assert self.sfu.requests == []

    def test_token_for_local_user_takes_one_database_read(self) -> None:
        body = self.sfu_get_body()
        self.assert_token(self.post("/sfu/get", body))
        statements: list[str] = []
        execute = LoggingTransaction.execute

        def noted(txn: LoggingTransaction, sql: str, *args: Any) -> None:
            statements.append(sql)
            execute(txn, sql, *args)

        with patch.object(LoggingTransaction, "execute", noted):
            self.assert_token(self.post("/sfu/get", body))
        # Background work of the module may run at the same time.
        of_token = [sql for sql in statements if "synapse_lk_jwt" not in sql]
        assert len(of_token) == 1, of_token
        assert "FROM open_id_tokens" in of_token[0]

    def test_token_request_logs_no_secret(self) -> None:
        body = self.sfu_get_body()
        with self.assertLogs(level=logging.DEBUG) as logs:
            token = self.post("/sfu/get", body).json_body["jwt"]
            self.post("/sfu/get", json.dumps(body)[:-1].encode())
            self.post("/sfu/get", self.sfu_get_body(openid_token=self.remote_token(self.rita)))
        for line in logs.records:
            if line.name.startswith("synapse.storage.SQL"):
                continue
            text = line.getMessage()
            for secret in (SECRET, token, body["openid_token"]["access_token"], "remote-token"):
                assert secret not in text, text


class FullAccessTests(ModuleTestCase):
    module_config = {"full_access_homeservers": ["OTHER.example.*"]}

    def test_token_for_user_of_server_with_full_access_creates_the_room(self) -> None:
        self.join_remotely(self.rita)
        body = self.sfu_get_body(openid_token=self.remote_token(self.rita))
        claims = self.assert_token(self.post("/sfu/get", body))
        assert "roomPreset" not in claims
        assert len(self.sfu.requests) == 1


class LimitTests(ModuleTestCase):
    module_config = {
        "rc_token": {"per_second": 0.001, "burst_count": 20},
        "rc_openid": {"per_second": 0.001, "burst_count": 100},
    }

    def test_rate_limit_of_user_counts_all_endpoints_together(self) -> None:
        body = self.sfu_get_body()
        for _ in range(10):
            self.assert_token(self.post("/sfu/get", body))
            self.assert_token(self.post_homeserver(self.homeserver_body()))
        channel = self.post("/sfu/get", body)
        self.assert_error(channel, 429, Codes.LIMIT_EXCEEDED)
        assert channel.json_body["retry_after_ms"] > 0
        assert channel.headers.hasHeader("Retry-After")
        assert channel.headers.hasHeader("Access-Control-Allow-Origin")
        self.assert_error(self.post_homeserver(self.homeserver_body()), 429, Codes.LIMIT_EXCEEDED)
        self.reactor.advance(3000)
        self.assert_token(self.post("/sfu/get", body))

    def test_rate_limit_in_rooms_elsewhere_counts_all_users_of_a_server(self) -> None:
        def ask(room_id: str, number: int) -> Any:
            user_id = f"@user{number}:{self.OTHER_SERVER_NAME}"
            token = self.remote_token(user_id)
            return self.post("/sfu/get", self.sfu_get_body(openid_token=token, room=room_id))

        for number in range(20):
            self.assert_token(ask("!elsewhere:other.example.com", number))
        channel = ask("!elsewhere:other.example.com", 20)
        self.assert_error(channel, 429, Codes.LIMIT_EXCEEDED)

    def test_rate_limit_in_rooms_elsewhere_counts_all_servers_together(self) -> None:
        def ask(number: int) -> Any:
            server = f"s{number}.example.com"
            self.others.answer = lambda uri: response(
                200, json.dumps({"sub": f"@user:{server}"}).encode()
            )
            token = {"access_token": "t", "matrix_server_name": server}
            body = self.sfu_get_body(openid_token=token, room=f"!room{number}:{server}")
            # From many addresses, so that the limit of look-ups does not apply.
            address = f"10.{number // 250}.0.{number % 250}"
            return self.post("/sfu/get", body, client_ip=address)

        for number in range(200):
            self.assert_token(ask(number))
        self.assert_error(ask(200), 429, Codes.LIMIT_EXCEEDED)
        # Rooms that this homeserver is in are not limited.
        self.assert_token(self.post("/sfu/get", self.sfu_get_body()))

    def test_rate_limit_of_look_ups_counts_an_ipv6_network_as_one_address(self) -> None:
        token = {"access_token": "forged", "matrix_server_name": self.OTHER_SERVER_NAME}
        body = self.sfu_get_body(openid_token=token)
        codes = [
            self.post("/sfu/get", body, client_ip=f"2001:db8::{number:x}").code
            for number in range(101)
        ]
        assert codes == [401] * 100 + [429]
        assert self.post("/sfu/get", body, client_ip="2001:db8:0:1::1").code == 401

    def test_look_ups_in_flight_from_one_address_are_limited(self) -> None:
        self.others.answer = lambda uri: Deferred()
        token = {"access_token": "t", "matrix_server_name": self.OTHER_SERVER_NAME}
        body = self.sfu_get_body(openid_token=token)
        channels = [self.post("/sfu/get", body, await_result=False) for _ in range(51)]
        other = self.post("/sfu/get", body, await_result=False, client_ip="10.0.0.1")
        self.pump(0.01)
        assert [channel.is_finished() for channel in channels] == [False] * 50 + [True]
        self.assert_error(channels[50], 429, Codes.LIMIT_EXCEEDED)
        assert not other.is_finished()

    def test_look_ups_in_flight_from_all_addresses_are_limited(self) -> None:
        waiting: list[Deferred[Any]] = []

        def answer(uri: str) -> "Deferred[Any]":
            waiting.append(Deferred())
            return waiting[-1]

        self.others.answer = answer
        token = {"access_token": "t", "matrix_server_name": self.OTHER_SERVER_NAME}
        body = self.sfu_get_body(openid_token=token)

        def ask(number: int) -> Any:
            # Each from an address of its own.
            return self.post("/sfu/get", body, await_result=False, client_ip=f"10.0.0.{number}")

        channels = [ask(number) for number in range(101)]
        self.pump(0.01)
        assert len(waiting) == 100
        assert not any(channel.is_finished() for channel in channels[:100])
        self.assert_error(channels[100], 429, Codes.LIMIT_EXCEEDED)
        assert channels[100].json_body["retry_after_ms"] > 0
        # When a look-up ends, here after ten seconds, another one can begin.
        self.reactor.advance(10)
        self.pump()
        assert [channel.code for channel in channels[:100]] == [401] * 100
        late = ask(102)
        self.pump(0.01)
        assert len(waiting) == 101
        assert not late.is_finished()

    def test_rate_limit_of_look_ups_prevents_the_look_up(self) -> None:
        token = {"access_token": "forged", "matrix_server_name": self.OTHER_SERVER_NAME}
        body = self.sfu_get_body(openid_token=token)
        codes = [self.post("/sfu/get", body).code for _ in range(101)]
        assert codes == [401] * 100 + [429]
        assert len(self.others.requests) == 100
