# SPDX-License-Identifier: Apache-2.0
"""Delegated delayed leaves: all ways in, LiveKit's webhooks, the poll, and what is sent when."""

import hashlib
import json
import logging
from base64 import b64encode
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import jwt
from google.protobuf.json_format import MessageToJson
from livekit.protocol.models import DisconnectReason, ParticipantInfo, Room
from livekit.protocol.webhook import WebhookEvent
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


class Died(Exception):
    """As far as anything that follows is concerned, the process is no more."""


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
        """A participant goes, and LiveKit tells."""
        room = self.sfu.requests[-1][1].name
        self.sfu.people.get(room, {}).pop(participant.identity, None)
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
        """Lets time pass, and whatever happens in it happen when it does."""
        for _ in range(int(seconds * 2)):
            self.reactor.pump([0.05] * 10)


class WaysInTests(DelegationTestCase):
    def test_all_ways_in(self) -> None:
        delay = {"delay_timeout": HOUR_MS}
        ways: dict[str, Callable[[str], Any]] = {
            "/sfu/get": lambda delay_id: self.post(
                "/sfu/get", self.sfu_get_body(delay_id=delay_id, **delay)
            ),
            "/get_token": lambda delay_id: self.post(
                "/get_token", self.get_token_body(delay_id=delay_id, **delay)
            ),
            "service": self.delegate,
            "homeserver": lambda delay_id: self.delegate_homeserver(
                self.homeserver_body(delay_id=delay_id)
            ),
        }
        for way, ask in ways.items():
            delay_id = self.delayed()
            for _ in range(2):
                # Clients send it twice.
                channel = ask(delay_id)
                assert channel.code == 200, (way, channel.result)
            assert [row[0] for row in self.rows()] == [delay_id], way
            # The one before was for the same state, and has been cancelled.
            assert self.pending() == [delay_id], way

    def test_the_identities_that_are_followed(self) -> None:
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

    def test_what_the_service_endpoint_refuses(self) -> None:
        delay_id = self.delayed()
        for missing in ("delay_id", "delay_timeout"):
            body = self.get_token_body(delay_id=delay_id, delay_timeout=1)
            del body[missing]
            error = self.assert_error(
                self.post("/delegate_delayed_leave", body), 400, Codes.BAD_JSON
            )
            assert error.startswith(f"{missing}: ")
        self.assert_error(self.post("/delegate_delayed_leave", b"{"), 400, Codes.NOT_JSON)
        self.join_remotely(self.rita)
        token = self.remote_token(self.rita)
        body = self.get_token_body(
            self.rita, openid_token=token, delay_id=delay_id, delay_timeout=1
        )
        self.assert_error(self.post("/delegate_delayed_leave", body), 403, Codes.FORBIDDEN)
        # The user's server need not be asked for that.
        assert self.others.requests == []
        body = self.get_token_body(self.rita, delay_id=delay_id, delay_timeout=1)
        self.assert_error(self.post("/delegate_delayed_leave", body), 401, Codes.UNAUTHORIZED)
        self.assert_error(self.delegate(delay_id, room_id="!other:test"), 403, Codes.FORBIDDEN)
        for other in self.not_theirs():
            self.assert_error(self.delegate(other), 400, Codes.INVALID_PARAM)
        assert self.rows() == []

    def test_what_the_homeserver_endpoint_refuses(self) -> None:
        delay_id = self.delayed()
        for prefix in PREFIXES:
            path = f"/_matrix/client/{prefix}/rtc/livekit/delegate_delayed_leave"
            channel = self.make_request("POST", path)
            self.assert_error(channel, 401, Codes.MISSING_TOKEN)
            assert channel.headers.hasHeader("Access-Control-Allow-Origin")
            channel = self.delegate_homeserver(self.homeserver_body(delay_id="x"), prefix=prefix)
            self.assert_error(channel, 400, Codes.INVALID_PARAM)
        for name in ("room_id", "slot_id", "member_id", "delay_id"):
            body = self.homeserver_body(delay_id=delay_id)
            del body[name]
            error = self.assert_error(self.delegate_homeserver(body), 400, Codes.BAD_JSON)
            assert error.startswith(f"{name}: ")
        body = self.homeserver_body(delay_id=delay_id, url="wss://x")
        self.assert_error(self.delegate_homeserver(body), 400, Codes.INVALID_PARAM)
        body["room_id"] = "!other:test"
        self.assert_error(self.delegate_homeserver(body), 403, Codes.FORBIDDEN)
        for other in self.not_theirs():
            channel = self.delegate_homeserver(self.homeserver_body(delay_id=other))
            self.assert_error(channel, 400, Codes.INVALID_PARAM)
        assert self.rows() == []
        body = self.homeserver_body(delay_id=delay_id, member={"id": "member"})
        del body["member_id"]
        assert self.delegate_homeserver(body).code == 200

    def not_theirs(self) -> list[str]:
        """Delayed events that are not there, of another room, and of another user."""
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

    def test_a_token_is_handed_out_whatever_the_delayed_event_is(self) -> None:
        for other in self.not_theirs():
            for endpoint, body in (
                ("/sfu/get", self.sfu_get_body(delay_id=other, delay_timeout=1)),
                ("/get_token", self.get_token_body(delay_id=other, delay_timeout=1)),
            ):
                self.assert_token(self.post(endpoint, body))
        assert self.rows() == []

    def test_taking_on_never_depends_on_the_sfu(self) -> None:
        self.sfu.is_down = True
        for delegated in (
            self.delegate(self.delayed()),
            self.delegate_homeserver(self.homeserver_body(delay_id=self.delayed())),
        ):
            assert delegated.code == 200
        # Even where the token itself cannot be had.
        delay_id = self.delayed()
        body = self.sfu_get_body(delay_id=delay_id, delay_timeout=HOUR_MS)
        self.assert_error(self.post("/sfu/get", body), 503, Codes.UNKNOWN)
        assert [row[0] for row in self.rows()] == [delay_id]


class NoDelayedEventsTests(ModuleTestCase):
    """What cannot be delegated must not look as if it could."""

    def test_nothing_is_promised(self) -> None:
        channel = self.post("/delegate_delayed_leave", b"")
        self.assert_error(channel, 404, Codes.UNRECOGNIZED)
        assert channel.headers.hasHeader("Access-Control-Allow-Origin")
        for prefix in PREFIXES:
            path = f"/_matrix/client/{prefix}/rtc/livekit/delegate_delayed_leave"
            self.assert_error(self.make_request("POST", path, {}), 404, Codes.UNRECOGNIZED)


class WebhookTests(DelegationTestCase):
    def test_what_is_not_signed_is_refused_and_changes_nothing(self) -> None:
        jwt = self.token()
        assert self.delegate(self.delayed()).code == 200
        alice = self.sfu.join(jwt)
        self.webhook("participant_joined", alice)
        self.sfu.people.clear()
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

    def test_what_is_not_known_is_ignored(self) -> None:
        for body in (
            b"", b"{", b"[]", b"{}", b'{"event": 1}', b'{"event": "track_published"}',
            b'{"event": "participant_left"}', b'{"event": "room_finished"}', b"\xff",
            b'{"event": "participant_joined", "participant": {"attributes": {"a": 1}}}',
            b'{"event": "participant_joined", "new": true}',
            b'{"event": "participant_left", "participant": {"identity": "a#\\u0000"}}',
        ):  # fmt: skip
            assert self.post_webhook(body).code == 200, body
        assert self.post_webhook(b"x" * (1024 * 1024 + 1)).code == 200

    def test_what_cannot_be_noted_is_sent_again(self) -> None:
        alice = self.sfu.join(self.token())
        pool = self.store.db_pool
        with patch.object(pool, "runInteraction", side_effect=OSError("no disk")):
            self.assert_error(self.webhook("participant_joined", alice), 503, Codes.UNKNOWN)
        assert self.webhook("participant_joined", alice).code == 200


class KeptAliveTests(DelegationTestCase):
    def test_a_short_delay_lives_for_as_long_as_the_participant_is_connected(self) -> None:
        alice = self.sfu.join(self.token())
        assert self.delegate(self.delayed(5_000)).code == 200
        self.advance_by(60)
        assert self.is_in_call()
        self.leaves(alice)
        assert not self.is_in_call()
        assert (self.pending(), self.rows(), self.rows("identities")) == ([], [], [])
        assert self.sent() == 1

    def test_more_than_one_transaction_deals_with(self) -> None:
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

    def test_who_comes_after_delegating_is_seen_by_webhook(self) -> None:
        jwt = self.token()
        assert self.delegate(self.delayed(5_000)).code == 200
        self.advance_by(4)
        self.webhook("participant_joined", self.sfu.join(jwt))
        self.advance_by(30)
        assert self.is_in_call()

    def test_who_comes_after_delegating_is_seen_without_webhook(self) -> None:
        jwt = self.token()
        assert self.delegate(self.delayed(9_000)).code == 200
        self.advance_by(2)
        self.sfu.join(jwt)
        self.advance_by(30)
        assert self.is_in_call()

    def test_who_never_comes_is_out_after_the_delay(self) -> None:
        self.token()
        assert self.delegate(self.delayed(20_000)).code == 200
        self.advance_by(19)
        assert self.is_in_call()
        self.advance_by(3)
        assert not self.is_in_call()
        assert (self.rows(), self.sent()) == ([], 1)

    def test_nobody_waits_for_who_has_sent_their_leave_already(self) -> None:
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

    def test_an_sfu_that_does_not_answer_is_not_absence(self) -> None:
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
    """Who is gone, and who only seems to be."""

    def prepare(self, reactor: Any, clock: Any, hs: Any) -> None:
        super().prepare(reactor, clock, hs)
        self.jwt = self.token()
        self.participant = self.sfu.join(self.jwt)
        body = self.get_token_body(delay_id=self.delayed(), delay_timeout=HOUR_MS)
        self.assert_token(self.post("/get_token", body))
        self.pump()

    def test_a_reconnect_is_no_leave(self) -> None:
        for _ in range(10):
            before, self.participant = self.participant, self.sfu.join(self.jwt)
            before.disconnect_reason = DisconnectReason.DUPLICATE_IDENTITY
            self.webhook("participant_left", before)
            self.webhook("participant_joined", self.participant)
        assert self.is_in_call()
        assert len(self.rows()) == 1
        # The same with the SFU between the two.
        self.sfu.people.clear()
        self.webhook("participant_left", before)
        self.pump()
        assert self.is_in_call()

    def test_a_session_that_is_not_the_last_one_is_no_leave(self) -> None:
        before = self.participant
        self.webhook("participant_joined", self.sfu.join(self.jwt))
        asked = len(self.sfu.asked)
        self.webhook("participant_left", before)
        self.pump()
        assert len(self.sfu.asked) == asked
        assert self.is_in_call()

    def test_the_sfu_is_asked_before_anything_is_sent(self) -> None:
        for event in ("participant_left", "participant_connection_aborted", "room_finished"):
            self.webhook(event, self.participant)
            self.pump()
            assert self.is_in_call(), event

    def test_every_kind_of_going(self) -> None:
        for event in ("participant_left", "participant_connection_aborted", "room_finished"):
            self.sfu.people.clear()
            for _ in range(3):
                # Repeated ones do no harm.
                self.webhook(event, self.participant)
                self.pump()
            assert not self.is_in_call(), event
            self.enter()
            self.prepare_again()
        assert self.sent() == 3

    def prepare_again(self) -> None:
        self.participant = self.sfu.join(self.jwt)
        body = self.get_token_body(delay_id=self.delayed(), delay_timeout=HOUR_MS)
        self.assert_token(self.post("/get_token", body))
        self.pump()

    def test_an_evicted_session_whose_successor_never_comes_up(self) -> None:
        self.webhook("participant_joined", self.participant)
        self.participant.disconnect_reason = DisconnectReason.DUPLICATE_IDENTITY
        self.webhook("participant_left", self.participant)
        self.sfu.people.clear()
        self.webhook(
            "participant_connection_aborted",
            ParticipantInfo(identity=self.participant.identity, sid="PA_another"),
        )
        self.pump()
        assert not self.is_in_call()

    def test_a_late_leave_of_the_time_before_does_not_end_a_new_membership(self) -> None:
        before = self.participant
        self.sfu.people.clear()
        # They come back: the membership is there, and LiveKit not yet.
        body = self.get_token_body(delay_id=self.delayed(), delay_timeout=HOUR_MS)
        self.assert_token(self.post("/get_token", body))
        self.webhook("participant_left", before)
        self.pump()
        assert self.is_in_call()

    def test_an_answer_that_is_older_than_the_leave_does_not_hide_it(self) -> None:
        answer: Deferred[None] = Deferred()
        self.sfu.answers_wait_for = answer
        # Whoever asks now hears of the time before the leave.
        self.webhook("participant_left", self.participant)
        self.sfu.people.clear()
        self.reactor.advance(0.01)
        self.webhook("participant_left", self.participant)
        self.sfu.answers_wait_for = None
        answer.callback(None)
        self.pump()
        assert not self.is_in_call()

    def test_a_leave_that_is_no_state_is_sent_once_all_the_same(self) -> None:
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

    def test_twins_do_not_count(self) -> None:
        self.webhook("participant_joined", self.sfu.join(self.jwt, twin="#twin"))
        self.leaves(self.participant)
        assert not self.is_in_call()

    def test_a_server_that_shuts_down_ends_no_membership(self) -> None:
        self.leaves(self.participant, DisconnectReason.SERVER_SHUTDOWN)
        assert self.is_in_call()

    def test_two_polls_find_out_what_no_webhook_tells(self) -> None:
        self.advance_by(31)
        self.sfu.people = {room: {} for room in self.sfu.people}
        self.advance_by(30)
        assert self.is_in_call()
        self.advance_by(31)
        assert not self.is_in_call()
        assert self.rows() == []

    def test_livekit_restarts_in_the_middle_of_a_call(self) -> None:
        self.advance_by(31)
        self.sfu.people.clear()
        made = len(self.sfu.requests)
        self.advance_by(30)
        assert len(self.sfu.requests) == made + 1
        self.webhook("participant_joined", self.sfu.join(self.jwt))
        self.advance_by(90)
        assert self.is_in_call()
        assert len(self.sfu.requests) == made + 1

    def test_a_room_that_was_finished_is_not_made_again(self) -> None:
        self.advance_by(31)
        made = len(self.sfu.requests)
        self.leaves(self.participant)
        self.sfu.people.clear()
        self.webhook("room_finished")
        self.advance_by(90)
        assert len(self.sfu.requests) == made
        assert self.rows("calls") == []

    def test_a_node_of_livekit_dies_with_a_call(self) -> None:
        self.sfu.has_nodes = True
        self.advance_by(31)
        made = len(self.sfu.requests)
        (room,) = self.sfu.people
        self.sfu.without_node.add(room)
        # Who is in it has the time until the second poll to come back by themselves.
        self.advance_by(30)
        assert len(self.sfu.requests) == made
        self.sfu.people[room].clear()
        self.advance_by(30)
        assert len(self.sfu.requests) == made + 1
        assert self.is_in_call()
        self.advance_by(61)
        assert not self.is_in_call()
        assert len(self.sfu.requests) == made + 1

    def test_who_comes_back_after_a_node_of_livekit_died(self) -> None:
        self.sfu.has_nodes = True
        self.advance_by(31)
        (room,) = self.sfu.people
        self.sfu.without_node.add(room)
        self.advance_by(60)
        assert self.sfu.without_node == set()
        self.webhook("participant_joined", self.sfu.join(self.jwt))
        self.advance_by(120)
        assert self.is_in_call()

    def test_where_nodes_are_asked_nobody_answers_for_a_room_that_is_gone(self) -> None:
        self.sfu.has_nodes = True
        self.sfu.people.clear()
        self.webhook("room_finished")
        self.pump()
        assert not self.is_in_call()

    def test_the_client_itself_has_sent_its_leave(self) -> None:
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

    def test_a_newer_leave_of_the_same_member_takes_the_place_of_the_older_one(self) -> None:
        self.prepare_again()
        (row,) = self.rows()
        assert self.pending() == [row[0]]
        # Another state of the same member: the older event is not ours to cancel.
        self.helper.send_state(
            self.room_id, MEMBER, {"in": "it"}, tok=self.alices_token, state_key="other"
        )
        newer = self.delayed(key="other")
        body = self.get_token_body(delay_id=newer, delay_timeout=1)
        self.assert_token(self.post("/get_token", body))
        assert [row[0] for row in self.rows()] == [newer]
        assert sorted(self.pending()) == sorted([row[0], newer])

    def test_two_members_of_one_device_are_two(self) -> None:
        self.get_success(self.store.db_pool.execute("d", "DELETE FROM synapse_lk_jwt_delegations"))
        for member in ("one", "other"):
            body = self.homeserver_body(delay_id=self.delayed(key=member), member_id=member)
            assert self.delegate_homeserver(body).code == 200
        assert len(self.rows()) == 2

    def test_members_of_other_devices_are_others(self) -> None:
        body = self.get_token_body(delay_id=self.delayed(key="other"), delay_timeout=HOUR_MS)
        body["member"].update(id="other", claimed_device_id="OTHER")
        self.assert_token(self.post("/get_token", body))
        assert len(self.rows()) == 2
        self.leaves(self.participant)
        assert not self.is_in_call()
        assert len(self.rows()) == 1

    def test_a_leave_that_the_room_refuses_is_done(self) -> None:
        self.join_remotely(self.alice, "leave")
        with self.assertNoLogs("synapse_lk_jwt", logging.WARNING):
            self.leaves(self.participant)
        assert (self.rows(), self.sent()) == ([], 0)

    def test_a_leave_that_cannot_be_sent_is_tried_again(self) -> None:
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

    def test_the_process_dies_before_the_leave_is_sent(self) -> None:
        with patch.object(DelegationService, "run_tasks"):
            self.sfu.people.clear()
            self.webhook("participant_left", self.participant)
        assert self.is_in_call()
        # Noted, and done by whoever looks at the clock next.
        self.advance_by(4)
        assert not self.is_in_call()

        self.enter()
        self.prepare_again()
        with patch.object(LeaveSender, "_send", side_effect=Died):
            self.sfu.people.clear()
            self.webhook("participant_left", self.participant)
            self.pump()
        assert self.is_in_call()
        self.advance_by(12)
        assert not self.is_in_call()
        assert self.sent() == 2

    def test_the_process_dies_after_the_leave_was_sent(self) -> None:
        send = LeaveSender._try_to_send

        async def sent_and_dead(sender: LeaveSender, task: Any) -> None:
            await send(sender, task)
            raise Died

        with patch.object(LeaveSender, "_try_to_send", sent_and_dead):
            self.leaves(self.participant)
        assert not self.is_in_call()
        assert len(self.rows()) == 1
        # A new membership begins before anybody finds out.
        self.enter()
        self.advance_by(12)
        assert self.is_in_call()
        assert (self.rows(), self.sent()) == ([], 1)


class RateLimitedTests(DelegationTestCase):
    def default_config(self) -> dict[str, Any]:
        config = super().default_config()
        config["rc_message"] = {"per_second": 0.001, "burst_count": 6}
        return config

    def test_a_user_who_has_written_too_much_leaves_all_the_same(self) -> None:
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

    def test_a_lost_webhook_does_not_make_a_ghost_for_ever(self) -> None:
        self.sfu.join(self.token())
        self.advance_by(60)
        assert self.sfu.asked == []
        assert self.delegate(self.delayed()).code == 200
        self.advance_by(2)
        self.sfu.people = {room: {} for room in self.sfu.people}
        self.advance_by(720)
        assert not self.is_in_call()
