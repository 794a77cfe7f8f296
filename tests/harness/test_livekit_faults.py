# SPDX-License-Identifier: Apache-2.0
"""Faults of LiveKit: wrong events, lost rooms and lost webhooks."""

import json
from typing import Any

from synapse_lk_jwt.livekit.naming import livekit_room_name
from tests.harness.base import SLOT
from tests.harness.test_delegating import HOUR_MS, DelegationTestCase
from tests.harness.test_following import FollowingTestCase


class FinishedInErrorTests(FollowingTestCase):
    """LiveKit reports the end of a room that participants are still in."""

    module_config = {"sanity_check_interval": 0}

    def test_room_finished_in_error_a_ban_removes_the_user_at_once(self) -> None:
        there = self.there()
        self.advance_by(11)
        assert self.webhook("room_finished", room=self.room).code == 200
        self.pump()
        assert self.there() == there
        self.join_remotely(self.bob, "ban")
        self.pump(0.1)
        assert self.users_there() == {self.alice, self.rita}

    def test_room_finished_is_not_noted_again_without_participants(self) -> None:
        self.advance_by(11)
        del self.sfu.participants[self.room]
        before = len(self.rows("calls"))
        assert self.webhook("room_finished", room=self.room).code == 200
        self.pump()
        assert len(self.rows("calls")) == before - 1


class VanishedRoomTests(DelegationTestCase):
    """A room that is deleted while the module remembers it."""

    def test_room_deleted_by_another_tool_next_token_creates_it(self) -> None:
        self.token()
        made = len(self.sfu.requests)
        self.reactor.advance(1)
        self.token()
        assert len(self.sfu.requests) == made
        self.sfu.participants.clear()
        room = livekit_room_name(self.room_id, SLOT)
        event = {
            "event": "room_finished",
            "room": {"name": room},
            "roomEndReason": "ROOM_END_API_DELETE",
        }
        assert self.post_webhook(json.dumps(event).encode()).code == 200
        self.token()
        assert len(self.sfu.requests) == made + 1
        assert room in self.sfu.participants


class RefusedWebhookTests(DelegationTestCase):
    """LiveKit delivers no webhook for 30 s, and then drops those in its queue."""

    def prepare(self, reactor: Any, clock: Any, hs: Any) -> None:
        super().prepare(reactor, clock, hs)
        self.jwt = self.token()

    def delegate_in_call(self) -> None:
        delay = {"delay_id": self.delayed(), "delay_timeout": HOUR_MS}
        self.assert_token(self.post("/get_token", self.get_token_body(**delay)))
        self.pump()

    def test_participant_left_meanwhile_its_leave_is_sent(self) -> None:
        participant = self.sfu.join(self.jwt)
        self.delegate_in_call()
        self.advance_by(30)
        del self.sfu.participants[next(iter(self.sfu.participants))][participant.identity]
        self.advance_by(75)
        assert not self.is_in_call()
        assert self.rows() == []

    def test_participant_joined_meanwhile_its_leave_is_sent_when_it_leaves(self) -> None:
        self.delegate_in_call()
        self.advance_by(2)
        participant = self.sfu.join(self.jwt)
        self.advance_by(30)
        assert self.is_in_call()
        self.leaves(participant)
        assert not self.is_in_call()
