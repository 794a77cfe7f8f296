# SPDX-License-Identifier: Apache-2.0
"""Who is not in the Matrix room any more is removed from its calls, and nobody else."""

from typing import Any

from livekit.protocol.models import ParticipantInfo
from synapse.types import create_requester

from synapse_lk_jwt.livekit.naming import livekit_room_name
from synapse_lk_jwt.livekit.ownership import OwnerSealer, ParticipantOwner
from tests.harness.base import SECRET, SLOT
from tests.harness.test_delegating import DelegationTestCase


class FollowingTestCase(DelegationTestCase):
    def prepare(self, reactor: Any, clock: Any, hs: Any) -> None:
        super().prepare(reactor, clock, hs)
        self.bob = self.register_user("bob", "password")
        self.bobs_token = self.login("bob", "password")
        self.helper.join(self.room_id, self.bob, tok=self.bobs_token)
        self.join_remotely(self.rita)
        self.room = livekit_room_name(self.room_id, SLOT)
        # Alice last: she has full access, and makes the rooms.
        self.tokens = {
            "alice": self.token(),
            "bob on one device": self.ask(self.bob, self.bobs_token),
            "bob on another": self.ask(self.bob, self.bobs_token, device="OTHER"),
            "bob in another slot": self.ask(self.bob, self.bobs_token, slot_id="other"),
            "bob, MSC4195": self.post_homeserver(self.homeserver_body(), self.bobs_token).json_body[
                "jwt"
            ],
            "rita": self.assert_jwt(
                self.post(
                    "/get_token",
                    self.get_token_body(self.rita, openid_token=self.remote_token(self.rita)),
                )
            ),
        }
        for token in self.tokens.values():
            self.sfu.join(token)
        self.sfu.join(self.tokens["bob on one device"], twin="#twin")
        self.pump()

    def assert_jwt(self, channel: Any) -> str:
        self.assert_token(channel)
        token: str = channel.json_body["jwt"]
        return token

    def ask(self, user_id: str, access_token: str, device: str | None = None, **more: Any) -> str:
        token = self.openid_token(user_id, access_token)
        if device is None:
            body = self.sfu_get_body(openid_token=token)
            if "slot_id" not in more:
                return self.assert_jwt(self.post("/sfu/get", body))
        body = self.get_token_body(user_id, openid_token=token, **more)
        body["member"]["claimed_device_id"] = device or "DEVICE"
        return self.assert_jwt(self.post("/get_token", body))

    def there(self) -> int:
        """How many participants there are in all rooms."""
        return sum(len(people) for people in self.sfu.people.values())

    def users_there(self) -> set[str]:
        return {
            self.owner(participant).user_id
            for people in self.sfu.people.values()
            for participant in people.values()
        }

    def room_of(self, participant: ParticipantInfo) -> str:
        room: str
        (room,) = (r for r, people in self.sfu.people.items() if participant.identity in people)
        return room

    def owner(self, participant: ParticipantInfo) -> ParticipantOwner:
        owner = OwnerSealer(SECRET).open(participant.attributes, participant.identity)
        assert owner is not None
        return owner


class LeavingTests(FollowingTestCase):
    def test_everything_of_who_goes_and_nothing_of_the_others(self) -> None:
        assert self.there() == 7
        for how in ("leave", "ban"):
            self.join_remotely(self.bob, how)
            self.pump()
            assert self.users_there() == {self.alice, self.rita}, how
            assert self.there() == 2
            self.join_remotely(self.bob, "leave")
            self.join_remotely(self.bob)
            for name, token in self.tokens.items():
                if name.startswith("bob"):
                    self.sfu.join(token)

    def test_remote_users(self) -> None:
        self.join_remotely(self.rita, "leave")
        self.pump()
        assert self.users_there() == {self.alice, self.bob}

    def test_a_server_that_is_shut_out_by_the_acl(self) -> None:
        self.helper.send_state(
            self.room_id,
            "m.room.server_acl",
            {"allow": ["*"], "deny": [self.OTHER_SERVER_NAME]},
            tok=self.alices_token,
        )
        self.pump()
        assert self.users_there() == {self.alice, self.bob}

    def test_deactivation(self) -> None:
        handler = self.hs.get_deactivate_account_handler()
        self.get_success(handler.deactivate_account(self.bob, False, create_requester(self.bob)))
        self.pump(0.1)
        assert self.users_there() == {self.alice, self.rita}

    def test_changes_of_a_member_who_stays_ask_nothing(self) -> None:
        asked = len(self.sfu.asked)
        self.helper.send(self.room_id, "hello", tok=self.bobs_token)
        self.join_remotely(self.bob)
        self.pump()
        assert len(self.sfu.asked) == asked

    def test_rooms_without_a_call_ask_nothing(self) -> None:
        room_id = self.helper.create_room_as(self.alice, tok=self.alices_token)
        self.helper.join(room_id, self.bob, tok=self.bobs_token)
        asked = len(self.sfu.asked)
        self.helper.leave(room_id, self.bob, tok=self.bobs_token)
        self.pump()
        assert len(self.sfu.asked) == asked

    def test_the_last_local_user_goes_and_so_do_the_rooms(self) -> None:
        self.join_remotely(self.bob, "leave")
        self.join_remotely(self.alice, "leave")
        self.pump()
        assert self.sfu.people == {}
        assert self.rows("calls") == []

    def test_a_token_that_is_still_good_lets_nobody_back_in(self) -> None:
        self.join_remotely(self.bob, "ban")
        self.pump()
        for name, token in self.tokens.items():
            participant = self.sfu.join(token)
            self.webhook("participant_joined", participant, room=self.room_of(participant))
            self.pump()
            is_there = any(participant.identity in p for p in self.sfu.people.values())
            assert is_there == (not name.startswith("bob")), name

    def test_the_poll_finds_who_came_back_without_a_webhook(self) -> None:
        self.join_remotely(self.bob, "ban")
        self.get_success(self.store.set_user_locked_status(self.alice, True))
        self.pump()
        for token in self.tokens.values():
            self.sfu.join(token)
        self.advance_by(31)
        assert self.users_there() == {self.rita}

    def test_an_sfu_that_does_not_answer_is_told_later(self) -> None:
        self.sfu.is_down = True
        self.join_remotely(self.bob, "leave")
        self.advance_by(20)
        assert self.bob in self.users_there()
        self.sfu.is_down = False
        self.advance_by(6)
        assert self.users_there() == {self.alice, self.rita}

    def test_one_who_cannot_be_removed_holds_up_nobody(self) -> None:
        stuck = f"{self.bob}:DEVICE"
        self.sfu.stuck.add(stuck)
        self.join_remotely(self.bob, "leave")
        self.join_remotely(self.rita, "leave")
        self.pump()
        assert self.users_there() == {self.alice, self.bob}
        assert self.there() == 2
        # What else happens on the homeserver causes no more requests.
        asked = len(self.sfu.asked)
        self.helper.send(self.room_id, "hello", tok=self.alices_token)
        self.pump()
        assert len(self.sfu.asked) == asked
        self.sfu.stuck.clear()
        self.advance_by(6)
        assert self.users_there() == {self.alice}

    def test_whatever_a_twin_is_called_it_is_removed(self) -> None:
        self.join_remotely(self.bob, "ban")
        self.pump()
        twin = self.sfu.join(self.tokens["bob on one device"], twin="#\0")
        assert self.webhook("participant_joined", twin, room=self.room).code == 200
        self.pump()
        assert self.users_there() == {self.alice, self.rita}

    def test_participants_that_are_not_ours_stay(self) -> None:
        stranger = ParticipantInfo(identity="recorder", sid="PA_X")
        self.sfu.people[self.room]["recorder"] = stranger
        self.webhook("participant_joined", stranger, room=self.room)
        self.join_remotely(self.bob, "leave")
        self.advance_by(31)
        assert "recorder" in self.sfu.people[self.room]

    def test_tokens_of_older_versions_are_known_by_their_identity(self) -> None:
        for identity in (f"{self.bob}:DEVICE", f"{self.bob}:8448:DEVICE"):
            self.sfu.people[self.room][identity] = ParticipantInfo(identity=identity)
        self.join_remotely(self.bob, "leave")
        self.pump()
        # The second one is of another server's user.
        assert f"{self.bob}:DEVICE" not in self.sfu.people[self.room]
        assert f"{self.bob}:8448:DEVICE" in self.sfu.people[self.room]

    def test_while_nobody_can_know_nobody_is_removed(self) -> None:
        self.get_success(
            self.store.store_partial_state_room(
                self.room_id, {self.OTHER_SERVER_NAME}, 1, self.OTHER_SERVER_NAME
            )
        )
        self.store.is_partial_state_room.invalidate((self.room_id,))
        token = self.remote_token(f"@new:{self.OTHER_SERVER_NAME}")
        body = self.get_token_body(f"@new:{self.OTHER_SERVER_NAME}", openid_token=token)
        participant = self.sfu.join(self.assert_jwt(self.post("/get_token", body)))
        self.webhook("participant_joined", participant)
        self.advance_by(31)
        assert participant.identity in self.sfu.people[self.room]


class NoMembershipTests(FollowingTestCase):
    module_config = {"require_room_membership": False}

    def test_only_those_who_leave_are_removed(self) -> None:
        stranger = self.register_user("stranger", "password")
        token = self.ask(stranger, self.login("stranger", "password"))
        self.webhook("participant_joined", self.sfu.join(token))
        self.advance_by(31)
        assert stranger in self.users_there()
        self.join_remotely(stranger, "invite")
        self.join_remotely(self.bob, "leave")
        self.pump()
        assert self.users_there() == {self.alice, self.rita, stranger}


class OwnMetadataTests(FollowingTestCase):
    module_config = {"can_update_own_metadata": True}

    def test_what_was_sealed_when_they_joined_counts(self) -> None:
        for people in list(self.sfu.people.values()):
            for participant in list(people.values()):
                self.webhook("participant_joined", participant, room=self.room_of(participant))
        everybody = [p for people in self.sfu.people.values() for p in people.values()]
        (alice,) = (p for p in everybody if self.owner(p).user_id == self.alice)
        for participant in everybody:
            if participant is not alice:
                participant.attributes["synapse_lk_jwt"] = alice.attributes["synapse_lk_jwt"]
        self.join_remotely(self.bob, "ban")
        self.pump()
        assert self.there() == 2
        self.join_remotely(self.rita, "ban")
        self.pump()
        assert self.there() == 1
