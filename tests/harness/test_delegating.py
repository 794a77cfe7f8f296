# SPDX-License-Identifier: Apache-2.0
"""Delegated delayed leaves: endpoints, LiveKit's webhooks, the poll, and when leaves are sent."""

import hashlib
import json
import logging
from base64 import b64encode
from typing import Any
from unittest.mock import patch

import jwt
from google.protobuf.json_format import MessageToJson
from livekit.protocol.models import DisconnectReason, ParticipantInfo, Room
from livekit.protocol.webhook import WebhookEvent
from parameterized import parameterized
from synapse.api.errors import Codes, SynapseError
from synapse.rest import admin
from synapse.rest.client import delayed_events
from twisted.internet.defer import Deferred

from synapse_lk_jwt.compat.events import Events
from synapse_lk_jwt.delegation.sender import LeaveSender
from synapse_lk_jwt.delegation.service import DelegationService
from tests.harness.base import SECRET, ModuleTestCase

MEMBER = "org.matrix.msc3401.call.member"
HOUR_MS = 3_600_000
PREFIXES = ("v1", "unstable/io.element.msc4195")
GOING = ("participant_left", "participant_connection_aborted", "room_finished")


class Died(Exception):
    """Raised where a process dies."""


class DelegationTestCase(ModuleTestCase):
    servlets = (admin.register_servlets, delayed_events.register_servlets)

    def default_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().default_config()
        config["max_event_delay_duration"] = "24h"
        return config

    def prepare(self, reactor: Any, clock: Any, hs: Any) -> None:
        super().prepare(reactor, clock, hs)
        self.key = f"_{self.alice}_DEVICE"
        self.enter()

    def enter(self) -> None:
        self.helper.send_state(
            self.room_id, MEMBER, {"in": "the call"}, tok=self.alices_token, state_key=self.key
        )

    def delayed(
        self,
        delay_ms: int = HOUR_MS,
        key: str | None = None,
        room_id: str | None = None,
        token: str | None = None,
    ) -> str:
        path = f"rooms/{room_id or self.room_id}/state/{MEMBER}/{key or self.key}"
        channel = self.make_request(
            "PUT",
            f"{path}?org.matrix.msc4140.delay={delay_ms}",
            {},
            access_token=token or self.alices_token,
        )
        assert channel.code == 200, channel.result
        delay_id: str = channel.json_body["delay_id"]
        return delay_id

    def delegate(self, delay_id: str, **more: Any) -> Any:
        body = self.get_token_body(delay_id=delay_id, delay_timeout=HOUR_MS, **more)
        return self.post("/delegate_delayed_leave", body)

    def delegate_homeserver(
        self, body: Any, access_token: str | None = None, prefix: str = "v1"
    ) -> Any:
        path = f"/_matrix/client/{prefix}/rtc/livekit/delegate_delayed_leave"
        return self.make_request("POST", path, body, access_token=access_token or self.alices_token)

    def token(self) -> str:
        jwt: str = self.post("/get_token", self.get_token_body()).json_body["jwt"]
        return jwt

    def webhook(
        self,
        event: str,
        participant: ParticipantInfo | None = None,
        room: str | None = None,
        **more: Any,
    ) -> Any:
        message = WebhookEvent(
            event=event,
            room=Room(name=room or self.sfu.requests[-1][1].name),
            participant=participant,
        )
        return self.post_webhook(MessageToJson(message).encode(), **more)

    def post_webhook(self, body: bytes, **claims: Any) -> Any:
        said = {
            "iss": "APIkey",
            "exp": int(self.reactor.seconds()) + 300,
            "sha256": b64encode(hashlib.sha256(body).digest()).decode(),
            **claims,
        }
        headers = [("Authorization", jwt.encode(said, SECRET))]
        return self.post("/sfu_webhook", body, custom_headers=headers)

    def leaves(
        self, participant: ParticipantInfo, reason: Any = DisconnectReason.CLIENT_INITIATED
    ) -> None:
        """A participant leaves, and LiveKit sends a webhook."""
        room = self.sfu.requests[-1][1].name
        self.sfu.participants.get(room, {}).pop(participant.identity, None)
        gone = ParticipantInfo()
        gone.CopyFrom(participant)
        gone.disconnect_reason = reason
        assert self.webhook("participant_left", gone).code == 200
        self.pump()

    def is_in_call(self) -> bool:
        content = self.helper.get_state(
            self.room_id, MEMBER, tok=self.alices_token, state_key=self.key
        )
        return bool(content)

    def pending(self) -> list[str]:
        path = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events"
        channel = self.make_request("GET", path, access_token=self.alices_token)
        return [event["delay_id"] for event in channel.json_body["delayed_events"]]

    def rows(self, table: str = "delegations") -> list[Any]:
        rows: list[Any] = self.get_success(
            self.store.db_pool.execute("rows", f"SELECT * FROM synapse_lk_jwt_{table}")
        )
        return rows

    def sent(self) -> int:
        """How many leaves there are in the timeline."""
        rows: list[Any] = self.get_success(
            self.store.db_pool.execute(
                "sent",
                "SELECT json FROM event_json JOIN events USING (event_id) WHERE type = ?",
                MEMBER,
            )
        )
        return sum(1 for (event,) in rows if json.loads(event)["content"] == {})

    def advance_by(self, seconds: float) -> None:
        """Lets time pass in small steps."""
        for _ in range(int(seconds * 2)):
            self.reactor.pump([0.05] * 10)


class EndpointTests(DelegationTestCase):
    def delegate_by(self, endpoint: str, delay_id: str) -> Any:
        delay = {"delay_id": delay_id, "delay_timeout": HOUR_MS}
        match endpoint:
            case "sfu_get":
                return self.post("/sfu/get", self.sfu_get_body(**delay))
            case "get_token":
                return self.post("/get_token", self.get_token_body(**delay))
            case "service":
                return self.delegate(delay_id)
            case _:
                return self.delegate_homeserver(self.homeserver_body(delay_id=delay_id))

    @parameterized.expand([("sfu_get",), ("get_token",), ("service",), ("homeserver",)])
    def test_delegate_twice_by_each_endpoint_replaces_the_older_delegation(
        self, endpoint: str
    ) -> None:
        assert self.delegate(self.delayed()).code == 200
        delay_id = self.delayed()
        # Clients send it twice.
        for _ in range(2):
            channel = self.delegate_by(endpoint, delay_id)
            assert channel.code == 200, channel.result
        assert [row[0] for row in self.rows()] == [delay_id]
        # The older event was for the same state, and has been cancelled.
        assert self.pending() == [delay_id]

    def test_delegation_follows_the_identities_of_its_endpoint(self) -> None:
        token = {"openid_token": self.openid_token()}
        a = self.assert_token(self.post("/sfu/get", self.sfu_get_body(**token)))["sub"]
        b = self.assert_token(self.post("/get_token", self.get_token_body(**token)))["sub"]
        c = self.assert_token(self.post_homeserver(self.homeserver_body()))["sub"]
        (device,) = (
            row[0]
            for row in self.get_success(
                self.store.db_pool.execute(
                    "d", "SELECT device_id FROM devices WHERE user_id = ?", self.alice
                )
            )
            if len(row[0]) == 10
        )

        def followed() -> set[str]:
            return {row[1] for row in self.rows("identities")}

        delay_id = self.delayed()
        body = self.sfu_get_body(delay_id=delay_id, delay_timeout=1)
        self.assert_token(self.post("/sfu/get", body))
        assert followed() == {a}
        body = self.get_token_body(delay_id=self.delayed(), delay_timeout=1)
        self.assert_token(self.post("/get_token", body))
        assert followed() == {b}
        assert self.delegate(self.delayed()).code == 200
        assert followed() == {a, b}
        delegated = self.delegate_homeserver(self.homeserver_body(delay_id=self.delayed()))
        assert delegated.code == 200, delegated.result
        own_a = f"{self.alice}:{device}"
        assert {c, own_a} < followed()
        assert len(followed()) == 3

    @parameterized.expand([("delay_id",), ("delay_timeout",)])
    def test_service_endpoint_without_a_field_gets_400(self, missing: str) -> None:
        body = self.get_token_body(delay_id=self.delayed(), delay_timeout=1)
        del body[missing]
        error = self.assert_error(self.post("/delegate_delayed_leave", body), 400, Codes.BAD_JSON)
        assert error.startswith(f"{missing}: ")
        assert self.rows() == []

    def test_service_endpoint_with_no_json_gets_400(self) -> None:
        self.assert_error(self.post("/delegate_delayed_leave", b"{"), 400, Codes.NOT_JSON)

    def test_service_endpoint_for_a_user_of_another_server_gets_403(self) -> None:
        self.join_remotely(self.rita)
        delay = {"delay_id": self.delayed(), "delay_timeout": 1}
        token = self.remote_token(self.rita)
        body = self.get_token_body(self.rita, openid_token=token, **delay)
        self.assert_error(self.post("/delegate_delayed_leave", body), 403, Codes.FORBIDDEN)
        # The user's server need not be queried for that.
        assert self.others.requests == []
        body = self.get_token_body(self.rita, **delay)
        self.assert_error(self.post("/delegate_delayed_leave", body), 401, Codes.UNAUTHORIZED)
        assert self.rows() == []

    def test_service_endpoint_for_another_room_gets_403(self) -> None:
        channel = self.delegate(self.delayed(), room_id="!other:test")
        self.assert_error(channel, 403, Codes.FORBIDDEN)

    def test_service_endpoint_with_any_other_delayed_event_gets_400(self) -> None:
        for other in self.not_theirs():
            self.assert_error(self.delegate(other), 400, Codes.INVALID_PARAM)
        assert self.rows() == []

    @parameterized.expand([(prefix,) for prefix in PREFIXES])
    def test_homeserver_endpoint_without_a_token_gets_401_with_cors(self, prefix: str) -> None:
        path = f"/_matrix/client/{prefix}/rtc/livekit/delegate_delayed_leave"
        channel = self.make_request("POST", path)
        self.assert_error(channel, 401, Codes.MISSING_TOKEN)
        assert channel.headers.hasHeader("Access-Control-Allow-Origin")
        channel = self.delegate_homeserver(self.homeserver_body(delay_id="x"), prefix=prefix)
        self.assert_error(channel, 400, Codes.INVALID_PARAM)

    @parameterized.expand([("room_id",), ("slot_id",), ("member_id",), ("delay_id",)])
    def test_homeserver_endpoint_without_a_field_gets_400(self, name: str) -> None:
        body = self.homeserver_body(delay_id=self.delayed())
        del body[name]
        error = self.assert_error(self.delegate_homeserver(body), 400, Codes.BAD_JSON)
        assert error.startswith(f"{name}: ")
        assert self.rows() == []

    def test_homeserver_endpoint_for_another_sfu_gets_400(self) -> None:
        body = self.homeserver_body(delay_id=self.delayed(), url="wss://x")
        self.assert_error(self.delegate_homeserver(body), 400, Codes.INVALID_PARAM)

    def test_homeserver_endpoint_for_another_room_gets_403(self) -> None:
        body = self.homeserver_body(delay_id=self.delayed(), room_id="!other:test")
        self.assert_error(self.delegate_homeserver(body), 403, Codes.FORBIDDEN)

    def test_homeserver_endpoint_with_any_other_delayed_event_gets_400(self) -> None:
        for other in self.not_theirs():
            channel = self.delegate_homeserver(self.homeserver_body(delay_id=other))
            self.assert_error(channel, 400, Codes.INVALID_PARAM)
        assert self.rows() == []

    def test_homeserver_endpoint_with_member_instead_of_member_id_delegates(self) -> None:
        body = self.homeserver_body(delay_id=self.delayed(), member={"id": "member"})
        del body["member_id"]
        assert self.delegate_homeserver(body).code == 200

    def not_theirs(self) -> list[str]:
        """Delayed events that do not exist, of another room or user, and one that is no leave."""
        bob = self.register_user("bob", "password")
        bobs_token = self.login("bob", "password")
        self.helper.join(self.room_id, bob, tok=bobs_token)
        self.helper.send_state(
            self.room_id,
            "m.room.power_levels",
            {"users": {self.alice: 100, bob: 100}},
            tok=self.alices_token,
        )
        elsewhere = self.helper.create_room_as(self.alice, tok=self.alices_token)
        path = f"rooms/{self.room_id}/state/m.room.topic?org.matrix.msc4140.delay={HOUR_MS}"
        topic = self.make_request("PUT", path, {"topic": "x"}, access_token=self.alices_token)
        return [
            "syd_x",
            self.delayed(room_id=elsewhere),
            self.delayed(token=bobs_token),
            # It would be sent without the rules for such events.
            topic.json_body["delay_id"],
        ]

    def test_token_request_with_any_other_delayed_event_gets_a_token(self) -> None:
        for other in self.not_theirs():
            for endpoint, body in (
                ("/sfu/get", self.sfu_get_body(delay_id=other, delay_timeout=1)),
                ("/get_token", self.get_token_body(delay_id=other, delay_timeout=1)),
            ):
                self.assert_token(self.post(endpoint, body))
        assert self.rows() == []

    def test_delegate_while_the_sfu_is_down_succeeds(self) -> None:
        self.sfu.is_down = True
        for delegated in (
            self.delegate(self.delayed()),
            self.delegate_homeserver(self.homeserver_body(delay_id=self.delayed())),
        ):
            assert delegated.code == 200
        # Even if no token can be issued.
        delay_id = self.delayed()
        body = self.sfu_get_body(delay_id=delay_id, delay_timeout=HOUR_MS)
        self.assert_error(self.post("/sfu/get", body), 503, Codes.UNKNOWN)
        assert [row[0] for row in self.rows()] == [delay_id]


class NoDelayedEventsTests(ModuleTestCase):
    """With any answer but 404, clients rely on the module to send their leave."""

    def test_delegate_without_delayed_events_gets_404(self) -> None:
        channel = self.post("/delegate_delayed_leave", b"")
        self.assert_error(channel, 404, Codes.UNRECOGNIZED)
        assert channel.headers.hasHeader("Access-Control-Allow-Origin")
        for prefix in PREFIXES:
            path = f"/_matrix/client/{prefix}/rtc/livekit/delegate_delayed_leave"
            self.assert_error(self.make_request("POST", path, {}), 404, Codes.UNRECOGNIZED)


class WebhookTests(DelegationTestCase):
    def test_webhook_with_wrong_signature_is_rejected_and_changes_nothing(self) -> None:
        jwt = self.token()
        assert self.delegate(self.delayed()).code == 200
        alice = self.sfu.join(jwt)
        self.webhook("participant_joined", alice)
        self.sfu.participants.clear()
        body = b'{"event": "room_finished"}'
        with self.assertLogs("synapse_lk_jwt", logging.WARNING) as logs:
            channels = [
                self.post("/sfu_webhook", body),
                self.post("/sfu_webhook", body, custom_headers=[("Authorization", "Bearer x")]),
                self.post("/sfu_webhook", body, custom_headers=[(b"Authorization", b"\xff")]),
                self.post_webhook(body, iss="another"),
                self.post_webhook(body, sha256="x"),
            ]
        for channel in channels:
            self.assert_error(channel, 401, Codes.UNAUTHORIZED)
        # Each cause once, with what to run.
        assert len(logs.output) == 3
        assert all("synapse_lk_jwt check" in line for line in logs.output)
        assert self.is_in_call()

    @parameterized.expand(
        [
            (b"",), (b"{",), (b"[]",), (b"{}",), (b'{"event": 1}',),
            (b'{"event": "track_published"}',), (b'{"event": "participant_left"}',),
            (b'{"event": "room_finished"}',), (b"\xff",),
            (b'{"event": "participant_joined", "participant": {"attributes": {"a": 1}}}',),
            (b'{"event": "participant_joined", "new": true}',),
            (b'{"event": "participant_left", "participant": {"identity": "a#\\u0000"}}',),
            (b"x" * (1024 * 1024 + 1),),
        ]
    )  # fmt: skip
    def test_webhook_with_an_unknown_body_is_ignored(self, body: bytes) -> None:
        alice = self.sfu.join(self.token())
        assert self.delegate(self.delayed()).code == 200
        self.webhook("participant_joined", alice)
        # The first query and the first poll happen before.
        self.advance_by(3)
        before = self.rows(), self.rows("identities"), self.rows("calls")
        assert self.post_webhook(body).code == 200
        self.pump()
        assert (self.rows(), self.rows("identities"), self.rows("calls")) == before

    def test_webhook_that_cannot_be_stored_gets_503(self) -> None:
        alice = self.sfu.join(self.token())
        pool = self.store.db_pool
        with patch.object(pool, "runInteraction", side_effect=OSError("no disk")):
            self.assert_error(self.webhook("participant_joined", alice), 503, Codes.UNKNOWN)
        assert self.webhook("participant_joined", alice).code == 200


class KeptAliveTests(DelegationTestCase):
    def test_short_delay_is_restarted_while_the_participant_is_connected(self) -> None:
        alice = self.sfu.join(self.token())
        assert self.delegate(self.delayed(5_000)).code == 200
        self.advance_by(60)
        assert self.is_in_call()
        self.leaves(alice)
        assert not self.is_in_call()
        assert (self.pending(), self.rows(), self.rows("identities")) == ([], [], [])
        assert self.sent() == 1

    def test_process_due_more_than_one_batch_restarts_all(self) -> None:
        self.sfu.join(self.token())
        assert self.delegate(self.delayed(5_000)).code == 200
        for name in ("B", "C", "D", "E"):
            body = self.get_token_body()
            body["member"].update(id=name, claimed_device_id=name)
            self.sfu.join(self.post("/get_token", body).json_body["jwt"])
            delay = {"delay_id": self.delayed(5_000, key=name), "delay_timeout": 5_000}
            assert self.post("/get_token", {**body, **delay}).code == 200
        with patch("synapse_lk_jwt.delegation.tables.BATCH", 1):
            self.advance_by(30)
        assert len(self.pending()) == 5

    def test_participant_who_joins_after_delegating_is_seen_by_webhook(self) -> None:
        jwt = self.token()
        assert self.delegate(self.delayed(5_000)).code == 200
        self.advance_by(4)
        self.webhook("participant_joined", self.sfu.join(jwt))
        self.advance_by(30)
        assert self.is_in_call()

    def test_participant_who_joins_after_delegating_is_seen_without_webhook(self) -> None:
        jwt = self.token()
        assert self.delegate(self.delayed(9_000)).code == 200
        self.advance_by(2)
        self.sfu.join(jwt)
        self.advance_by(30)
        assert self.is_in_call()

    def test_participant_who_never_connects_leaves_after_the_delay(self) -> None:
        self.token()
        assert self.delegate(self.delayed(20_000)).code == 200
        self.advance_by(19)
        assert self.is_in_call()
        self.advance_by(3)
        assert not self.is_in_call()
        assert (self.rows(), self.sent()) == ([], 1)

    def test_waiting_delegation_whose_leave_the_client_sent_ends(self) -> None:
        self.token()
        delay_id = self.delayed()
        assert self.delegate(delay_id).code == 200
        path = f"/_matrix/client/unstable/org.matrix.msc4140/delayed_events/{delay_id}"
        channel = self.make_request(
            "POST", path, {"action": "send"}, access_token=self.alices_token
        )
        assert channel.code == 200, channel.result
        self.advance_by(3)
        assert (self.rows(), self.rows("identities")) == ([], [])

    def test_sfu_that_does_not_answer_sends_no_leave(self) -> None:
        alice = self.sfu.join(self.token())
        assert self.delegate(self.delayed(5_000)).code == 200
        self.advance_by(2)
        self.sfu.is_down = True
        self.webhook("participant_left", alice)
        self.advance_by(300)
        assert self.is_in_call()
        self.sfu.is_down = False
        self.advance_by(90)
        assert self.is_in_call()
        self.sfu.is_down = True
        self.leaves(alice)
        self.advance_by(20)
        assert self.is_in_call()
        self.sfu.is_down = False
        self.advance_by(4)
        assert not self.is_in_call()


class LeavingTests(DelegationTestCase):
    """Participants who disconnected, and participants who only seem to have."""

    def prepare(self, reactor: Any, clock: Any, hs: Any) -> None:
        super().prepare(reactor, clock, hs)
        self.jwt = self.token()
        self.participant = self.sfu.join(self.jwt)
        body = self.get_token_body(delay_id=self.delayed(), delay_timeout=HOUR_MS)
        self.assert_token(self.post("/get_token", body))
        self.pump()

    def test_reconnect_sends_no_leave(self) -> None:
        for _ in range(10):
            before, self.participant = self.participant, self.sfu.join(self.jwt)
            before.disconnect_reason = DisconnectReason.DUPLICATE_IDENTITY
            self.webhook("participant_left", before)
            self.webhook("participant_joined", self.participant)
        assert self.is_in_call()
        assert len(self.rows()) == 1
        # The same with the SFU between the two.
        self.sfu.participants.clear()
        self.webhook("participant_left", before)
        self.pump()
        assert self.is_in_call()

    def test_left_of_an_earlier_session_is_ignored(self) -> None:
        before = self.participant
        self.webhook("participant_joined", self.sfu.join(self.jwt))
        asked = len(self.sfu.asked)
        self.webhook("participant_left", before)
        self.pump()
        assert len(self.sfu.asked) == asked
        assert self.is_in_call()

    @parameterized.expand([(event,) for event in GOING])
    def test_webhook_about_a_participant_who_is_connected_sends_no_leave(self, event: str) -> None:
        self.webhook(event, self.participant)
        self.pump()
        assert self.is_in_call()

    @parameterized.expand([(event,) for event in GOING])
    def test_webhook_about_a_participant_who_is_gone_sends_one_leave(self, event: str) -> None:
        self.sfu.participants.clear()
        for _ in range(3):
            # LiveKit may repeat it.
            self.webhook(event, self.participant)
            self.pump()
        assert not self.is_in_call()
        assert self.sent() == 1

    def prepare_again(self) -> None:
        self.participant = self.sfu.join(self.jwt)
        body = self.get_token_body(delay_id=self.delayed(), delay_timeout=HOUR_MS)
        self.assert_token(self.post("/get_token", body))
        self.pump()

    def test_replaced_session_whose_successor_fails_sends_the_leave(self) -> None:
        self.webhook("participant_joined", self.participant)
        self.participant.disconnect_reason = DisconnectReason.DUPLICATE_IDENTITY
        self.webhook("participant_left", self.participant)
        self.sfu.participants.clear()
        self.webhook(
            "participant_connection_aborted",
            ParticipantInfo(identity=self.participant.identity, sid="PA_another"),
        )
        self.pump()
        assert not self.is_in_call()

    def test_late_left_of_an_earlier_call_does_not_end_a_new_membership(self) -> None:
        before = self.participant
        self.sfu.participants.clear()
        # The user returns: the membership exists, and the participant is not connected yet.
        body = self.get_token_body(delay_id=self.delayed(), delay_timeout=HOUR_MS)
        self.assert_token(self.post("/get_token", body))
        self.webhook("participant_left", before)
        self.pump()
        assert self.is_in_call()

    def test_answer_older_than_the_suspicion_does_not_clear_it(self) -> None:
        answer: Deferred[None] = Deferred()
        self.sfu.answers_wait_for = answer
        # The answer to this query is older than the leave.
        self.webhook("participant_left", self.participant)
        self.sfu.participants.clear()
        self.reactor.advance(0.01)
        self.webhook("participant_left", self.participant)
        self.sfu.answers_wait_for = None
        answer.callback(None)
        self.pump()
        assert not self.is_in_call()

    def test_message_leave_of_a_process_that_died_is_sent_once(self) -> None:
        path = f"rooms/{self.room_id}/send/m.rtc.member/1?org.matrix.msc4140.delay={HOUR_MS}"
        content = {"sticky_key": "member"}
        channel = self.make_request("PUT", path, content, access_token=self.alices_token)
        delay_id = channel.json_body["delay_id"]
        body = self.get_token_body(delay_id=delay_id, delay_timeout=HOUR_MS)
        self.assert_token(self.post("/get_token", body))
        self.pump()
        send = LeaveSender._try_to_send

        async def sent_and_dead(sender: LeaveSender, task: Any) -> None:
            await send(sender, task)
            raise Died

        with patch.object(LeaveSender, "_try_to_send", sent_and_dead):
            self.leaves(self.participant)
        self.advance_by(12)
        rows = self.get_success(
            self.store.db_pool.execute("e", "SELECT 1 FROM events WHERE type = 'm.rtc.member'")
        )
        assert len(rows) == 1
        assert self.rows() == []

    def test_duplicate_connection_does_not_count_as_connected(self) -> None:
        self.webhook("participant_joined", self.sfu.join(self.jwt, duplicate="#duplicate"))
        self.leaves(self.participant)
        assert not self.is_in_call()

    def test_left_because_livekit_shuts_down_sends_no_leave(self) -> None:
        self.leaves(self.participant, DisconnectReason.SERVER_SHUTDOWN)
        assert self.is_in_call()

    def test_two_polls_without_the_participant_send_the_leave(self) -> None:
        self.advance_by(31)
        self.sfu.participants = {room: {} for room in self.sfu.participants}
        self.advance_by(30)
        assert self.is_in_call()
        self.advance_by(31)
        assert not self.is_in_call()
        assert self.rows() == []

    def test_livekit_that_restarts_during_a_call_gets_the_room_recreated(self) -> None:
        self.advance_by(31)
        self.sfu.participants.clear()
        made = len(self.sfu.requests)
        self.advance_by(30)
        assert len(self.sfu.requests) == made + 1
        self.webhook("participant_joined", self.sfu.join(self.jwt))
        self.advance_by(90)
        assert self.is_in_call()
        assert len(self.sfu.requests) == made + 1

    def test_finished_room_is_not_recreated(self) -> None:
        self.advance_by(31)
        made = len(self.sfu.requests)
        self.leaves(self.participant)
        self.sfu.participants.clear()
        self.webhook("room_finished")
        self.advance_by(90)
        assert len(self.sfu.requests) == made
        assert self.rows("calls") == []

    def test_livekit_node_that_dies_with_a_call_sends_the_leave(self) -> None:
        self.sfu.has_nodes = True
        self.advance_by(31)
        made = len(self.sfu.requests)
        (room,) = self.sfu.participants
        self.sfu.without_node.add(room)
        # Participants have until the second poll to reconnect by themselves.
        self.advance_by(30)
        assert len(self.sfu.requests) == made
        self.sfu.participants[room].clear()
        self.advance_by(30)
        assert len(self.sfu.requests) == made + 1
        assert self.is_in_call()
        self.advance_by(61)
        assert not self.is_in_call()
        assert len(self.sfu.requests) == made + 1

    def test_participant_who_rejoins_after_a_livekit_node_died_stays(self) -> None:
        self.sfu.has_nodes = True
        self.advance_by(31)
        (room,) = self.sfu.participants
        self.sfu.without_node.add(room)
        self.advance_by(60)
        assert self.sfu.without_node == set()
        self.webhook("participant_joined", self.sfu.join(self.jwt))
        self.advance_by(120)
        assert self.is_in_call()

    def test_finished_room_without_a_livekit_node_sends_the_leave(self) -> None:
        self.sfu.has_nodes = True
        self.sfu.participants.clear()
        self.webhook("room_finished")
        self.pump()
        assert not self.is_in_call()

    def test_leave_that_the_client_sent_is_not_sent_again(self) -> None:
        (delay_id,) = self.pending()
        path = f"/_matrix/client/unstable/org.matrix.msc4140/delayed_events/{delay_id}"
        channel = self.make_request(
            "POST", path, {"action": "send"}, access_token=self.alices_token
        )
        assert channel.code == 200, channel.result
        with self.assertNoLogs("synapse_lk_jwt", logging.WARNING):
            self.leaves(self.participant)
        assert self.rows() == []
        assert self.sent() == 1

    def test_newer_leave_of_the_same_member_replaces_the_older_one(self) -> None:
        self.prepare_again()
        (row,) = self.rows()
        assert self.pending() == [row[0]]
        # Another state of the same member: the module must not cancel the older event.
        self.helper.send_state(
            self.room_id, MEMBER, {"in": "it"}, tok=self.alices_token, state_key="other"
        )
        newer = self.delayed(key="other")
        body = self.get_token_body(delay_id=newer, delay_timeout=1)
        self.assert_token(self.post("/get_token", body))
        assert [row[0] for row in self.rows()] == [newer]
        assert sorted(self.pending()) == sorted([row[0], newer])

    def test_two_members_of_one_device_have_two_delegations(self) -> None:
        self.get_success(self.store.db_pool.execute("d", "DELETE FROM synapse_lk_jwt_delegations"))
        for member in ("one", "other"):
            body = self.homeserver_body(delay_id=self.delayed(key=member), member_id=member)
            assert self.delegate_homeserver(body).code == 200
        assert len(self.rows()) == 2

    def test_member_of_another_device_keeps_its_delegation(self) -> None:
        body = self.get_token_body(delay_id=self.delayed(key="other"), delay_timeout=HOUR_MS)
        body["member"].update(id="other", claimed_device_id="OTHER")
        self.assert_token(self.post("/get_token", body))
        assert len(self.rows()) == 2
        self.leaves(self.participant)
        assert not self.is_in_call()
        assert len(self.rows()) == 1

    def test_leave_that_the_room_rejects_ends_the_delegation(self) -> None:
        self.join_remotely(self.alice, "leave")
        with self.assertNoLogs("synapse_lk_jwt", logging.WARNING):
            self.leaves(self.participant)
        assert (self.rows(), self.sent()) == ([], 0)

    def test_leave_that_cannot_be_sent_is_retried(self) -> None:
        errors = [SynapseError(500, "no luck"), SynapseError(429, "slowly"), OSError("no network")]
        with (
            patch.object(Events, "send", side_effect=errors) as send,
            self.assertLogs("synapse_lk_jwt", logging.WARNING) as logs,
        ):
            self.leaves(self.participant)
            self.advance_by(5)
        assert (send.call_count, len(logs.output)) == (3, 3)
        assert self.is_in_call()
        self.advance_by(6)
        assert not self.is_in_call()
        assert (self.rows(), self.sent()) == ([], 1)

    def test_process_that_dies_before_the_leave_is_sent_loses_nothing(self) -> None:
        with patch.object(DelegationService, "run_tasks"):
            self.sfu.participants.clear()
            self.webhook("participant_left", self.participant)
        assert self.is_in_call()
        # It is stored, and becomes due again.
        self.advance_by(4)
        assert not self.is_in_call()

        self.enter()
        self.prepare_again()
        with patch.object(LeaveSender, "_send", side_effect=Died):
            self.sfu.participants.clear()
            self.webhook("participant_left", self.participant)
            self.pump()
        assert self.is_in_call()
        self.advance_by(12)
        assert not self.is_in_call()
        assert self.sent() == 2

    def test_process_that_dies_after_the_leave_was_sent_repeats_nothing(self) -> None:
        send = LeaveSender._try_to_send

        async def sent_and_dead(sender: LeaveSender, task: Any) -> None:
            await send(sender, task)
            raise Died

        with patch.object(LeaveSender, "_try_to_send", sent_and_dead):
            self.leaves(self.participant)
        assert not self.is_in_call()
        assert len(self.rows()) == 1
        # A new membership begins before the leave becomes due again.
        self.enter()
        self.advance_by(12)
        assert self.is_in_call()
        assert (self.rows(), self.sent()) == ([], 1)


class RateLimitedTests(DelegationTestCase):
    def default_config(self) -> dict[str, Any]:
        config = super().default_config()
        config["rc_message"] = {"per_second": 0.001, "burst_count": 6}
        return config

    def test_leave_of_a_user_at_the_rate_limit_is_sent(self) -> None:
        participant = self.sfu.join(self.token())
        assert self.delegate(self.delayed()).code == 200
        self.advance_by(3)
        codes = {
            self.make_request(
                "PUT",
                f"rooms/{self.room_id}/send/m.room.message/{number}",
                {"msgtype": "m.text", "body": "x"},
                access_token=self.alices_token,
            ).code
            for number in range(12)
        }
        assert 429 in codes
        self.leaves(participant)
        assert not self.is_in_call()
        assert (self.rows(), self.sent()) == ([], 1)


class NoPollTests(DelegationTestCase):
    module_config = {"sanity_check_interval": 0}

    def test_lost_webhook_without_a_poll_sends_the_leave_later(self) -> None:
        self.sfu.join(self.token())
        self.advance_by(60)
        assert self.sfu.asked == []
        assert self.delegate(self.delayed()).code == 200
        self.advance_by(2)
        self.sfu.participants = {room: {} for room in self.sfu.participants}
        self.advance_by(720)
        assert not self.is_in_call()
