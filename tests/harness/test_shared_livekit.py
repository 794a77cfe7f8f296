# SPDX-License-Identifier: Apache-2.0
"""A LiveKit that another homeserver uses with the same key and secret."""

import logging
from typing import Any
from unittest.mock import patch

from livekit.protocol.models import ParticipantInfo
from parameterized import parameterized

from synapse_lk_jwt.livekit import listings
from synapse_lk_jwt.livekit.naming import hash_of_identity, livekit_room_name
from synapse_lk_jwt.livekit.ownership import OwnerSealer, ParticipantOwner
from tests.harness.base import SECRET, SLOT, claims
from tests.harness.test_following import FollowingTestCase

THEIR_ROOM = "!theirs:other.example.com"


class SharedTestCase(FollowingTestCase):
    def prepare(self, reactor: Any, clock: Any, hs: Any) -> None:
        super().prepare(reactor, clock, hs)
        self.carl = f"@carl:{self.OTHER_SERVER_NAME}"
        self.join_remotely(self.carl)
        # The calls of the base class end.
        for name in list(self.sfu.participants):
            del self.sfu.participants[name]
            self.webhook("room_finished", room=name)
        self.advance_by(12)
        self.get_success(self.store.db_pool.execute("none", "DELETE FROM synapse_lk_jwt_calls"))

    def theirs(
        self, user_id: str, room_id: str, issuer: str | None = None, announce: bool = True
    ) -> ParticipantInfo:
        """A participant with a token of the other homeserver joins, with or without a webhook."""
        identity = hash_of_identity(f"{user_id} {room_id}")
        owner = ParticipantOwner(user_id, room_id, SLOT, issuer or self.OTHER_SERVER_NAME)
        participant = ParticipantInfo(
            sid="PA_theirs",
            identity=identity,
            state=ParticipantInfo.State.ACTIVE,
            attributes=OwnerSealer(SECRET).seal(owner, identity),
        )
        room = livekit_room_name(room_id, SLOT)
        self.sfu.participants.setdefault(room, {})[identity] = participant
        if announce:
            assert self.webhook("participant_joined", participant, room=room).code == 200
            self.pump()
        return participant

    def mine(self, name: str) -> ParticipantInfo:
        """A participant with a token of this homeserver joins."""
        participant: ParticipantInfo = self.sfu.join(self.tokens[name])
        room = claims(self.tokens[name])["video"]["room"]
        assert self.webhook("participant_joined", participant, room=room).code == 200
        self.pump()
        return participant

    def identities(self) -> set[str]:
        return {identity for present in self.sfu.participants.values() for identity in present}

    def leave_with_all_local_users(self) -> None:
        self.helper.leave(self.room_id, self.bob, tok=self.bobs_token)
        self.helper.leave(self.room_id, self.alice, tok=self.alices_token)
        self.pump(0.1)


class TheirCallTests(SharedTestCase):
    """A call of a room that this homeserver is not in."""

    def test_webhook_and_poll_of_a_call_elsewhere_change_nothing(self) -> None:
        carl = self.theirs(self.carl, THEIR_ROOM)
        self.advance_by(61)
        assert self.identities() == {carl.identity}
        assert self.rows("calls") == []

    def test_poll_lost_room_of_another_homeserver_is_not_recreated(self) -> None:
        self.theirs(self.carl, THEIR_ROOM, announce=False)
        self.advance_by(61)
        made = len(self.sfu.requests)
        self.sfu.participants.clear()
        self.advance_by(61)
        assert len(self.sfu.requests) == made

    def test_poll_local_user_with_a_foreign_token_in_room_elsewhere_is_removed(self) -> None:
        carl = self.theirs(self.carl, THEIR_ROOM)
        self.theirs(self.bob, THEIR_ROOM, announce=False)
        self.advance_by(31)
        assert self.identities() == {carl.identity}


class RefusingTests(SharedTestCase):
    module_config = {"rooms_elsewhere": "refuse"}

    @parameterized.expand([(True,), (False,)])
    def test_rooms_elsewhere_refused_the_call_elsewhere_continues(self, announce: bool) -> None:
        carl = self.theirs(self.carl, THEIR_ROOM, announce=announce)
        self.advance_by(61)
        assert self.identities() == {carl.identity}


class SharedRoomTests(SharedTestCase):
    """A call of a Matrix room that both homeservers are in: one LiveKit room for both."""

    def test_last_local_user_leaves_participants_of_the_other_homeserver_stay(self) -> None:
        carl = self.theirs(self.carl, self.room_id)
        self.mine("alice")
        self.mine("bob on one device")
        self.leave_with_all_local_users()
        assert self.identities() == {carl.identity}
        assert ("DeleteRoom", self.room) not in self.sfu.asked

    def test_last_local_user_left_and_reconnects_with_an_old_token_is_removed(self) -> None:
        carl = self.theirs(self.carl, self.room_id)
        self.mine("alice")
        self.leave_with_all_local_users()
        # LiveKit sends no webhook, because the participant sends no media.
        self.sfu.join(self.tokens["alice"])
        self.advance_by(5)
        assert self.identities() == {carl.identity}

    def test_last_local_user_leaves_a_call_without_others_ends_it(self) -> None:
        self.mine("alice")
        self.leave_with_all_local_users()
        assert self.sfu.participants == {}
        assert self.rows("calls") == []

    def test_room_blocked_here_participants_of_the_other_homeserver_stay(self) -> None:
        carl = self.theirs(self.carl, self.room_id)
        self.mine("alice")
        self.get_success(self.store.block_room(self.room_id, self.alice))
        self.advance_by(61)
        assert self.identities() == {carl.identity}

    def test_ban_in_a_shared_call_removes_the_user_and_no_other_participant(self) -> None:
        carl = self.theirs(self.carl, self.room_id)
        alice = self.mine("alice")
        self.mine("bob on one device")
        self.join_remotely(self.bob, "ban")
        self.pump()
        assert self.identities() == {carl.identity, alice.identity}

    def test_user_not_in_the_room_with_a_foreign_token_is_removed(self) -> None:
        alice = self.mine("alice")
        self.theirs("@mallory:third.example.com", self.room_id)
        assert self.identities() == {alice.identity}

    def test_lost_room_with_foreign_participants_only_is_not_recreated(self) -> None:
        alice = self.mine("alice")
        self.theirs(self.carl, self.room_id)
        self.advance_by(31)
        # The module noted this call for Alice, who has left it since.
        assert len(self.rows("calls")) == 1
        del self.sfu.participants[self.room][alice.identity]
        self.advance_by(61)
        made = len(self.sfu.requests)
        self.sfu.participants.clear()
        self.advance_by(61)
        assert len(self.sfu.requests) == made

    def test_lost_room_with_own_participants_is_recreated(self) -> None:
        self.mine("alice")
        self.theirs(self.carl, self.room_id)
        self.advance_by(61)
        made = len(self.sfu.requests)
        self.sfu.participants.clear()
        self.advance_by(31)
        assert len(self.sfu.requests) == made + 1

    def test_call_with_seals_without_issuer_is_recreated(self) -> None:
        participant = self.theirs(self.alice, self.room_id, announce=False)
        identity = participant.identity
        owner = ParticipantOwner(self.alice, self.room_id, SLOT)
        participant.attributes.update(OwnerSealer(SECRET).seal(owner, identity))
        self.advance_by(61)
        made = len(self.sfu.requests)
        self.sfu.participants.clear()
        self.advance_by(31)
        assert len(self.sfu.requests) == made + 1

    def test_ban_from_a_shared_call_that_cannot_be_listed_does_not_end_it(self) -> None:
        self.theirs(self.carl, self.room_id)
        for number in range(5):
            self.sfu.join(self.tokens["alice"], f"#{number}")
        self.mine("rita")
        with (
            patch.object(listings, "MAX_PARTICIPANTS", 3),
            self.assertLogs("synapse_lk_jwt.enforcement.removals", logging.WARNING) as logs,
        ):
            self.join_remotely(self.rita, "ban")
            self.pump()
        assert self.room in self.sfu.participants
        assert "another homeserver uses it as well" in logs.output[0]
