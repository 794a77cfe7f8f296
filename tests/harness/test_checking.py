# SPDX-License-Identifier: Apache-2.0
"""Requests of the check command, the checks at start, and webhooks that never arrive."""

import json
import logging
from base64 import b64encode
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import jwt
from livekit.api import VideoGrants
from parameterized import parameterized

from synapse_lk_jwt.check.livekit import LiveKitChecks
from synapse_lk_jwt.check.livekit_requests import LiveKit
from synapse_lk_jwt.check.probe import NoAnswer, Steps
from synapse_lk_jwt.check.report import Finding, ok, warning
from synapse_lk_jwt.check.signature import sign
from synapse_lk_jwt.check.start import CHECK_AGAIN_MS
from synapse_lk_jwt.livekit.tokens import TokenSigner
from synapse_lk_jwt.process_registry import ProcessTable
from tests.harness.base import SECRET, P
from tests.harness.test_delegating import DelegationTestCase

NO_WEBHOOK = "no LiveKit webhook arrived"


class CheckTests(DelegationTestCase):
    def now_ms(self) -> int:
        return int(self.reactor.seconds() * 1000)

    def ask(
        self,
        authorization: str | bytes | None,
        method: str = "POST",
        path: str = "/check",
        body: bytes = b"{}",
    ) -> Any:
        headers = [] if authorization is None else [("Authorization", authorization)]
        return self.make_request(method, P + path, body, shorthand=False, custom_headers=headers)

    def test_check_with_a_signature_reports_the_state(self) -> None:
        channel = self.ask(sign(SECRET, b"{}", self.now_ms()))
        assert channel.code == 200, channel.result
        state = channel.json_body
        assert state["server_name"] == "test"
        assert state["instance"] == "master"
        assert state["is_background"] is True
        assert 0 <= self.now_ms() - state["now_ts"] <= 1000
        assert state["not_served"] is None
        assert state["settings"]["livekit_key"] == "APIkey"
        assert state["settings"]["max_event_delay_duration"] == "86400s"
        assert SECRET not in json.dumps(state)

    @parameterized.expand([(-119_000, 200), (119_000, 200), (-122_000, 404), (122_000, 404)])
    def test_check_with_a_signature_of_another_time_accepts_two_minutes(
        self, apart_ms: int, code: int
    ) -> None:
        assert self.ask(sign(SECRET, b"{}", self.now_ms() + apart_ms)).code == code

    def test_check_with_the_signature_of_another_request_is_404(self) -> None:
        body = json.dumps({"user_id": self.alice, "room_id": self.room_id}).encode()
        authorization = sign(SECRET, b"{}", self.now_ms())
        assert self.ask(authorization, body=body).code == 404
        assert self.ask(sign(SECRET, body, self.now_ms()), body=body).code == 200
        # The signature covers what is beyond the largest body.
        large = b" " * 65_536
        authorization = sign(SECRET, large, self.now_ms())
        assert self.ask(authorization, body=large).json_body["errcode"] == "M_NOT_JSON"
        assert self.ask(authorization, body=large + b"{}").code == 413

    def api_token(self) -> str:
        signer = TokenSigner("APIkey", SECRET, self.now_ms)
        return signer.api_token(VideoGrants(room_list=True, room_admin=True))

    def assert_answers_like_an_unknown_path(
        self, authorization: str | bytes | None, method: str
    ) -> None:
        unknown = self.ask(authorization, method, "/unknown")
        channel = self.ask(authorization, method)
        assert channel.code == unknown.code == 404
        assert channel.result.get("body") == unknown.result.get("body")
        names, of_unknown = (
            sorted(name for name, _ in answer.headers.getAllRawHeaders())
            for answer in (channel, unknown)
        )
        assert names == of_unknown
        assert channel.headers.hasHeader("Access-Control-Allow-Origin")

    @parameterized.expand(
        [
            ("no header", lambda self: None),
            ("empty header", lambda self: ""),
            ("empty token", lambda self: "Bearer "),
            ("no token", lambda self: "Bearer nonsense"),
            ("not ASCII", lambda self: "Bearer \xff"),
            ("not UTF-8", lambda self: b"Bearer \xff"),
            ("the secret", lambda self: f"Bearer {SECRET}"),
            ("token of a participant", lambda self: f"Bearer {self.token()}"),
            ("token of LiveKit's API", lambda self: f"Bearer {self.api_token()}"),
            ("token of a user", lambda self: f"Bearer {self.alices_token}"),
            ("unsigned", lambda self: f"Bearer {jwt.encode({'exp': 1}, '', algorithm='none')}"),
            ("another secret", lambda self: sign("another-secret" * 3, b"{}", self.now_ms())),
        ]
    )
    def test_check_without_a_signature_answers_like_an_unknown_path(
        self, name: str, authorization: Callable[[Any], str | bytes | None]
    ) -> None:
        for method in ("POST", "GET", "PUT", "HEAD"):
            self.assert_answers_like_an_unknown_path(authorization(self), method)

    @parameterized.expand(
        [(b"",), (b"[]",), (b'{"user_id": 1}',), (b'{"user_id": "@a:b", "room_id": "#a"}',)]
    )
    def test_check_with_an_invalid_body_is_400(self, body: bytes) -> None:
        assert self.ask(sign(SECRET, body, self.now_ms()), body=body).code == 400

    def test_check_of_a_user_reports_what_decides_about_a_token(self) -> None:
        def ask() -> Any:
            body = json.dumps({"user_id": self.alice, "room_id": self.room_id}).encode()
            return self.ask(sign(SECRET, body, self.now_ms()), body=body).json_body["user"]

        user = ask()
        decides = ("is_active", "auth_blocked", "standing", "is_blocked", "is_allowed")
        assert [user[name] for name in decides] == [True, None, "normal", False, True]
        self.get_success(self.hs.get_datastores().main.block_room(self.room_id, self.alice))
        user = ask()
        assert [user[name] for name in decides] == [True, None, "normal", True, False]
        self.hs.config.server.hs_disabled = True
        self.hs.get_auth_blocking()._hs_disabled = True
        assert ask()["auth_blocked"] == self.hs.config.server.hs_disabled_message


class RejectedWebhookTests(DelegationTestCase):
    """Requests with a wrong signature, which the check command reports."""

    def reject(self, **more: Any) -> None:
        now = int(self.reactor.seconds())
        claims = {"iss": "APIkey", "sha256": "digest", "nbf": now, "exp": now + 60, **more}
        token = jwt.encode(claims, "a-secret-that-is-not-livekit_transports-at-all")
        headers = [("Authorization", token)]
        assert self.post("/sfu_webhook", b"{}", custom_headers=headers).code == 401

    def rejected_ms(self) -> int:
        self.pump(0.01)
        rows = self.get_success(
            self.hs.get_datastores().main.db_pool.simple_select_onecol(
                "synapse_lk_jwt_processes", {"instance": "master"}, "rejected_ts"
            )
        )
        return max(rows, default=0)

    def test_request_that_names_the_key_of_the_module_is_noted(self) -> None:
        self.advance_by(100)
        self.reject()
        assert self.rejected_ms() > 0

    @parameterized.expand([({"iss": "APIother"},), ({"sha256": None},)])
    def test_request_that_names_another_key_is_not_noted(self, claims: dict[str, Any]) -> None:
        self.advance_by(100)
        self.reject(**claims)
        assert self.rejected_ms() == 0

    @parameterized.expand(
        ["", "a.b.c", ".", f"a.{b64encode(b'[' * 9000).decode()}.c", "a.W10.c"],
    )
    def test_request_with_an_unreadable_token_is_not_noted(self, token: str) -> None:
        self.advance_by(100)
        headers = [("Authorization", token)]
        assert self.post("/sfu_webhook", b"{}", custom_headers=headers).code == 401
        assert self.rejected_ms() == 0

    def test_many_rejected_requests_are_written_once_a_second(self) -> None:
        self.advance_by(100)
        with patch.object(ProcessTable, "note", return_value=None) as note:
            began = self.reactor.seconds()
            for _ in range(50):
                self.reject()
            seconds = self.reactor.seconds() - began
        # Time passes with each request. The heartbeat is one more.
        assert note.call_count <= seconds + 2


class StartCheckTests(DelegationTestCase):
    def test_finding_that_stays_is_logged_once(self) -> None:
        # The first check, soon after the start.
        self.advance_by(2)
        results: list[list[Finding] | NoAnswer] = [
            [warning("clocks", "are 7 s apart")],
            [warning("clocks", "are 8 s apart")],
            [ok("auto_create", "is off")],
            NoAnswer("LiveKit does not answer"),
            [warning("clocks", "are 9 s apart")],
        ]
        with (
            patch.object(
                LiveKitChecks, "check_rooms", side_effect=[no_requests(r) for r in results]
            ) as check,
            self.assertLogs("synapse_lk_jwt", logging.WARNING) as logs,
        ):
            for _ in results:
                self.reactor.advance(CHECK_AGAIN_MS / 1000)
                self.pump()
        assert check.call_count == len(results)
        first, second = (line for line in logs.output if "clocks" in line)
        assert "7 s apart" in first
        assert "9 s apart" in second

    def test_access_rule_once_found_enforced_is_not_tried_again(self) -> None:
        # The first check, soon after the start.
        self.advance_by(2)
        with patch.object(LiveKit, "publish") as tried:
            for _ in range(3):
                self.reactor.advance(CHECK_AGAIN_MS / 1000)
                self.pump()
        tried.assert_not_called()


def no_requests(result: list[Finding] | NoAnswer) -> Steps[list[Finding]]:
    """A check that needs no request."""
    if isinstance(result, NoAnswer):
        raise result
    return result
    yield


class WebhookTests(DelegationTestCase):
    def join(self) -> Any:
        """A participant joins, and no webhook is sent."""
        participant = self.sfu.join(self.token())
        participant.joined_at = int(self.reactor.seconds())
        return participant

    def test_webhooks_that_never_arrive_are_logged_once(self) -> None:
        # The harness begins in 1970, and time 0 stands for no webhook.
        self.advance_by(100)
        self.join()
        with self.assertLogs("synapse_lk_jwt", logging.INFO) as logs:
            logging.getLogger("synapse_lk_jwt").info("begin")
            # Webhooks may be late.
            self.advance_by(15)
            assert NO_WEBHOOK not in "".join(logs.output)
            self.advance_by(150)
        (line,) = (line for line in logs.output if NO_WEBHOOK in line)
        assert line.startswith("ERROR:")
        assert " -m synapse_lk_jwt check" in line
        assert line.endswith("'")

    def test_webhooks_that_arrive_are_not_logged(self) -> None:
        self.advance_by(100)
        participant = self.join()
        with self.assertLogs("synapse_lk_jwt", logging.INFO) as logs:
            logging.getLogger("synapse_lk_jwt").info("begin")
            assert self.webhook("participant_joined", participant).code == 200
            self.advance_by(300)
        assert NO_WEBHOOK not in "".join(logs.output)
