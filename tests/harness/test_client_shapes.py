# SPDX-License-Identifier: Apache-2.0
"""Bodies, URLs and paths in the forms that clients, other servers and admins use."""

import json
from itertools import product
from typing import Any, ClassVar
from urllib.parse import urlsplit

from parameterized import parameterized
from synapse.api.errors import Codes

from synapse_lk_jwt.livekit.naming import member_identity
from tests.harness.base import URL, ModuleTestCase, P, response
from tests.harness.test_delegating import HOUR_MS, DelegationTestCase

JWT = "aGVhZA.Ym9keQ.c2ln"
STABLE = "/_matrix/federation/v1/rtc/livekit/get_token"
UNSTABLE = "/_matrix/federation/unstable/io.element.msc4195/rtc/livekit/get_token"


class ZeroValueTests(ModuleTestCase):
    @parameterized.expand(
        [
            ({"device_id": None}, ""),
            ({"device_id": ""}, ""),
            ({"delay_id": None}, "DEVICE"),
            ({"delay_timeout": None}, "DEVICE"),
            ({"delay_id": None, "delay_timeout": None}, "DEVICE"),
            ({"delay_id": "", "delay_timeout": 0}, "DEVICE"),
            ({"delay_id": "", "delay_timeout": 0, "delay_cs_api_url": ""}, "DEVICE"),
            ({"delay_id": None, "delay_timeout": 0}, "DEVICE"),
        ]
    )
    def test_sfu_get_with_zero_value_is_as_without_the_field(
        self, more: dict[str, Any], device_id: str
    ) -> None:
        said = self.assert_token(self.post("/sfu/get", self.sfu_get_body(**more)))
        assert said["sub"] == f"{self.alice}:{device_id}"

    @parameterized.expand(
        [
            ({"delay_id": None, "delay_timeout": None},),
            ({"delay_id": "", "delay_timeout": 0, "delay_cs_api_url": ""},),
        ]
    )
    def test_get_token_with_zero_values_of_delegation_is_as_without(
        self, more: dict[str, Any]
    ) -> None:
        self.assert_token(self.post("/get_token", self.get_token_body(**more)))

    @parameterized.expand(
        [
            ({"delay_id": "id", "delay_timeout": 0}, "delay_timeout"),
            ({"delay_id": "id", "delay_timeout": None}, "delay_timeout"),
            ({"delay_id": "", "delay_timeout": 1}, "delay_id"),
            ({"delay_id": 0, "delay_timeout": 0}, "delay_id"),
            ({"delay_id": "", "delay_timeout": False}, "delay_timeout"),
        ]
    )
    def test_sfu_get_with_half_a_delegation_is_rejected(
        self, more: dict[str, Any], name: str
    ) -> None:
        channel = self.post("/sfu/get", self.sfu_get_body(**more))
        assert self.assert_error(channel, 400, Codes.BAD_JSON).startswith(f"{name}: ")

    @parameterized.expand([(None,), ("",)])
    def test_homeserver_get_token_with_zero_server_name_is_answered_here(
        self, server_name: Any
    ) -> None:
        self.assert_token(self.post_homeserver(self.homeserver_body(server_name=server_name)))


MEMBERS = [
    ({"member_id": "member"},),
    ({"member": {"id": "member"}},),
    ({"member": {"id": "member", "claimed_device_id": "D"}},),
    ({"member_id": None, "member": {"id": "member"}},),
    ({"member_id": "", "member": {"id": "member"}},),
    ({"member_id": "member", "member": None},),
    ({"member_id": "member", "member": {"id": "other"}},),
]


class MemberTests(ModuleTestCase):
    @parameterized.expand(MEMBERS)
    def test_client_get_token_accepts_either_form_of_the_member(
        self, member: dict[str, Any]
    ) -> None:
        body = self.homeserver_body()
        del body["member_id"]
        said = self.assert_token(self.post_homeserver({**body, **member}))
        assert said["sub"] == member_identity(self.alice, "member")

    @parameterized.expand(MEMBERS)
    def test_federation_get_token_accepts_either_form_of_the_member(
        self, member: dict[str, Any]
    ) -> None:
        self.join_remotely(self.rita)
        body = self.homeserver_body(user_id=self.rita)
        del body["member_id"]
        said = self.assert_token(self.post_federation({**body, **member}))
        assert said["sub"] == member_identity(self.rita, "member")

    @parameterized.expand(
        [
            ({}, "member_id"),
            ({"member": None}, "member_id"),
            ({"member": {}}, "member.id"),
            ({"member": {"id": ""}}, "member.id"),
            ({"member": "member"}, "member"),
        ]
    )
    def test_homeserver_get_token_without_member_names_the_field(
        self, member: dict[str, Any], name: str
    ) -> None:
        self.join_remotely(self.rita)
        body = self.homeserver_body(user_id=self.rita)
        del body["member_id"]
        channel = self.post_homeserver({**body, **member})
        assert self.assert_error(channel, 400, Codes.BAD_JSON).startswith(f"{name}: ")
        channel = self.post_federation({**body, **member})
        assert self.assert_error(channel, 400, Codes.BAD_JSON).startswith(f"{name}: ")


class UrlTests(ModuleTestCase):
    @parameterized.expand(
        [
            "WSS://SFU.example.com",
            f"{URL}/",
            f"{URL}:443",
            f"{URL}:443/",
            "wss://SFU.EXAMPLE.COM:443/",
        ]
    )
    def test_client_get_token_with_other_spelling_of_the_url_is_answered(self, url: str) -> None:
        for server_name in ({}, {"server_name": "test"}):
            self.assert_token(self.post_homeserver(self.homeserver_body(url=url, **server_name)))
        self.join_remotely(self.rita)
        self.assert_token(self.post_federation(self.homeserver_body(url=url, user_id=self.rita)))

    @parameterized.expand(
        [
            "ws://sfu.example.com", "https://sfu.example.com", f"{URL}:80", f"{URL}:x", f"{URL}/x",
            f"{URL}//", f"{URL}?a", f"{URL}/#a", "wss://u@sfu.example.com",
            f" {URL}", f"{URL}\n", "sfu.example.com", "wss://[::1", f"{URL}.", f"{URL}:0",
        ]
    )  # fmt: skip
    def test_client_get_token_with_another_url_is_rejected(self, url: str) -> None:
        body = self.homeserver_body(url=url, server_name="test")
        self.assert_error(self.post_homeserver(body), 400, Codes.INVALID_PARAM)
        self.join_remotely(self.rita)
        body = self.homeserver_body(url=url, user_id=self.rita)
        self.assert_error(self.post_federation(body), 400, Codes.INVALID_PARAM)
        assert self.sfu.requests == []

    @parameterized.expand([({},), ({"server_name": None},), ({"server_name": ""},)])
    def test_client_get_token_for_unnamed_servers_sfu_is_404(self, more: dict[str, Any]) -> None:
        self.join_remotely(self.rita)
        channel = self.post_homeserver(self.homeserver_body(url="wss://other", **more))
        self.assert_error(channel, 404, Codes.NOT_FOUND)
        assert channel.headers.hasHeader("Access-Control-Allow-Origin")
        assert self.others.requests == []

    @parameterized.expand(["other.example.com", "nowhere.example.org"])
    def test_client_get_token_with_our_url_and_another_server_is_answered_here(
        self, server_name: str
    ) -> None:
        self.join_remotely(self.rita)
        said = self.assert_token(
            self.post_homeserver(self.homeserver_body(server_name=server_name))
        )
        assert said["sub"] == member_identity(self.alice, "member")
        assert self.others.requests == []


class UrlWithPathTests(ModuleTestCase):
    module_config: ClassVar[dict[str, Any]] = {"livekit_url": "wss://example.com:8443/sfu"}

    def test_client_get_token_with_other_spelling_of_the_host_is_answered(self) -> None:
        body = self.homeserver_body(url="wss://EXAMPLE.com:8443/sfu", server_name="test")
        self.assert_token(self.post_homeserver(body))

    @parameterized.expand(
        ["wss://example.com:8443/SFU", "wss://example.com:8443/sfu/", "wss://example.com/sfu"]
    )
    def test_client_get_token_with_other_spelling_of_the_path_is_rejected(self, url: str) -> None:
        body = self.homeserver_body(url=url, server_name="test")
        self.assert_error(self.post_homeserver(body), 400, Codes.INVALID_PARAM)


class DelegateTests(DelegationTestCase):
    @parameterized.expand([({},), ({"url": None},), ({"url": ""},), ({"url": f"{URL}:443/"},)])
    def test_homeserver_delegate_without_url_is_for_the_only_sfu(self, url: dict[str, Any]) -> None:
        body = self.homeserver_body(delay_id=self.delayed())
        del body["url"]
        channel = self.delegate_homeserver({**body, **url})
        assert (channel.code, channel.json_body) == (200, {}), channel.result
        assert len(self.rows()) == 1

    def test_service_delegate_probed_with_empty_body_is_404(self) -> None:
        channel = self.post("/delegate_delayed_leave", b"")
        self.assert_error(channel, 404, Codes.UNRECOGNIZED)
        assert channel.headers.getRawHeaders("Access-Control-Allow-Origin") == ["*"]

    @parameterized.expand([(b"{}", Codes.BAD_JSON), (b" ", Codes.NOT_JSON)])
    def test_service_delegate_with_a_wrong_body_is_rejected_with_400(
        self, body: bytes, errcode: str
    ) -> None:
        self.assert_error(self.post("/delegate_delayed_leave", body), 400, errcode)

    @parameterized.expand(["v1", "unstable/io.element.msc4195"])
    def test_homeserver_delegate_probed_without_token_is_rejected_with_401(
        self, prefix: str
    ) -> None:
        path = f"/_matrix/client/{prefix}/rtc/livekit/delegate_delayed_leave"
        self.assert_error(self.make_request("POST", path), 401, Codes.MISSING_TOKEN)

    @parameterized.expand(product(("delay_id", "delay_timeout"), (None, "", 0)))
    def test_service_delegate_with_zero_value_is_rejected(self, name: str, value: Any) -> None:
        body = self.get_token_body(delay_id="x", delay_timeout=HOUR_MS)
        channel = self.post("/delegate_delayed_leave", {**body, name: value})
        assert self.assert_error(channel, 400, Codes.BAD_JSON).startswith(f"{name}: ")


class PeerTests(ModuleTestCase):
    """Other homeservers with an older authorization service."""

    def prepare(self, reactor: Any, clock: Any, hs: Any) -> None:
        super().prepare(reactor, clock, hs)
        self.join_remotely(self.rita)
        # The fields that the other server accepts.
        self.accepts = {"member"}
        self.errcode = "M_NOT_JSON"
        self.others.answer = self.answer

    def answer(self, uri: str) -> Any:
        """Answers as lk-jwt-service 0.7: at the unstable path, and strict about fields."""
        if urlsplit(uri).path != UNSTABLE:
            return response(404, b'{"errcode": "M_UNRECOGNIZED", "error": ""}')
        (_, _, content) = self.others.requests[-1]
        if not {"member", "member_id"} & content.keys() <= self.accepts:
            return response(400, json.dumps({"errcode": self.errcode, "error": ""}).encode())
        return response(200, json.dumps({"jwt": JWT}).encode())

    def ask(self, **more: Any) -> Any:
        body = self.homeserver_body(url="wss://other", server_name=self.OTHER_SERVER_NAME, **more)
        return self.post_homeserver(body)

    def asked(self) -> list[tuple[str, Any]]:
        """The paths of the requests, and the form of the member in each."""
        return [
            (urlsplit(uri).path, content.get("member", content.get("member_id")))
            for _, uri, content in self.others.requests
        ]

    @parameterized.expand(["M_NOT_JSON", "M_BAD_JSON"])
    def test_peer_that_rejects_member_id_gets_a_request_with_member(self, errcode: str) -> None:
        self.errcode = errcode
        channel = self.ask(member={"id": "other", "claimed_device_id": "not signed"})
        assert (channel.code, channel.json_body) == (200, {"jwt": JWT}), channel.result
        nested = {"id": "member"}
        assert self.asked() == [(STABLE, "member"), (UNSTABLE, "member"), (UNSTABLE, nested)]
        (_, _, content) = self.others.requests[-1]
        assert content == {
            "user_id": self.alice,
            "url": "wss://other",
            "room_id": self.room_id,
            "slot_id": "m.call#ROOM",
            "member": nested,
        }

    def test_peer_that_was_upgraded_gets_a_request_with_member_id_again(self) -> None:
        assert self.ask().code == 200
        self.others.requests.clear()
        assert self.ask().code == 200
        assert self.asked() == [(UNSTABLE, {"id": "member"})]
        self.others.requests.clear()
        self.accepts = {"member_id"}
        assert self.ask().code == 200
        assert self.asked() == [(UNSTABLE, {"id": "member"}), (UNSTABLE, "member")]

    def test_peer_that_rejects_both_forms_gets_three_requests(self) -> None:
        self.accepts = set()
        self.assert_error(self.ask(), 502, Codes.UNKNOWN)
        assert len(self.others.requests) == 3


class PathTests(ModuleTestCase):
    PATHS: ClassVar[list[str]] = ["//sfu/get", "/sfu//get", "/sfu/get/", "//sfu///get//"]

    @parameterized.expand(PATHS)
    def test_sfu_get_with_empty_path_segments_is_answered(self, path: str) -> None:
        self.assert_token(self.post(path, self.sfu_get_body()))
        channel = self.make_request("OPTIONS", P + path, shorthand=False)
        assert channel.code == 204
        assert channel.headers.getRawHeaders("Access-Control-Allow-Origin") == ["*"]

    def test_other_endpoints_with_empty_path_segments_are_answered(self) -> None:
        self.assert_token(self.post("//get_token/", self.get_token_body()))
        assert self.make_request("GET", f"{P}//healthz/", shorthand=False).code == 200
        self.assert_error(self.post("//sfu_webhook", b"{}"), 401, Codes.UNAUTHORIZED)

    @parameterized.expand(
        [
            "//",
            "//sfu",
            "//sfu//",
            "/sfu/get//x",
            "//x//sfu/get",
            "/get_token//sfu/get",
            "//SFU/get",
        ]
    )
    def test_wrong_path_with_empty_segments_is_404(self, path: str) -> None:
        channel = self.post(path, self.sfu_get_body())
        self.assert_error(channel, 404, Codes.UNRECOGNIZED)
        assert channel.headers.getRawHeaders("Access-Control-Allow-Origin") == ["*"]


class ServiceUrlTests(ModuleTestCase):
    module_config: ClassVar[dict[str, Any]] = {"service_url": f"https://matrix.test{P}/"}

    @parameterized.expand(["", "/"])
    def test_client_that_appends_to_a_service_url_with_slash_is_answered(self, slash: str) -> None:
        (entry,) = self.hs.config.matrix_rtc.transports
        url = entry["livekit_service_url"].rstrip("/") + slash
        path = urlsplit(f"{url}/sfu/get").path
        channel = self.make_request("POST", path, self.sfu_get_body(), shorthand=False)
        self.assert_token(channel)
