# SPDX-License-Identifier: Apache-2.0
"""The service endpoints, in Synapse's test harness."""

import json
import logging
from typing import Any
from unittest.mock import patch

from synapse.api.errors import Codes, SynapseError
from synapse.http import RequestTimedOutError
from synapse.module_api import LoggingTransaction
from tests.test_utils import FakeResponse
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost, ConnectionRefusedError
from twisted.web.http_headers import Headers

from synapse_lk_jwt.livekit.tokens import MUST_NOT_CREATE
from tests.harness.base import SECRET, URL, ModuleTestCase, P, protobuf, response

NOT_VALID = "The OpenID token is not valid"


class EndpointTests(ModuleTestCase):
    def test_sfu_get(self) -> None:
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

    def test_get_token_is_for_the_same_livekit_room_under_another_identity(self) -> None:
        first = self.assert_token(self.post("/sfu/get", self.sfu_get_body()))
        second = self.assert_token(self.post("/get_token", self.get_token_body()))
        assert second["video"]["room"] == first["video"]["room"]
        assert len(second["sub"]) == 43
        other = self.assert_token(self.post("/get_token", self.get_token_body(slot_id="other")))
        assert other["video"]["room"] != first["video"]["room"]

    def test_a_device_id_is_not_needed(self) -> None:
        body = self.sfu_get_body(device_id="")
        assert self.assert_token(self.post("/sfu/get", body))["sub"] == f"{self.alice}:"
        del body["device_id"]
        assert self.assert_token(self.post("/sfu/get", body))["sub"] == f"{self.alice}:"

    def test_a_pair_of_delay_keys_is_taken(self) -> None:
        delay = {"delay_id": "id", "delay_timeout": 18000, "delay_cs_api_url": "https://x"}
        self.assert_token(self.post("/sfu/get", self.sfu_get_body(**delay)))
        self.assert_token(self.post("/get_token", self.get_token_body(**delay)))

    def test_other_verbs_and_paths(self) -> None:
        for method in ("GET", "PUT", "DELETE", "PATCH", "wrapper", "HEAD"):
            channel = self.make_request(method, f"{P}/sfu/get", shorthand=False)
            assert channel.code == 405, (method, channel.result)
            assert channel.headers.hasHeader("Access-Control-Allow-Origin")
        for path in ("", "/", "/sfu", "/sfu/", "/sfu/get/x", "/get_tokens", "/healthz/x",
                     "/delegate_delayed_leave", "/sfu_webhook/x"):  # fmt: skip
            channel = self.post(path, {})
            self.assert_error(channel, 404, Codes.UNRECOGNIZED)
            assert channel.headers.getRawHeaders("Access-Control-Allow-Origin") == ["*"]

    def test_healthz(self) -> None:
        for method in ("GET", "HEAD"):
            assert self.make_request(method, f"{P}/healthz", shorthand=False).code == 200
        assert self.make_request("POST", f"{P}/healthz", shorthand=False).code == 405

    def test_bodies_that_are_none(self) -> None:
        for endpoint in ("/sfu/get", "/get_token"):
            for body in (b"", b"{", b"\xff", b"[" * 60_000, b'{"a": NaN}', b"1" * 60_000):
                self.assert_error(self.post(endpoint, body), 400, Codes.NOT_JSON)
            for body in (b"[]", b"1", b'"x"', b"null", b"{}"):
                self.assert_error(self.post(endpoint, body), 400, Codes.BAD_JSON)
            large = json.dumps({"x": "x" * 65_536}).encode()
            self.assert_error(self.post(endpoint, large), 413, Codes.TOO_LARGE)

    def test_fields_that_are_wrong_are_named(self) -> None:
        long = "x" * 513
        wrong: list[tuple[str, str, list[Any]]] = [
            ("/sfu/get", "room", [None, 1, "", "room", "!", "!\0", "!\ud800", f"!{long}"]),
            ("/sfu/get", "device_id", [1, "8448:X", "1:", "\0", "\udfff", long, "x" * 250]),
            ("/sfu/get", "openid_token", [None, 1, "", []]),
            ("/sfu/get", "openid_token.access_token", [None, 1, "", "\0", long]),
            (
                "/sfu/get",
                "openid_token.matrix_server_name",
                [None, 1, "", "a_b", "a b", "a:b", "a:-1", "a: 1", "a:99999", "[", "a/b", "é.org"],
            ),
            ("/sfu/get", "delay_id", [None, 1, ""]),
            ("/sfu/get", "delay_timeout", [None, "1", 0, -1, 1.5, True, 2**53]),
            ("/get_token", "room_id", [None, 1, "", "room"]),
            ("/get_token", "slot_id", [None, 1, "", "\0", long]),
            ("/get_token", "member", [None, 1, [], "x"]),
            ("/get_token", "member.id", [None, 1, "", "\0", long]),
            ("/get_token", "member.claimed_user_id", [None, 1, "", "alice", "@alice", "@a:b_c"]),
            ("/get_token", "member.claimed_device_id", [None, 1, "", long]),
        ]
        token = self.openid_token()
        delay = {"delay_id": "id", "delay_timeout": 1}
        for endpoint, name, values in wrong:
            for value in [*values, "missing"]:
                make = self.sfu_get_body if endpoint == "/sfu/get" else self.get_token_body
                body = json.loads(json.dumps(make(openid_token=token, **delay)))
                holder = body
                *path, last = name.split(".")
                for part in path:
                    holder = holder[part]
                if value == "missing":
                    if name == "device_id":
                        continue
                    del holder[last]
                else:
                    holder[last] = value
                error = self.assert_error(self.post(endpoint, body), 400, Codes.BAD_JSON)
                assert error.startswith(f"{name}: "), (name, value, error)


class OpenIdTests(ModuleTestCase):
    def refused(self, **token: Any) -> None:
        for channel in (
            self.post("/sfu/get", self.sfu_get_body(openid_token=token)),
            self.post("/get_token", self.get_token_body(openid_token=token)),
        ):
            assert self.assert_error(channel, 401, Codes.UNAUTHORIZED) == NOT_VALID

    def test_unknown_and_expired_tokens(self) -> None:
        self.refused(access_token="unknown", matrix_server_name="test")
        token = self.openid_token()
        self.refused(**{**token, "matrix_server_name": self.OTHER_SERVER_NAME})
        self.reactor.advance(3601)
        self.refused(**token)

    def test_no_network_for_local_users(self) -> None:
        self.assert_token(self.post("/sfu/get", self.sfu_get_body()))
        assert self.others.requests == []

    def test_somebody_elses_user_id_cannot_be_claimed(self) -> None:
        channel = self.post("/get_token", self.get_token_body("@bob:test"))
        assert self.assert_error(channel, 401, Codes.UNAUTHORIZED) == NOT_VALID

    def test_users_who_are_shut_out_are_refused_from_the_next_request_on(self) -> None:
        token = self.openid_token()
        body = self.sfu_get_body(openid_token=token)
        store = self.store
        changes: list[tuple[Any, Any]] = [
            (
                store.set_user_locked_status(self.alice, True),
                lambda: store.set_user_locked_status(self.alice, False),
            ),
            (
                store.set_user_suspended_status(self.alice, True),
                lambda: store.set_user_suspended_status(self.alice, False),
            ),
            (
                store.mark_user_erased(self.alice),
                lambda: store.mark_user_not_erased(self.alice),
            ),
            (
                store.set_user_deactivated_status(self.alice, True),
                lambda: store.set_user_deactivated_status(self.alice, False),
            ),
        ]
        for shut_out, let_in in changes:
            self.assert_token(self.post("/sfu/get", body))
            self.get_success(shut_out)
            self.refused(**token)
            self.get_success(let_in())

    def test_remote_users(self) -> None:
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

    def test_other_servers_speak_for_their_own_users_only(self) -> None:
        for sub in ("@rita:elsewhere.org", self.alice, 1, None, "rita", "@rita", ["@rita:x"],
                    f"@ri\0ta:{self.OTHER_SERVER_NAME}", f"@{'x' * 255}:{self.OTHER_SERVER_NAME}",
                    f"@rita:{self.OTHER_SERVER_NAME}:8448"):  # fmt: skip
            self.refused(**self.remote_token(sub))

    def test_odd_answers_of_other_servers(self) -> None:
        good = json.dumps({"sub": self.rita}).encode()
        for answer in (
            response(401, good),
            response(302, good),
            response(500, b""),
            response(200, b"no"),
            response(200, b"[]"),
            response(200, b"[" * 10_000),
            response(200, good + b" " * 20_000),
            ConnectionLost(),
            # A name that cannot be looked up, and an address that is blocked.
            ValueError("the URL with the remote-token in it"),
            SynapseError(403, "the URL with the remote-token in it"),
        ):
            self.others.always(answer)
            with self.assertLogs("synapse_lk_jwt", logging.INFO) as logs:
                self.refused(access_token="remote-token", matrix_server_name=self.OTHER_SERVER_NAME)
            assert "remote-token" not in "".join(logs.output)

    def test_programming_error_during_look_up_is_a_500_and_a_traceback(self) -> None:
        self.others.answer = lambda uri: TypeError("build_auth_headers takes another argument")
        token = {"access_token": "t", "matrix_server_name": self.OTHER_SERVER_NAME}
        with self.assertLogs(level=logging.ERROR) as logs:
            channel = self.post("/sfu/get", self.sfu_get_body(openid_token=token))
        self.assert_error(channel, 500, Codes.UNKNOWN)
        assert "TypeError: build_auth_headers" in "".join(logs.output)

    def test_sub_with_control_character_is_rejected(self) -> None:
        for character in "\n\r\t\x1b\x7f\x85\x9f":
            self.refused(**self.remote_token(f"@ri{character}ta:{self.OTHER_SERVER_NAME}"))

    def test_own_name_in_capitals_is_looked_up_here(self) -> None:
        token = {**self.openid_token(), "matrix_server_name": "TEST"}
        said = self.assert_token(self.post("/sfu/get", self.sfu_get_body(openid_token=token)))
        assert said["sub"] == f"{self.alice}:DEVICE"
        assert self.others.requests == []

    def test_an_answer_that_does_not_end(self) -> None:
        endless: list[Any] = []

        class Endless(FakeResponse):
            def deliverBody(self, protocol: Any) -> None:
                endless.append(protocol)
                protocol.dataReceived(b"{")

        self.others.answer = lambda uri: Endless(
            code=200, body=b"", headers=Headers({"Content-Type": ["application/json"]})
        )
        token = {"access_token": "t", "matrix_server_name": self.OTHER_SERVER_NAME}
        channel = self.post("/sfu/get", self.sfu_get_body(openid_token=token), await_result=False)
        self.pump(0.09)
        self.reactor.advance(10)
        self.pump()
        assert len(endless) == 1
        assert channel.code == 401


class WhitelistTests(ModuleTestCase):
    def default_config(self) -> dict[str, Any]:
        return {**super().default_config(), "federation_domain_whitelist": ["elsewhere.org"]}

    def test_servers_that_are_not_on_it_are_not_asked(self) -> None:
        token = self.remote_token(self.rita)
        channel = self.post("/sfu/get", self.sfu_get_body(openid_token=token))
        self.assert_error(channel, 401, Codes.UNAUTHORIZED)
        assert self.others.requests == []


class MembershipTests(ModuleTestCase):
    def ask(self, user_id: str, **more: Any) -> Any:
        if user_id == self.rita:
            more["openid_token"] = self.remote_token(user_id)
        return self.post("/get_token", self.get_token_body(user_id, **more))

    def test_local_users(self) -> None:
        self.assert_token(self.ask(self.alice))
        self.helper.leave(self.room_id, self.alice, tok=self.alices_token)
        self.assert_error(self.ask(self.alice), 403, Codes.FORBIDDEN)
        self.assert_error(self.ask(self.alice, room_id="!unknown:test"), 403, Codes.FORBIDDEN)

    def test_remote_users(self) -> None:
        self.assert_error(self.ask(self.rita), 403, Codes.FORBIDDEN)
        self.join_remotely(self.rita)
        self.assert_token(self.ask(self.rita))
        for membership in ("leave", "ban"):
            self.join_remotely(self.rita, membership)
            self.assert_error(self.ask(self.rita), 403, Codes.FORBIDDEN)

    def test_rooms_that_we_are_not_in(self) -> None:
        self.assert_token(self.ask(self.rita, room_id="!elsewhere:other.example.com"))

    def test_rooms_whose_state_is_partial(self) -> None:
        self.assert_error(self.ask(self.rita), 403, Codes.FORBIDDEN)
        self.get_success(
            self.store.store_partial_state_room(
                self.room_id, {self.OTHER_SERVER_NAME}, 1, self.OTHER_SERVER_NAME
            )
        )
        self.store.is_partial_state_room.invalidate((self.room_id,))
        self.assert_token(self.ask(self.rita))

    def test_server_acls(self) -> None:
        self.join_remotely(self.rita)
        self.assert_token(self.ask(self.rita))
        self.helper.send_state(
            self.room_id,
            "m.room.server_acl",
            {"allow": ["*"], "deny": [self.OTHER_SERVER_NAME]},
            tok=self.alices_token,
        )
        self.assert_error(self.ask(self.rita), 403, Codes.FORBIDDEN)

    def test_delegation_is_for_local_users(self) -> None:
        self.join_remotely(self.rita)
        channel = self.ask(self.rita, delay_id="id", delay_timeout=1)
        self.assert_error(channel, 400, Codes.BAD_JSON)
        body = self.sfu_get_body(
            openid_token=self.remote_token(self.rita), delay_id="id", delay_timeout=1
        )
        self.assert_error(self.post("/sfu/get", body), 400, Codes.BAD_JSON)
        # The user's server need not be asked for that.
        assert self.others.requests == []


class NoMembershipTests(ModuleTestCase):
    module_config = {"require_room_membership": False, "remote_can_publish": []}

    def test_everybody_who_is_verified_gets_a_token(self) -> None:
        body = self.sfu_get_body(room="!unknown:test")
        assert self.assert_token(self.post("/sfu/get", body))["video"]["canPublish"] is True
        body = self.sfu_get_body(openid_token=self.remote_token(self.rita))
        video = self.assert_token(self.post("/sfu/get", body))["video"]
        assert (video["canPublish"], video["canPublishData"]) == (False, False)
        # Which has nothing to say to the homeserver endpoints.
        channel = self.post_homeserver(self.homeserver_body(room_id="!unknown:test"))
        self.assert_error(channel, 403, Codes.FORBIDDEN)


class RoomTests(ModuleTestCase):
    # Only what is done for tokens is looked at here.
    module_config = {"sanity_check_interval": 0}

    def ask(self, **more: Any) -> Any:
        return self.post("/sfu/get", self.sfu_get_body(), **more)

    def unavailable(self) -> None:
        channel = self.ask()
        error = self.assert_error(channel, 503, Codes.UNKNOWN)
        assert error == "Unable to create room on SFU"

    def test_concurrent_joins_share_one_request(self) -> None:
        answer: Deferred[Any] = Deferred()
        self.sfu.answer = answer
        channels = [self.ask(await_result=False) for _ in range(10)]
        self.pump()
        assert len(self.sfu.requests) == 1
        answer.callback(self.sfu.room(age=100))
        self.pump()
        assert [channel.code for channel in channels] == [200] * 10

    def test_what_is_remembered(self) -> None:
        for age, participants, remembered in (
            (0, 0, True),
            (8, 0, True),
            (3600, 1, True),
            (12, 0, False),
            # Its clock is not ours, so the age tells nothing.
            (-3600, 0, False),
        ):
            self.sfu.answer = self.sfu.room(age=age, participants=participants)
            self.sfu.requests.clear()
            for _ in range(2):
                self.assert_token(self.ask())
            assert len(self.sfu.requests) == (1 if remembered else 2)
            self.reactor.advance(11)

    def test_a_broken_connection_is_tried_once_more(self) -> None:
        self.sfu.answer = [ConnectionLost(), None]
        self.assert_token(self.ask())
        assert len(self.sfu.requests) == 2
        self.reactor.advance(11)
        self.sfu.answer = [ConnectionLost(), ConnectionLost(), None]
        self.unavailable()
        assert len(self.sfu.requests) == 4

    def test_token_livekit_dies_ahead_of_its_answer_is_refused_with_503(self) -> None:
        broken = RequestTimedOutError("Timeout waiting for response from remote server")
        self.sfu.answer = [broken, broken, None]
        self.unavailable()
        self.assert_token(self.ask())

    def test_a_failure_is_logged_once_for_as_long_as_it_stays_the_same(self) -> None:
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
            "answers 404; is this LiveKit's API?",
            "answers 500 'internal': 'no luck'",
            "cannot be read",
            "endless",
            "answers 200; is this LiveKit's API?",
            "can be used again",
        ]
        assert len(logs.output) == len(causes), logs.output
        for line, cause in zip(logs.output, causes, strict=True):
            assert cause in line

    def test_no_answer_in_time(self) -> None:
        # Cancelling, as Synapse's client does it, raises something of its own.
        never: Deferred[Any] = Deferred(lambda deferred: deferred.errback(IndexError()))
        self.sfu.answer = [never, None]
        channel = self.ask(await_result=False)
        self.pump(0.09)
        self.reactor.advance(10)
        self.pump()
        assert channel.code == 503
        assert len(self.sfu.requests) == 1

    def test_restricted_users_do_not_touch_the_sfu(self) -> None:
        self.join_remotely(self.rita)
        body = self.sfu_get_body(openid_token=self.remote_token(self.rita))
        claims = self.assert_token(self.post("/sfu/get", body))
        assert claims["roomPreset"] == MUST_NOT_CREATE
        assert self.sfu.requests == []

    def test_one_database_read_for_each_token(self) -> None:
        body = self.sfu_get_body()
        self.assert_token(self.post("/sfu/get", body))
        statements: list[str] = []
        execute = LoggingTransaction.execute

        def noted(txn: LoggingTransaction, sql: str, *args: Any) -> None:
            statements.append(sql)
            execute(txn, sql, *args)

        with patch.object(LoggingTransaction, "execute", noted):
            self.assert_token(self.post("/sfu/get", body))
        # The clock of the delayed leaves may tick meanwhile.
        of_token = [sql for sql in statements if "synapse_lk_jwt" not in sql]
        assert len(of_token) == 1, of_token
        assert "FROM open_id_tokens" in of_token[0]

    def test_nothing_secret_is_logged(self) -> None:
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

    def test_servers_on_the_list_start_calls(self) -> None:
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

    def test_a_user_has_a_burst_for_all_endpoints_together(self) -> None:
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

    def test_a_server_has_one_in_rooms_that_we_are_not_in(self) -> None:
        def ask(room_id: str, number: int) -> Any:
            user_id = f"@user{number}:{self.OTHER_SERVER_NAME}"
            token = self.remote_token(user_id)
            return self.post("/sfu/get", self.sfu_get_body(openid_token=token, room=room_id))

        for number in range(20):
            self.assert_token(ask("!elsewhere:other.example.com", number))
        channel = ask("!elsewhere:other.example.com", 20)
        self.assert_error(channel, 429, Codes.LIMIT_EXCEEDED)

    def test_rooms_elsewhere_have_one_limit_together(self) -> None:
        def ask(number: int) -> Any:
            server = f"s{number}.example.com"
            self.others.answer = lambda uri: response(
                200, json.dumps({"sub": f"@user:{server}"}).encode()
            )
            token = {"access_token": "t", "matrix_server_name": server}
            body = self.sfu_get_body(openid_token=token, room=f"!room{number}:{server}")
            # The limit of look-ups is not what this is about.
            address = f"10.{number // 250}.0.{number % 250}"
            return self.post("/sfu/get", body, client_ip=address)

        for number in range(200):
            self.assert_token(ask(number))
        self.assert_error(ask(200), 429, Codes.LIMIT_EXCEEDED)
        # Rooms that this homeserver is in go on.
        self.assert_token(self.post("/sfu/get", self.sfu_get_body()))

    def test_addresses_of_one_ipv6_network_are_limited_together(self) -> None:
        token = {"access_token": "forged", "matrix_server_name": self.OTHER_SERVER_NAME}
        body = self.sfu_get_body(openid_token=token)
        codes = [
            self.post("/sfu/get", body, client_ip=f"2001:db8::{number:x}").code
            for number in range(101)
        ]
        assert codes == [401] * 100 + [429]
        assert self.post("/sfu/get", body, client_ip="2001:db8:0:1::1").code == 401

    def test_look_ups_in_flight_are_limited_for_one_address(self) -> None:
        self.others.answer = lambda uri: Deferred()
        token = {"access_token": "t", "matrix_server_name": self.OTHER_SERVER_NAME}
        body = self.sfu_get_body(openid_token=token)
        channels = [self.post("/sfu/get", body, await_result=False) for _ in range(51)]
        other = self.post("/sfu/get", body, await_result=False, client_ip="10.0.0.1")
        self.pump(0.01)
        assert [channel.is_finished() for channel in channels] == [False] * 50 + [True]
        self.assert_error(channels[50], 429, Codes.LIMIT_EXCEEDED)
        assert not other.is_finished()

    def test_look_ups_in_flight_are_limited(self) -> None:
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
        # A look-up that ends, here after ten seconds, makes room for another.
        self.reactor.advance(10)
        self.pump()
        assert [channel.code for channel in channels[:100]] == [401] * 100
        late = ask(102)
        self.pump(0.01)
        assert len(waiting) == 101
        assert not late.is_finished()

    def test_an_address_is_limited_ahead_of_the_look_up(self) -> None:
        token = {"access_token": "forged", "matrix_server_name": self.OTHER_SERVER_NAME}
        body = self.sfu_get_body(openid_token=token)
        codes = [self.post("/sfu/get", body).code for _ in range(101)]
        assert codes == [401] * 100 + [429]
        assert len(self.others.requests) == 100
