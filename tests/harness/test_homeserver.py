# SPDX-License-Identifier: Apache-2.0
"""MSC4195's homeserver endpoints, in Synapse's test harness."""

import inspect
import json
import logging
import tempfile
from pathlib import Path
from typing import Any
from unittest import SkipTest
from unittest.mock import Mock, patch

import synapse.rest as client_servlets
from parameterized import parameterized
from synapse.api.errors import Codes
from synapse.appservice import ApplicationService
from synapse.crypto.context_factory import FederationPolicyForHTTPS
from synapse.http.matrixfederationclient import MatrixFederationHttpClient
from synapse.rest import ClientRestResource
from twisted.internet.defer import Deferred, fail
from twisted.internet.error import ConnectionLost
from twisted.python.failure import Failure
from twisted.web.client import ResponseNeverReceived

from synapse_lk_jwt.compat.federation_http import (
    CONNECTION_LIFETIME_SEC,
    MAX_CONNECTION_BYTES,
    BoundedTls,
    bounded_client,
)
from synapse_lk_jwt.livekit.naming import member_identity
from synapse_lk_jwt.livekit.tokens import MUST_NOT_CREATE
from tests.harness.base import URL, ModuleTestCase, P, response

PREFIXES = ("v1", "unstable/io.element.msc4195")
SERVICE = {"type": "livekit", "livekit_service_url": f"https://matrix.test{P}"}
JWT = "aGVhZA.Ym9keQ.c2ln"


class RequestTests(ModuleTestCase):
    def test_request_that_livekit_does_not_answer_in_time_closes_its_connection(self) -> None:
        cancelled: list[str] = []

        def request(method: bytes, uri: bytes, *more: Any, **others: Any) -> "Deferred[Any]":
            return Deferred(lambda _: cancelled.append(uri.decode("ascii").rpartition("/")[2]))

        client = self.hs.get_simple_http_client()
        # The stub of all other tests.
        del client.request
        client.agent = Mock(request=request)
        channel = self.post("/get_token", self.get_token_body(), await_result=False)
        self.pump()
        self.reactor.advance(9)
        assert not cancelled
        self.reactor.advance(1)
        assert cancelled == ["CreateRoom"]
        self.assert_error(channel, 503, Codes.UNKNOWN)

    def test_request_that_livekit_drops_twice_is_rejected_with_503(self) -> None:
        asked: list[str] = []

        def request(method: bytes, uri: bytes, *more: Any, **others: Any) -> "Deferred[Any]":
            asked.append(uri.decode("ascii").rpartition("/")[2])
            return fail(ResponseNeverReceived([Failure(ConnectionLost())]))

        client = self.hs.get_simple_http_client()
        del client.request
        client.agent = Mock(request=request)
        channel = self.post("/get_token", self.get_token_body())
        self.assert_error(channel, 503, Codes.UNKNOWN)
        assert asked.count("CreateRoom") == 2


class ClientTests(ModuleTestCase):
    @parameterized.expand(PREFIXES)
    def test_client_get_token_for_the_own_sfu_issues_a_token_and_creates_the_room(
        self, prefix: str
    ) -> None:
        channel = self.post_homeserver(self.homeserver_body(), prefix=prefix)
        assert list(channel.json_body) == ["jwt"]
        said = self.assert_token(channel)
        assert said["sub"] == member_identity(self.alice, "member")
        assert said["video"]["room"] == self.sfu.requests[0][1].name

    def test_client_get_token_that_names_this_server_issues_a_token(self) -> None:
        body = self.homeserver_body(server_name="test")
        said = self.assert_token(self.post_homeserver(body))
        assert said["sub"] == member_identity(self.alice, "member")

    def test_client_get_token_without_access_token_is_rejected_before_the_body_is_read(
        self,
    ) -> None:
        path = "/_matrix/client/v1/rtc/livekit/get_token"
        channel = self.make_request("POST", path, b"{")
        self.assert_error(channel, 401, Codes.MISSING_TOKEN)
        assert channel.headers.hasHeader("Access-Control-Allow-Origin")

    @parameterized.expand(
        [
            (b"{", 400, Codes.NOT_JSON),
            (b"[]", 400, Codes.BAD_JSON),
            (b"x" * 65_537, 413, Codes.TOO_LARGE),
        ]
    )
    def test_client_get_token_with_a_body_that_is_no_object_is_rejected(
        self, body: bytes, code: int, errcode: Codes
    ) -> None:
        self.assert_error(self.post_homeserver(body), code, errcode)

    def test_client_get_token_with_wrong_field_names_it(self) -> None:
        # tests/unit/test_fields.py has the cases.
        channel = self.post_homeserver(self.homeserver_body(slot_id=1))
        error = self.assert_error(channel, 400, Codes.BAD_JSON)
        assert error == "slot_id: must be a string"

    def test_client_get_token_for_an_unknown_room_is_rejected_as_for_a_room_of_others(
        self,
    ) -> None:
        bob, token = self.register_user("bob", "password"), self.login("bob", "password")
        errors = {
            self.assert_error(
                # Membership is checked before the URL.
                self.post_homeserver(self.homeserver_body(url="wss://x", room_id=room_id)),
                403,
                Codes.FORBIDDEN,
            )
            for room_id in ("!unknown:test", self.helper.create_room_as(bob, tok=token))
        }
        assert len(errors) == 1

    def test_client_get_token_for_another_url_of_this_server_is_rejected(self) -> None:
        channel = self.post_homeserver(self.homeserver_body(url="wss://x", server_name="test"))
        self.assert_error(channel, 400, Codes.INVALID_PARAM)
        assert self.sfu.requests == []

    @parameterized.expand(PREFIXES)
    def test_client_delegate_while_delayed_events_are_off_is_404(self, prefix: str) -> None:
        path = f"/_matrix/client/{prefix}/rtc/livekit/delegate_delayed_leave"
        self.assert_error(self.make_request("POST", path, {}), 404, Codes.UNRECOGNIZED)


class OtherServersTests(ModuleTestCase):
    """Tokens of another homeserver's SFU."""

    def ask(self, **more: Any) -> Any:
        body = self.homeserver_body(server_name=self.OTHER_SERVER_NAME, url="wss://other", **more)
        return self.post_homeserver(body)

    def test_remote_token_of_server_that_is_not_in_the_room_is_rejected_with_403(self) -> None:
        self.assert_error(self.ask(), 403, Codes.FORBIDDEN)
        assert self.others.requests == []

    def test_remote_token_of_server_in_capitals_is_requested_from_the_server_in_the_room(
        self,
    ) -> None:
        self.join_remotely(self.rita)
        self.others.answer = lambda uri: response(200, json.dumps({"jwt": JWT}).encode())
        body = self.homeserver_body(
            server_name=self.OTHER_SERVER_NAME.upper(), url="wss://other.example.com"
        )
        channel = self.post_homeserver(body)
        assert (channel.code, channel.json_body) == (200, {"jwt": JWT})
        ((_, uri, _),) = self.others.requests
        assert uri.startswith(f"matrix-federation://{self.OTHER_SERVER_NAME}/")

    def test_client_get_token_with_own_name_in_capitals_issues_a_token(self) -> None:
        body = self.homeserver_body(server_name="Test")
        assert self.assert_token(self.post_homeserver(body))["sub"] != ""
        assert self.others.requests == []

    @parameterized.expand(
        ["[::1]:8448", "127.1", "0x7f.1", "xn--a", "a-b.example", "OTHER", "0", "1" * 63]
    )
    def test_remote_token_of_server_with_an_odd_name_is_rejected_with_403(
        self, server_name: str
    ) -> None:
        self.join_remotely(self.rita)
        body = self.homeserver_body(server_name=server_name, url="wss://other")
        self.assert_error(self.post_homeserver(body), 403, Codes.FORBIDDEN)

    @parameterized.expand(["a_b", "a%b", "a..b", "-a", "a-", "1" * 64, "a.", "a\n", "\x85"])
    def test_remote_token_of_server_with_a_wrong_name_is_rejected_with_400(
        self, server_name: str
    ) -> None:
        channel = self.post_homeserver(self.homeserver_body(server_name=server_name))
        self.assert_error(channel, 400, Codes.BAD_JSON)

    def test_remote_token_request_holds_only_checked_fields(self) -> None:
        self.join_remotely(self.rita)
        answer = json.dumps({"jwt": JWT, "extra": "key"}).encode()
        self.others.answer = lambda uri: response(200, answer)
        channel = self.ask(secret="not signed")
        assert (channel.code, channel.json_body) == (200, {"jwt": JWT})
        assert self.others.requests == [
            (
                "POST",
                f"matrix-federation://{self.OTHER_SERVER_NAME}"
                "/_matrix/federation/v1/rtc/livekit/get_token",
                {
                    "user_id": self.alice,
                    "url": "wss://other",
                    "room_id": self.room_id,
                    "slot_id": "m.call#ROOM",
                    "member_id": "member",
                },
            )
        ]
        assert self.sfu.requests == []

    def test_remote_token_of_server_with_one_path_is_requested_there_first_next_time(
        self,
    ) -> None:
        self.join_remotely(self.rita)
        unknown = response(404, b'{"errcode": "M_UNRECOGNIZED", "error": ""}')
        good = response(200, json.dumps({"jwt": JWT}).encode())
        self.others.answer = lambda uri: good if "unstable" in uri else unknown
        for _ in range(2):
            assert self.ask().code == 200
        paths = [uri.partition("/_matrix/federation/")[2] for _, uri, _ in self.others.requests]
        stable, unstable = (f"{prefix}/rtc/livekit/get_token" for prefix in PREFIXES)
        assert paths == [stable, unstable, unstable]
        self.others.answer = lambda uri: unknown if "unstable" in uri else good
        for _ in range(2):
            assert self.ask().code == 200
        paths = [uri.partition("/_matrix/federation/")[2] for _, uri, _ in self.others.requests]
        assert paths[3:] == [unstable, stable, stable]

    @parameterized.expand(
        [
            (403, "M_FORBIDDEN", 403, "M_FORBIDDEN"),
            (400, "M_INVALID_PARAM", 400, "M_INVALID_PARAM"),
            (400, "M_FORBIDDEN", 502, "M_UNKNOWN"),
            (403, "M_OTHER", 502, "M_UNKNOWN"),
            (404, "M_NOT_FOUND", 502, "M_UNKNOWN"),
            (404, "M_UNRECOGNIZED", 502, "M_UNKNOWN"),
            (429, "M_LIMIT_EXCEEDED", 502, "M_UNKNOWN"),
            (500, "M_UNKNOWN", 502, "M_UNKNOWN"),
        ]
    )
    def test_remote_token_that_the_server_rejects_is_an_error_of_the_contract(
        self, code: int, errcode: str, our_code: int, our_errcode: str
    ) -> None:
        self.join_remotely(self.rita)
        answer = json.dumps({"errcode": errcode, "error": "why", "extra": 1}).encode()
        self.others.always(response(code, answer))
        error = self.assert_error(self.ask(), our_code, our_errcode)
        assert "why" not in error

    @parameterized.expand(
        [
            (response(200, b"no"),),
            (response(200, b"[]"),),
            (response(200, b"{}"),),
            (response(200, b'{"jwt": 1}'),),
            (response(200, b'{"jwt": "token"}'),),
            (response(200, b'{"jwt": "a.b.c\\n"}'),),
            (response(200, b" " * 100_000),),
            (response(302, json.dumps({"jwt": JWT}).encode()),),
            (ConnectionLost(),),
        ]
    )
    def test_remote_token_answer_without_a_token_is_502(self, answer: Any) -> None:
        self.join_remotely(self.rita)
        self.others.always(answer)
        self.assert_error(self.ask(), 502, Codes.UNKNOWN)

    def test_remote_token_with_a_programming_error_is_a_500_and_a_traceback(self) -> None:
        self.join_remotely(self.rita)
        self.others.answer = lambda uri: TypeError("build_auth_headers takes another argument")
        with self.assertLogs(level=logging.ERROR) as logs:
            self.assert_error(self.ask(), 500, Codes.UNKNOWN)
        assert "TypeError: build_auth_headers" in "".join(logs.output)

    def test_remote_token_error_of_the_server_is_escaped_and_short_in_the_log(self) -> None:
        self.join_remotely(self.rita)
        errcode = "M_\n2026-01-01 CRITICAL INJECTED\x1b[31m" + "x" * 10_000
        answer = json.dumps({"errcode": errcode, "error": ""}).encode()
        self.others.answer = lambda uri: response(500, answer)
        with self.assertLogs("synapse_lk_jwt", logging.INFO) as logs:
            self.assert_error(self.ask(), 502, Codes.UNKNOWN)
        (line,) = (line for line in logs.output if "INJECTED" in line)
        assert "\n" not in line
        assert "\x1b" not in line
        assert len(line) < 500

    def test_remote_token_of_server_that_does_not_answer_in_time_is_502(self) -> None:
        self.join_remotely(self.rita)
        self.others.answer = lambda uri: Deferred()
        body = self.homeserver_body(server_name=self.OTHER_SERVER_NAME, url="wss://other")
        channel = self.make_request(
            "POST",
            "/_matrix/client/v1/rtc/livekit/get_token",
            body,
            access_token=self.alices_token,
            await_result=False,
        )
        self.pump(0.09)
        self.reactor.advance(10)
        self.pump()
        assert channel.code == 502


class FederationTests(ModuleTestCase):
    def body(self, **more: Any) -> dict[str, Any]:
        return {**self.homeserver_body(**more), "user_id": self.rita}

    @parameterized.expand(PREFIXES)
    def test_federation_get_token_for_a_restricted_member_issues_a_token_and_no_room(
        self, prefix: str
    ) -> None:
        self.join_remotely(self.rita)
        channel = self.post_federation(self.body(), prefix)
        assert list(channel.json_body) == ["jwt"]
        said = self.assert_token(channel)
        assert said["sub"] == member_identity(self.rita, "member")
        assert said["roomPreset"] == MUST_NOT_CREATE
        assert self.sfu.requests == []

    def test_federation_get_token_without_signature_is_rejected_with_401(self) -> None:
        path = "/_matrix/federation/v1/rtc/livekit/get_token"
        assert self.make_request("POST", path, self.body()).code == 401

    def test_federation_get_token_for_a_user_who_is_not_joined_is_rejected_with_403(self) -> None:
        self.assert_error(self.post_federation(self.body()), 403, Codes.FORBIDDEN)

    @parameterized.expand(
        [
            ({"user_id": "@alice:test"}, 403, Codes.FORBIDDEN),
            ({"user_id": "@rita:elsewhere.org"}, 403, Codes.FORBIDDEN),
            ({"room_id": "!elsewhere:other.example.com"}, 403, Codes.FORBIDDEN),
            ({"url": "wss://x"}, 400, Codes.INVALID_PARAM),
            ({"user_id": 1}, 400, Codes.BAD_JSON),
        ]
    )
    def test_federation_get_token_with_a_wrong_field_is_rejected(
        self, more: dict[str, Any], code: int, errcode: Codes
    ) -> None:
        self.join_remotely(self.rita)
        self.assert_error(self.post_federation({**self.body(), **more}), code, errcode)

    def test_federation_get_token_for_a_server_that_the_acl_denies_is_rejected_with_403(
        self,
    ) -> None:
        self.join_remotely(self.rita)
        self.helper.send_state(
            self.room_id,
            "m.room.server_acl",
            {"allow": ["*"], "deny": [self.OTHER_SERVER_NAME]},
            tok=self.alices_token,
        )
        self.assert_error(self.post_federation(self.body()), 403, Codes.FORBIDDEN)


class FullAccessTests(ModuleTestCase):
    module_config = {"full_access_homeservers": "*"}

    def test_federation_get_token_for_server_with_full_access_creates_the_room(self) -> None:
        self.join_remotely(self.rita)
        channel = self.post_federation(self.homeserver_body(user_id=self.rita))
        assert "roomPreset" not in self.assert_token(channel)
        assert len(self.sfu.requests) == 1


class HookTests(ModuleTestCase):
    """The hooks of Synapse that the homeserver endpoints need."""

    def test_connection_to_other_homeserver_does_not_persist(self) -> None:
        agent: Any = bounded_client(self.hs).agent
        own: Any = MatrixFederationHttpClient(self.hs, FederationPolicyForHTTPS(self.hs.config))
        federation = agent._agent
        well_known = federation._well_known_resolver._well_known_agent._agent._agent
        pools = [federation._pool, federation._agent._pool, well_known._pool]
        assert [pool.persistent for pool in pools] == [False] * 3
        # Synapse's own connections stay as they are.
        assert own.agent._agent._pool.persistent

    @parameterized.expand([("get_options", (b"a.org",)), ("creatorForNetloc", (b"a.org", 443))])
    def test_connection_to_other_homeserver_that_lasts_too_long_is_aborted(
        self, method: str, args: tuple[Any, ...]
    ) -> None:
        creator = getattr(BoundedTls(self.hs), method)(*args)
        tls_protocol = Mock()
        assert creator.clientConnectionForTLS(tls_protocol) is not None
        self.reactor.advance(CONNECTION_LIFETIME_SEC - 1)
        tls_protocol.transport.abortConnection.assert_not_called()
        self.reactor.advance(1)
        tls_protocol.transport.abortConnection.assert_called_once_with()

    def test_connection_to_other_homeserver_that_sends_too_much_is_aborted(self) -> None:
        tls_protocol = Mock()
        receive = tls_protocol.dataReceived
        creator: Any = BoundedTls(self.hs).get_options(b"a.org")
        creator.clientConnectionForTLS(tls_protocol)
        for _ in range(MAX_CONNECTION_BYTES // 1024):
            tls_protocol.dataReceived(b"x" * 1024)
        assert receive.call_count == MAX_CONNECTION_BYTES // 1024
        tls_protocol.transport.abortConnection.assert_not_called()
        tls_protocol.dataReceived(b"x")
        assert receive.call_count == MAX_CONNECTION_BYTES // 1024
        tls_protocol.transport.abortConnection.assert_called_once_with()

    def test_two_homeservers_in_one_process_serve_their_own_endpoints(self) -> None:
        config = super().default_config()
        config["server_name"] = "second"
        config["modules"][0]["config"]["livekit_url"] = "wss://second.example.com"
        second = self.setup_test_homeserver(server_name="second", config=config)
        config = {**super().default_config(), "server_name": "third", "modules": []}
        third = self.setup_test_homeserver(server_name="third", config=config)
        routes: Any = ClientRestResource
        registered = {
            hs.hostname: [
                handlers[b"POST"].callback.__self__._services.livekit_url
                for pattern, handlers in routes(hs)._routes.items()
                if "livekit/get_token" in pattern.pattern
            ]
            for hs in (self.hs, second, third)
        }
        assert registered == {"test": [URL], "second": ["wss://second.example.com"], "third": []}

    def test_application_service_that_claims_the_paths_replaces_the_endpoints(
        self,
    ) -> None:
        if "proxy_prefix" not in inspect.signature(ApplicationService.__init__).parameters:
            raise SkipTest("this Synapse knows no MSC4512")
        registration: dict[str, Any] = {
            "id": "livekit",
            "url": None,
            "as_token": "as",
            "hs_token": "hs",
            "sender_localpart": "livekit",
            "namespaces": {},
            "io.element.msc4512.proxy_prefix": "rtc/livekit",
            "io.element.msc4512.proxy_url": "http://127.0.0.1:1",
        }
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        file = Path(directory.name) / "registration.yaml"
        file.write_text(json.dumps(registration))
        config = {
            **super().default_config(),
            "server_name": "second",
            "app_service_config_files": [str(file)],
            "experimental_features": {"msc4512_enabled": True},
        }
        with self.assertLogs("synapse_lk_jwt", logging.WARNING) as logs:
            second = self.setup_test_homeserver(server_name="second", config=config)
        (line,) = (line for line in logs.output if "not served" in line)
        assert "not served: the application service 'livekit' claims rtc/livekit" in line
        assert P in second._module_web_resources
        assert second.config.matrix_rtc.transports == [SERVICE]

    def test_synapse_without_registries_of_servlets_serves_no_endpoints(
        self,
    ) -> None:
        with (
            patch.object(client_servlets, "SERVLET_GROUPS", create=True),
            self.assertLogs("synapse_lk_jwt", logging.WARNING) as logs,
        ):
            del client_servlets.SERVLET_GROUPS
            config = {**super().default_config(), "server_name": "second"}
            second = self.setup_test_homeserver(server_name="second", config=config)
            client_servlets.SERVLET_GROUPS = {}
        (line,) = (line for line in logs.output if "not served" in line)
        assert "this Synapse lacks synapse.rest.SERVLET_GROUPS" in line
        assert "MSC4195's homeserver endpoints are not served" in line
        assert P in second._module_web_resources
        assert second.config.matrix_rtc.transports == [SERVICE]
