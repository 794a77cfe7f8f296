# SPDX-License-Identifier: Apache-2.0
"""Older and newer versions of LiveKit, whose messages differ."""

import json
import logging
from typing import Any
from unittest import skipUnless
from unittest.mock import patch

from livekit.protocol.models import DisconnectReason, ParticipantInfo
from livekit.protocol.room import RoomParticipantIdentity
from parameterized import parameterized
from synapse.api import constants

from synapse_lk_jwt import webhooks
from tests.harness.base import ModuleTestCase, response
from tests.harness.test_delegable_events import ENCRYPTED, RTC_MEMBER, EncryptedTestCase
from tests.harness.test_delegating import HOUR_MS, DelegationTestCase
from tests.harness.test_following import FollowingTestCase

Kind = ParticipantInfo.Kind


class WrongKeyTests(ModuleTestCase):
    @parameterized.expand(
        [
            (b"invalid API key: APIkey", "livekit_key"),
            (b"invalid token: eyJ, error: no", "livekit_secret"),
            # LiveKit 1.13.6 and newer.
            (b"invalid authorization token: no", "livekit_secret"),
            (b"no", "livekit_key and livekit_secret"),
        ]
    )
    def test_token_livekit_rejects_the_key_log_names_the_option(
        self, body: bytes, option: str
    ) -> None:
        self.sfu.answer = response(401, body, "text/plain")
        with self.assertLogs("synapse_lk_jwt.livekit", logging.ERROR) as logs:
            assert self.post("/sfu/get", self.sfu_get_body()).code == 503
        assert f"it rejected {option} (401). Compare keys: in LiveKit's" in logs.output[0]


class RoomEndTests(DelegationTestCase):
    def prepare(self, reactor: Any, clock: Any, hs: Any) -> None:
        super().prepare(reactor, clock, hs)
        self.jwt = self.token()
        self.participant = self.sfu.join(self.jwt)
        delay = {"delay_id": self.delayed(), "delay_timeout": HOUR_MS}
        self.assert_token(self.post("/get_token", self.get_token_body(**delay)))
        self.pump()

    def finish(self, reason: str | int | None) -> None:
        """LiveKit closes the room and reports it, with or without a reason."""
        (room,) = self.sfu.participants
        self.sfu.participants.clear()
        event: dict[str, Any] = {"event": "room_finished", "room": {"name": room}}
        if reason is not None:
            event["roomEndReason"] = reason
        assert self.post_webhook(json.dumps(event).encode()).code == 200
        self.pump()

    @parameterized.expand([("ROOM_END_SERVER_SHUTDOWN",), ("ROOM_END_SUPERSEDED",)])
    def test_room_finished_on_a_restart_sends_no_leave_and_recreates_the_room(
        self, reason: str
    ) -> None:
        self.advance_by(31)
        made = len(self.sfu.requests)
        self.finish(reason)
        assert self.is_in_call()
        self.advance_by(31)
        assert len(self.sfu.requests) == made + 1
        self.webhook("participant_joined", self.sfu.join(self.jwt))
        self.advance_by(90)
        assert self.is_in_call()

    @parameterized.expand(
        [
            (None,),
            ("ROOM_END_API_DELETE",),
            ("ROOM_END_IDLE_TIMEOUT",),
            ("ROOM_END_OPEN_FAILED",),
            ("ROOM_END_OF_A_NEWER_LIVEKIT",),
            (99,),
        ]
    )
    def test_room_finished_for_another_reason_sends_the_leave(
        self, reason: str | int | None
    ) -> None:
        self.finish(reason)
        assert not self.is_in_call()

    def test_room_finished_read_by_an_older_livekit_protocol_sends_the_leave(self) -> None:
        with patch.object(webhooks, "NO_LEAVE_OF_ROOM", frozenset()):
            self.finish("ROOM_END_SERVER_SHUTDOWN")
        assert not self.is_in_call()

    def test_room_finished_on_shutdown_next_token_creates_the_room(self) -> None:
        made = len(self.sfu.requests)
        self.finish("ROOM_END_SERVER_SHUTDOWN")
        self.token()
        assert len(self.sfu.requests) == made + 1

    def test_participant_left_for_a_state_mismatch_is_no_leave(self) -> None:
        self.leaves(self.participant, DisconnectReason.STATE_MISMATCH)
        assert self.is_in_call()

    def test_webhook_with_unknown_names_of_a_newer_livekit_sends_the_leave(self) -> None:
        (room,) = self.sfu.participants
        self.sfu.participants.clear()
        participant = {
            "sid": self.participant.sid,
            "identity": self.participant.identity,
            "state": "HOLOGRAM",
            "kindDetails": ["HOLOGRAM"],
            "disconnectReason": "HOLOGRAM_ENDED",
            "permission": {"canPublishSources": ["HOLOGRAM"]},
            "hologram": {"since": 2027},
        }
        event = {
            "event": "participant_left",
            "room": {"name": room, "hologram": True},
            "participant": participant,
            "hologramJob": {},
        }
        assert self.post_webhook(json.dumps(event).encode()).code == 200
        self.pump()
        assert not self.is_in_call()

    @parameterized.expand([("agent_job_created",), ("egress_started",), ("hologram_started",)])
    def test_webhook_of_an_unknown_event_changes_nothing(self, name: str) -> None:
        room = self.sfu.requests[-1][1].name
        self.sfu.participants.clear()
        event = {"event": name, "room": {"name": room}, "job": {"id": "x", "type": "JT_NEW"}}
        assert self.post_webhook(json.dumps(event).encode()).code == 200
        self.pump()
        assert self.is_in_call()


class RemovalTests(FollowingTestCase):
    def test_ban_removal_names_its_time_in_seconds(self) -> None:
        asked: list[RoomParticipantIdentity] = []
        answer = self.sfu._answer

        def note(name: str, data: bytes) -> Any:
            if name == "RemoveParticipant":
                asked.append(RoomParticipantIdentity.FromString(data))
            return answer(name, data)

        self.advance_by(100)
        now_sec = int(self.reactor.seconds())
        with patch.object(self.sfu, "_answer", note):
            self.join_remotely(self.bob, "ban")
            self.pump()
        assert asked
        # Tokens whose `nbf` is older are revoked, and the next one is not.
        assert {request.revoke_token_ts for request in asked} <= {now_sec, now_sec + 1}

    def test_ban_with_an_older_livekit_protocol_removes_the_user(self) -> None:
        class Older:
            """`RoomParticipantIdentity` as it was before May 2026."""

            __slots__ = ("SerializeToString",)

            def __init__(self, room: str, identity: str) -> None:
                self.SerializeToString = RoomParticipantIdentity(
                    room=room, identity=identity
                ).SerializeToString

        with patch("synapse_lk_jwt.livekit.client.RoomParticipantIdentity", Older):
            self.join_remotely(self.bob, "ban")
            self.pump()
        assert self.users_there() == {self.alice, self.rita}


class OtherKindsTests(FollowingTestCase):
    """Agents, recorders and SIP callers in a call of this homeserver."""

    def let_in(self, kind: Any, identity: str) -> ParticipantInfo:
        participant = ParticipantInfo(
            sid="PA_other", identity=identity, kind=kind, state=ParticipantInfo.State.ACTIVE
        )
        self.sfu.participants[self.room][identity] = participant
        return participant

    @parameterized.expand([(Kind.INGRESS,), (Kind.EGRESS,), (Kind.SIP,), (Kind.AGENT,), (99,)])
    def test_participant_of_another_kind_stays_in_the_call(self, kind: Any) -> None:
        # One has the identity of a user who is not in the room, one a longer identity than clients.
        stranger = self.let_in(kind, "@stranger:test:DEVICE")
        long = self.let_in(kind, "EG_" + "x" * 1_000)
        for participant in (stranger, long):
            assert self.webhook("participant_joined", participant, room=self.room).code == 200
        self.join_remotely(self.bob, "ban")
        self.advance_by(61)
        assert {stranger.identity, long.identity} <= self.sfu.participants[self.room].keys()
        assert not any(i.startswith(self.bob) for i in self.sfu.participants[self.room])

    def test_participant_of_the_standard_kind_is_removed(self) -> None:
        stranger = self.let_in(Kind.STANDARD, "@stranger:test:DEVICE")
        self.advance_by(31)
        assert stranger.identity not in self.sfu.participants[self.room]


@skipUnless(hasattr(constants, "StickyEvent"), "this Synapse has no sticky events")
class StickyTests(EncryptedTestCase):
    """Synapse reads `msc4354_sticky` today, and `sticky` once it has adopted MSC4354."""

    def durations(self, event_type: str, name: str) -> list[Any]:
        """The field that makes an event sticky, of each event that was sent."""
        rows: list[Any] = self.get_success(
            self.store.db_pool.execute(
                "sticky",
                "SELECT json FROM event_json JOIN events USING (event_id) WHERE type = ?",
                event_type,
            )
        )
        return [json.loads(row[0]).get(name) for row in rows]

    @parameterized.expand(
        [
            (name, *event)
            for name in ("msc4354_sticky", "sticky")
            for event in (
                (ENCRYPTED, {"ciphertext": "leave"}),
                (RTC_MEMBER, {"msc4354_sticky_key": "k"}),
            )
        ]
    )
    def test_sticky_leave_is_sent_sticky(self, name: str, event_type: str, content: Any) -> None:
        with patch.object(constants.StickyEvent, "EVENT_FIELD_NAME", name):
            alice = self.call()
            delay_id = self.schedule(event_type, content, sticky=True)
            assert self.delegate_of(delay_id).code == 200
            self.advance_by(3)
            self.leaves(alice)
            assert self.contents(event_type) == [content]
        assert self.durations(event_type, name) == [{"duration_ms": HOUR_MS}]
        # Synapse's own table lists it while Synapse knows the name.
        rows = self.get_success(self.store.db_pool.execute("sticky", "SELECT * FROM sticky_events"))
        assert len(rows) == (name == "msc4354_sticky")

    def test_leave_that_was_not_scheduled_sticky_is_not_sent_sticky(self) -> None:
        self.lose()
        self.leaves(self.alice_there)
        assert self.contents(ENCRYPTED) == [{"ciphertext": "leave0"}]
        for name in ("msc4354_sticky", "sticky"):
            assert self.durations(ENCRYPTED, name) == [None]
