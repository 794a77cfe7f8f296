# SPDX-License-Identifier: Apache-2.0
"""The metrics that Prometheus scrapes, for everything that happens."""

import json
import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from livekit.protocol.models import ParticipantInfo
from parameterized import parameterized
from synapse.api.errors import SynapseError
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionRefusedError as Refused

from synapse_lk_jwt import metrics
from synapse_lk_jwt.compat.events import Events
from synapse_lk_jwt.compat.rooms import Rooms
from synapse_lk_jwt.delegation.state_machine import Phase
from testbed.metrics import own_samples
from tests.harness.base import ModuleTestCase, counting, response
from tests.harness.test_delegating import HOUR_MS, DelegationTestCase
from tests.harness.test_following import FollowingTestCase

FORGED = {"access_token": "x", "matrix_server_name": "test"}


def refused(endpoint: str, cause: str) -> dict[str, float]:
    return {f'refusals_total{{cause="{cause}",endpoint="{endpoint}"}}': 1}


class TokensTests(ModuleTestCase):
    def test_tokens_are_counted_by_endpoint_user_and_access(self) -> None:
        self.join_remotely(self.rita)
        with counting("tokens_total", "remote_tokens_total", "refusals_total") as counted:
            self.assert_token(self.post("/sfu/get", self.sfu_get_body()))
            for _ in range(2):
                token = self.remote_token(self.rita)
                body = self.get_token_body(self.rita, openid_token=token)
                self.assert_token(self.post("/get_token", body))
            self.assert_token(self.post_homeserver(self.homeserver_body()))
            self.assert_token(self.post_federation(self.homeserver_body(user_id=self.rita)))
        assert counted == {
            'tokens_total{access="full",endpoint="sfu_get",user="local"}': 1,
            'tokens_total{access="restricted",endpoint="get_token",user="remote"}': 2,
            'tokens_total{access="full",endpoint="client_get_token",user="local"}': 1,
            'tokens_total{access="restricted",endpoint="federation_get_token",user="remote"}': 1,
        }

    @parameterized.expand(
        [
            ({"remote_tokens_total": 1}, 200, {"jwt": "aGVhZA.Ym9keQ.c2ln"}),
            (
                refused("client_get_token", "other_homeserver_refused"),
                403,
                {"errcode": "M_FORBIDDEN", "error": ""},
            ),
            (refused("client_get_token", "other_homeserver_failed"), 500, {}),
        ]
    )
    def test_tokens_of_other_homeservers_are_counted(
        self, expected: dict[str, float], code: int, answer: dict[str, str]
    ) -> None:
        self.join_remotely(self.rita)
        body = self.homeserver_body(server_name=self.OTHER_SERVER_NAME, url="wss://other")
        self.others.always(response(code, json.dumps(answer).encode()))
        with counting("tokens_total", "remote_tokens_total", "refusals_total") as counted:
            self.post_homeserver(body)
        assert counted == expected

    def test_rooms_ensured_are_counted_with_and_without_request(self) -> None:
        answer: Deferred[Any] = Deferred()
        self.sfu.answer = answer
        body = self.get_token_body()
        names = "rooms_ensured_total", "sfu_request_seconds_count", "sfu_request_seconds_sum"
        with counting(*names) as counted:
            channels = [self.post("/get_token", body, await_result=False) for _ in range(3)]
            self.pump()
            self.reactor.advance(3)
            answer.callback(self.sfu.room())
            self.pump()
            self.assert_token(self.post("/get_token", body))
        assert [channel.code for channel in channels] == [200] * 3
        assert counted.pop('sfu_request_seconds_sum{method="CreateRoom"}') >= 3
        counted.pop('sfu_request_seconds_count{method="ListRooms"}', None)
        assert counted == {
            "rooms_ensured_total": 4,
            'sfu_request_seconds_count{method="CreateRoom"}': 1,
        }


class RefusalsTests(DelegationTestCase):
    module_config = {"rc_openid": {"per_second": 0.001, "burst_count": 1}}

    def post_sfu_get(self, **more: Any) -> Any:
        return self.post("/sfu/get", self.sfu_get_body(**more))

    @parameterized.expand(
        [
            ("sfu_get", "bad_request", lambda self: self.post("/sfu/get", b"{")),
            ("get_token", "bad_request", lambda self: self.post("/get_token", b"x" * 70_000)),
            ("sfu_get", "unauthorized", lambda self: self.post_sfu_get(openid_token=FORGED)),
            ("client_get_token", "unauthorized", lambda self: self.post_homeserver({}, "x")),
            ("sfu_get", "not_in_room", lambda self: self.post_sfu_get(room="!elsewhere:test")),
            (
                "federation_get_token",
                "forbidden",
                lambda self: self.post_federation(self.homeserver_body(user_id="@x:stranger.org")),
            ),
            (
                "client_get_token",
                "other_sfu",
                lambda self: self.post_homeserver(self.homeserver_body(url="wss://x")),
            ),
            ("delegate_delayed_leave", "no_such_delayed_event", lambda self: self.delegate("x")),
            (
                "client_delegate_delayed_leave",
                "no_such_delayed_event",
                lambda self: self.delegate_homeserver(self.homeserver_body(delay_id="x")),
            ),
        ]
    )
    def test_refusal_is_counted_by_endpoint_and_cause(
        self, endpoint: str, cause: str, ask: Callable[[Any], Any]
    ) -> None:
        with counting("refusals_total", "tokens_total") as counted:
            assert ask(self).code >= 400
        assert counted == refused(endpoint, cause)

    def test_refusal_beyond_the_rate_limit_is_counted(self) -> None:
        away = {"access_token": "x", "matrix_server_name": self.OTHER_SERVER_NAME}
        for _ in range(2):
            self.post_sfu_get(openid_token=away)
        with counting("refusals_total", "tokens_total") as counted:
            assert self.post_sfu_get(openid_token=away).code == 429
        assert counted == refused("sfu_get", "rate_limited")

    def test_refusal_because_of_sfu_or_bug_is_counted(self) -> None:
        body = self.sfu_get_body()
        self.sfu.is_down = True
        with counting("refusals_total", "tokens_total") as counted:
            assert self.post("/sfu/get", body).code == 503
        assert counted == refused("sfu_get", "sfu")
        with (
            patch.object(Rooms, "is_joined", side_effect=OSError("no disk")),
            counting("refusals_total", "tokens_total") as counted,
        ):
            assert self.post("/sfu/get", body).code == 500
        assert counted == refused("sfu_get", "internal_error")


class OpenIdTests(ModuleTestCase):
    NAMES = ("openid_lookup_seconds_count", "openid_failures_total")

    def count(self, token: Any, user_id: str | None = None) -> tuple[int, dict[str, float]]:
        """The status of a request for a token, and what it counts."""
        body = self.get_token_body(user_id, openid_token=token)
        with counting(*self.NAMES) as counted:
            code = self.post("/get_token", body).code
        return code, counted

    def expected(self, where: str, cause: str | None = None) -> tuple[int, dict[str, float]]:
        counted: dict[str, float] = {f'openid_lookup_seconds_count{{where="{where}"}}': 1}
        if cause is None:
            return 200, counted
        return 401, {**counted, f'openid_failures_total{{cause="{cause}",where="{where}"}}': 1}

    def test_openid_token_of_local_user_is_counted(self) -> None:
        assert self.count(self.openid_token()) == self.expected("local")

    def test_openid_token_that_is_unknown_is_counted(self) -> None:
        token = {"access_token": "x", "matrix_server_name": "test"}
        assert self.count(token) == self.expected("local", "unknown")

    def test_openid_token_of_another_user_is_counted(self) -> None:
        token = self.openid_token()
        assert self.count(token, "@bob:test") == self.expected("local", "other_user")

    def test_openid_token_of_inactive_user_is_counted(self) -> None:
        token = self.openid_token()
        self.get_success(self.store.set_user_locked_status(self.alice, True))
        assert self.count(token) == self.expected("local", "inactive_user")

    @parameterized.expand(
        [
            (None, None),
            ("unreachable", OSError("no route")),
            ("refused", response(401, b"{}")),
            ("bad_answer", response(200, b"{")),
            ("bad_answer", response(200, b'{"sub": "@x:stranger.example.com"}')),
        ]
    )
    def test_openid_token_of_remote_user_is_counted(self, cause: str | None, answer: Any) -> None:
        self.join_remotely(self.rita)
        token = self.remote_token(self.rita)
        if answer is not None:
            self.others.always(answer)
        assert self.count(token, self.rita) == self.expected("remote", cause)


class SfuTests(ModuleTestCase):
    module_config = {"sanity_check_interval": 0}

    @parameterized.expand(
        [
            # The module sends the request again after a broken connection.
            ("no_connection", [Refused(), Refused()]),
            ("unauthorized", response(401, b"")),
            ("not_livekit", response(200, b"<html>", "text/html")),
            ("refused", response(500, b'{"code": "internal", "msg": "no luck"}')),
            ("timeout", None),
        ]
    )
    def test_sfu_failure_is_counted_by_cause(self, cause: str, answer: Any) -> None:
        never: Deferred[Any] = Deferred(lambda deferred: deferred.errback(IndexError()))
        self.sfu.answer = answer or never
        body = self.get_token_body()
        with counting("sfu_failures_total", "sfu_request_seconds_count") as counted:
            channel = self.post("/get_token", body, await_result=False)
            self.advance(11)
        assert channel.code == 503
        assert counted == {
            f'sfu_failures_total{{cause="{cause}",method="CreateRoom"}}': 1,
            'sfu_request_seconds_count{method="CreateRoom"}': 1,
        }

    def advance(self, seconds: int) -> None:
        self.reactor.pump([0.5] * seconds * 2)

    def test_sfu_room_that_does_not_exist_is_no_failure(self) -> None:
        self.sfu.answer = self.sfu.room()
        self.assert_token(self.post("/get_token", self.get_token_body()))
        with counting("sfu_failures_total") as counted:
            self.sfu.participants.clear()
            self.join_remotely(self.alice, "leave")
            self.advance(6)
        assert ("DeleteRoom", self.sfu.requests[0][1].name) in self.sfu.asked
        assert counted == {}


class WebhooksTests(DelegationTestCase):
    def test_webhook_is_counted_by_known_event(self) -> None:
        alice = self.sfu.join(self.token())
        with counting("webhooks_total", "webhooks_rejected_total") as counted:
            for _ in range(2):
                self.webhook("participant_joined", alice)
            for event in ("track_published", "something_new", "", "x" * 10_000):
                self.webhook(event)
        assert counted == {
            'webhooks_total{event="participant_joined"}': 2,
            'webhooks_total{event="track_published"}': 1,
            'webhooks_total{event="other"}': 3,
        }

    @parameterized.expand(
        [
            ("wrong_time", b"{}", {"nbf": 2**40}),
            ("wrong_body", b"{}", {"sha256": "x"}),
            ("unreadable", b"{", {}),
        ]
    )
    def test_webhook_that_is_rejected_is_counted_by_cause(
        self, cause: str, body: bytes, claims: dict[str, Any]
    ) -> None:
        with counting("webhooks_total", "webhooks_rejected_total") as counted:
            self.post_webhook(body, **claims)
        assert counted == {f'webhooks_rejected_total{{cause="{cause}"}}': 1}

    def test_webhook_without_signature_is_counted_as_rejected(self) -> None:
        with counting("webhooks_total", "webhooks_rejected_total") as counted:
            self.post("/sfu_webhook", b'{"event": "room_finished"}')
        assert counted == {'webhooks_rejected_total{cause="bad_signature"}': 1}

    def test_webhook_that_cannot_be_stored_is_counted_as_rejected(self) -> None:
        alice = self.sfu.join(self.token())
        with (
            patch.object(self.store.db_pool, "runInteraction", side_effect=OSError("full")),
            counting("webhooks_total", "webhooks_rejected_total") as counted,
        ):
            self.webhook("participant_joined", alice)
        assert counted == {'webhooks_rejected_total{cause="not_stored"}': 1}


class LeavesTests(DelegationTestCase):
    NAMES = ("leaves_total", "leave_seconds_count", "leave_failures_total")

    def prepare(self, reactor: Any, clock: Any, hs: Any) -> None:
        super().prepare(reactor, clock, hs)
        self.participant = self.sfu.join(self.token())
        # Requested twice, as clients do.
        delay_id = self.delayed()
        with counting("delegations_accepted_total") as counted:
            for _ in range(2):
                assert self.delegate(delay_id).code == 200
        assert counted == {"delegations_accepted_total": 1}
        # The participant has been connected for longer than two seconds.
        self.advance_by(3)

    def test_leave_after_webhook_is_counted(self) -> None:
        with counting(*self.NAMES) as counted:
            for _ in range(2):
                self.leaves(self.participant)
        assert counted == {'leaves_total{trigger="webhook"}': 1, "leave_seconds_count": 1}

    def test_leave_after_poll_is_counted(self) -> None:
        self.advance_by(31)
        self.sfu.participants = {room: {} for room in self.sfu.participants}
        with counting(*self.NAMES) as counted:
            self.advance_by(62)
        assert not self.is_in_call()
        assert counted == {'leaves_total{trigger="poll"}': 1, "leave_seconds_count": 1}

    def test_leave_of_participant_who_never_joined_is_counted(self) -> None:
        self.leaves(self.participant)
        self.enter()
        # An hour-long delay would need too many steps of the clock.
        with (
            patch("synapse_lk_jwt.delegation.state_machine.MAX_WAIT_MS", 5_000),
            counting(*self.NAMES) as counted,
        ):
            assert self.delegate(self.delayed()).code == 200
            self.advance_by(8)
        assert not self.is_in_call()
        assert counted == {'leaves_total{trigger="gave_up"}': 1, "leave_seconds_count": 1}

    def test_leave_that_the_client_sends_itself_is_not_counted(self) -> None:
        (delay_id,) = self.pending()
        path = f"/_matrix/client/unstable/org.matrix.msc4140/delayed_events/{delay_id}"
        self.make_request("POST", path, {"action": "send"}, access_token=self.alices_token)
        with counting(*self.NAMES) as counted:
            self.leaves(self.participant)
        assert counted == {}

    def test_leave_that_the_room_refuses_is_counted_as_failure(self) -> None:
        self.join_remotely(self.alice, "leave")
        with counting(*self.NAMES) as counted:
            self.leaves(self.participant)
        assert counted == {
            'leaves_total{trigger="webhook"}': 1,
            'leave_failures_total{cause="refused"}': 1,
        }

    def test_leave_that_is_retried_is_timed_from_the_first_sign(self) -> None:
        errors = [SynapseError(500, "no luck"), OSError("no network")]
        with (
            patch.object(Events, "send", side_effect=errors),
            counting(*self.NAMES, "leave_seconds_sum") as counted,
        ):
            self.leaves(self.participant)
            self.advance_by(2)
        assert counted == {
            'leaves_total{trigger="webhook"}': 1,
            'leave_failures_total{cause="failed"}': 2,
        }
        with counting(*self.NAMES, "leave_seconds_sum") as counted:
            self.advance_by(6)
        assert not self.is_in_call()
        assert 2.9 < counted.pop("leave_seconds_sum") < 6
        assert counted == {"leave_seconds_count": 1}

    def test_delegations_are_counted_by_phase_at_each_poll(self) -> None:
        for phase, (key, device) in {"waiting": ("w", "W"), "leaving": ("l", "L")}.items():
            body = self.get_token_body(delay_id=self.delayed(key=key), delay_timeout=HOUR_MS)
            body["member"].update(id=device, claimed_device_id=device)
            self.assert_token(self.post("/get_token", body))
            query = "UPDATE synapse_lk_jwt_delegations SET phase = ? WHERE state_key = ?"
            if phase == "leaving":
                query = query.replace("SET", f"SET due_ts = {2**60}, leave = '{{}}',")
            self.get_success(self.store.db_pool.execute("p", query, phase, key))
        self.advance_by(31)
        now = own_samples()
        assert [now[f'delegations{{phase="{p.value}"}}'] for p in Phase] == [1, 1, 1]
        self.get_success(self.store.db_pool.execute("d", "DELETE FROM synapse_lk_jwt_delegations"))
        self.advance_by(31)
        now = own_samples()
        assert [now[f'delegations{{phase="{p.value}"}}'] for p in Phase] == [0, 0, 0]


class RemovalsTests(FollowingTestCase):
    NAME = "removal_seconds_count"

    def removed(self, cause: str, number: int) -> dict[str, float]:
        return {f'{self.NAME}{{cause="{cause}"}}': number}

    def test_removals_are_counted_by_cause(self) -> None:
        with counting(self.NAME) as counted:
            self.join_remotely(self.bob, "ban")
            self.pump()
        # With the duplicate connection, there were five.
        assert counted == self.removed("left", 5)
        token = self.tokens["bob on one device"]
        with counting(self.NAME) as counted:
            self.webhook("participant_joined", self.sfu.join(token), room=self.room)
            self.pump()
        assert counted == self.removed("joined", 1)
        self.sfu.join(token)
        with counting(self.NAME) as counted:
            self.advance_by(31)
        # Which of the two is first depends on when Synapse has started them.
        assert counted in (self.removed("recheck", 1), self.removed("poll", 1))

    def test_removal_because_of_server_acl_is_counted(self) -> None:
        with counting(self.NAME) as counted:
            acl = {"allow": ["*"], "deny": [self.OTHER_SERVER_NAME]}
            self.helper.send_state(self.room_id, "m.room.server_acl", acl, tok=self.alices_token)
            self.pump()
        assert counted == self.removed("server_acl", 1)

    def test_removal_that_is_retried_is_timed_from_the_leave(self) -> None:
        names = (self.NAME, "removal_seconds_sum")
        self.sfu.is_down = True
        with counting(*names) as counted:
            self.join_remotely(self.rita, "leave")
            self.advance_by(20)
        assert counted == {}
        self.sfu.is_down = False
        with counting(*names) as counted:
            self.advance_by(6)
        assert 20 < counted.pop('removal_seconds_sum{cause="left"}') < 27
        assert counted == self.removed("left", 1)


class NowTests(FollowingTestCase):
    def now(self) -> tuple[float, float]:
        now = own_samples()
        return now["rooms"], now["participants"]

    def test_poll_sets_rooms_and_participants_of_our_calls(self) -> None:
        metrics.last_poll.set(0)
        self.sfu.participants["another tool's"] = {"x": ParticipantInfo(identity="x")}
        self.advance_by(31)
        assert self.now() == (2, 7)
        asked_sec = own_samples()["last_poll_timestamp_seconds"]
        assert 0 <= self.reactor.seconds() - asked_sec <= 31

        self.sfu.is_down = True
        self.advance_by(31)
        assert [math.isnan(number) for number in self.now()] == [True, True]
        assert own_samples()["last_poll_timestamp_seconds"] == asked_sec

        self.sfu.is_down = False
        self.sfu.participants = {room: {} for room in self.sfu.participants}
        self.advance_by(31)
        assert self.now() == (0, 0)
        assert own_samples()["last_poll_timestamp_seconds"] > asked_sec

    def test_poll_with_unlistable_room_sets_participants_to_nan(self) -> None:
        answer = self.sfu._answer

        def all_but_one(name: str, data: bytes) -> Any:
            if name == "ListParticipants" and self.room.encode() in data:
                return response(500, b'{"code": "internal", "msg": "no luck"}')
            return answer(name, data)

        with patch.object(self.sfu, "_answer", all_but_one):
            self.advance_by(31)
        rooms, participants = self.now()
        assert (rooms, math.isnan(participants)) == (2, True)


class PollOffTests(DelegationTestCase):
    module_config = {"sanity_check_interval": 0}

    def test_poll_without_calls_sets_zero(self) -> None:
        metrics.set_unknown()
        metrics.last_poll.set(0)
        self.advance_by(310)
        now = own_samples()
        assert (now["rooms"], now["participants"]) == (0, 0)
        assert now["last_poll_timestamp_seconds"] > 0
