# SPDX-License-Identifier: Apache-2.0
"""What the check command asks a running homeserver, and webhooks that never come."""

import json
import logging
from typing import Any
from unittest.mock import patch

import jwt
from harness_base import SECRET, P
from livekit.api import VideoGrants
from test_delegating import DelegationTestCase

from synapse_lk_jwt.check.probe import NoAnswer
from synapse_lk_jwt.check.report import ok, warning
from synapse_lk_jwt.check.sfu import Sfu
from synapse_lk_jwt.check.signature import sign
from synapse_lk_jwt.check.start import LOOK_AGAIN_MS
from synapse_lk_jwt.sfu.tokens import TokenSigner

NO_WEBHOOK = "no webhook of LiveKit has told so"


class CheckTests(DelegationTestCase):
    def now_ms(self) -> int:
        return int(self.reactor.seconds() * 1000)

    def ask(
        self, authorization: str | bytes | None, method: str = "POST", path: str = "/check"
    ) -> Any:
        headers = [] if authorization is None else [("Authorization", authorization)]
        return self.make_request(method, P + path, b"{}", shorthand=False, custom_headers=headers)

    def test_whoever_may_read_the_configuration_is_told(self) -> None:
        channel = self.ask(sign(SECRET, self.now_ms()))
        assert channel.code == 200, channel.result
        said = channel.json_body
        assert (said["server_name"], said["instance"], said["is_background"]) == (
            "test",
            "master",
            True,
        )
        assert 0 <= self.now_ms() - said["now_ms"] <= 1000
        assert said["not_served"] is None
        assert SECRET not in json.dumps(said)
        for apart_ms in (-500_000, 200_000):
            assert self.ask(sign(SECRET, self.now_ms() + apart_ms)).code == 200

    def test_for_everybody_else_it_does_not_exist(self) -> None:
        signer = TokenSigner("APIkey", SECRET, self.now_ms)
        api_token = signer.api_token(VideoGrants(room_list=True, room_admin=True))
        unsigned = jwt.encode({"exp": self.now_ms() // 1000}, "", algorithm="none")
        for authorization in (
            None,
            "",
            "Bearer ",
            "Bearer nonsense",
            "Bearer \xff",
            b"Bearer \xff",
            f"Bearer {SECRET}",
            # A participant's, an application's, a user's.
            f"Bearer {self.token()}",
            f"Bearer {api_token}",
            f"Bearer {self.alices_token}",
            f"Bearer {unsigned}",
            sign(SECRET, self.now_ms() - 1_000_000),
            sign(SECRET, self.now_ms() + 1_000_000),
            sign("another-secret-of-thirty-two-characters", self.now_ms()),
        ):
            for method in ("POST", "GET", "PUT", "HEAD"):
                unknown = self.ask(authorization, method, "/unknown")
                channel = self.ask(authorization, method)
                assert channel.code == unknown.code == 404, (authorization, method)
                assert channel.result.get("body") == unknown.result.get("body")
                names = [
                    sorted(name for name, _ in answer.headers.getAllRawHeaders())
                    for answer in (channel, unknown)
                ]
                assert names[0] == names[1]
        assert channel.headers.hasHeader("Access-Control-Allow-Origin")

    def test_a_user_and_a_room_must_be_that(self) -> None:
        authorization = [("Authorization", sign(SECRET, self.now_ms()))]
        for body in (b"", b"[]", b'{"user_id": 1}', b'{"user_id": "@a:b", "room_id": "#a"}'):
            channel = self.post("/check", body, custom_headers=authorization)
            assert channel.code == 400, body


class RunningTests(DelegationTestCase):
    def test_what_stays_as_it_is_is_told_once(self) -> None:
        # The first look, soon after the start.
        self.advance_by(2)
        looks = [
            [warning("clocks", "are 7 s apart")],
            [warning("clocks", "are 8 s apart")],
            [ok("auto_create", "is off")],
            NoAnswer("LiveKit is away"),
            [warning("clocks", "are 9 s apart")],
        ]
        with (
            patch.object(Sfu, "check_rooms", side_effect=looks) as look,
            self.assertLogs("synapse_lk_jwt", logging.WARNING) as logs,
        ):
            for _ in looks:
                self.reactor.advance(LOOK_AGAIN_MS / 1000)
                self.pump()
        assert look.call_count == len(looks)
        told = [line for line in logs.output if "clocks" in line]
        assert ["7 s apart" in told[0], "9 s apart" in told[1]] == [True] * len(told)

    def test_access_rule_once_found_enforced_is_not_tried_again(self) -> None:
        # The first look, soon after the start.
        self.advance_by(2)
        with patch.object(Sfu, "_access_rule") as tried:
            for _ in range(3):
                self.reactor.advance(LOOK_AGAIN_MS / 1000)
                self.pump()
        tried.assert_not_called()


class WebhookTests(DelegationTestCase):
    def join(self) -> Any:
        """Somebody comes, as LiveKit has it, and nobody is told."""
        participant = self.sfu.join(self.token())
        participant.joined_at = int(self.reactor.seconds())
        return participant

    def test_webhooks_that_never_come_are_told_once(self) -> None:
        # The harness begins in 1970, and a webhook of that time is none.
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

    def test_webhooks_that_come_are_not_missed(self) -> None:
        self.advance_by(100)
        participant = self.join()
        with self.assertLogs("synapse_lk_jwt", logging.INFO) as logs:
            logging.getLogger("synapse_lk_jwt").info("begin")
            assert self.webhook("participant_joined", participant).code == 200
            self.advance_by(300)
        assert NO_WEBHOOK not in "".join(logs.output)
