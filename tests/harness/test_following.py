# SPDX-License-Identifier: Apache-2.0
"""Users who left the Matrix room are removed from its calls, and no other users."""

from typing import Any

from livekit.protocol.models import ParticipantInfo
from parameterized import parameterized
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
        # Alice has full access: with her token the module creates the rooms.
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
        self.sfu.join(self.tokens["bob on one device"], duplicate="#duplicate")
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
        return sum(len(present) for present in self.sfu.participants.values())

    def users_there(self) -> set[str]:
        return {
            self.owner(participant).user_id
            for present in self.sfu.participants.values()
            for participant in present.values()
        }

    def room_of(self, participant: ParticipantInfo) -> str:
        room: str
        (room,) = (
            r for r, present in self.sfu.participants.items() if participant.identity in present
        )
        return room

    def owner(self, participant: ParticipantInfo) -> ParticipantOwner:
        owner = OwnerSealer(SECRET).open(participant.attributes, participant.identity)
        assert owner is not None
        return owner


class LeavingTests(FollowingTestCase):
    @parameterized.expand([("leave",), ("ban",)])
    def test_local_user_who_leaves_is_removed_with_all_connections(self, membership: str) -> None:
        assert self.there() == 7
        self.join_remotely(self.bob, membership)
        self.pump()
        assert self.users_there() == {self.alice, self.rita}
        assert self.there() == 2

    def test_local_user_who_joins_and_leaves_again_is_removed_again(self) -> None:
        self.join_remotely(self.bob, "leave")
        self.pump()
        self.join_remotely(self.bob)
        for name, token in self.tokens.items():
            if name.startswith("bob"):
                self.sfu.join(token)
        self.join_remotely(self.bob, "ban")
        self.pump()
        assert self.users_there() == {self.alice, self.rita}
        assert self.there() == 2

    def test_remote_user_who_leaves_is_removed(self) -> None:
        self.join_remotely(self.rita, "leave")
        self.pump()
        assert self.users_there() == {self.alice, self.bob}

    def test_server_acl_that_denies_a_server_removes_its_users(self) -> None:
        self.helper.send_state(
            self.room_id,
            "m.room.server_acl",
            {"allow": ["*"], "deny": [self.OTHER_SERVER_NAME]},
            tok=self.alices_token,
        )
        self.pump()
        assert self.users_there() == {self.alice, self.bob}

    def test_deactivated_user_is_removed(self) -> None:
        handler = self.hs.get_deactivate_account_handler()
        self.get_success(handler.deactivate_account(self.bob, False, create_requester(self.bob)))
        self.pump(0.1)
        assert self.users_there() == {self.alice, self.rita}

    def test_change_of_a_member_who_stays_causes_no_request(self) -> None:
        asked = len(self.sfu.asked)
        self.helper.send(self.room_id, "hello", tok=self.bobs_token)
        self.join_remotely(self.bob)
        self.pump()
        assert len(self.sfu.asked) == asked

    def test_leave_from_room_without_call_causes_no_request(self) -> None:
        room_id = self.helper.create_room_as(self.alice, tok=self.alices_token)
        self.helper.join(room_id, self.bob, tok=self.bobs_token)
        asked = len(self.sfu.asked)
        self.helper.leave(room_id, self.bob, tok=self.bobs_token)
        self.pump()
        assert len(self.sfu.asked) == asked

    def test_last_local_user_who_leaves_ends_the_calls(self) -> None:
        self.join_remotely(self.bob, "leave")
        self.join_remotely(self.alice, "leave")
        self.pump()
        assert self.sfu.participants == {}
        assert self.rows("calls") == []

    def test_webhook_of_banned_user_with_valid_token_removes_the_user(self) -> None:
        self.join_remotely(self.bob, "ban")
        self.pump()
        for name, token in self.tokens.items():
            participant = self.sfu.join(token)
            self.webhook("participant_joined", participant, room=self.room_of(participant))
            self.pump()
            is_there = any(participant.identity in p for p in self.sfu.participants.values())
            assert is_there == (not name.startswith("bob")), name

    def test_poll_removes_banned_and_locked_users_who_joined_without_webhook(self) -> None:
        self.join_remotely(self.bob, "ban")
        self.get_success(self.store.set_user_locked_status(self.alice, True))
        self.pump()
        for token in self.tokens.values():
            self.sfu.join(token)
        self.advance_by(31)
        assert self.users_there() == {self.rita}

    def test_removal_while_the_sfu_is_down_is_retried(self) -> None:
        self.sfu.is_down = True
        self.join_remotely(self.bob, "leave")
        self.advance_by(20)
        assert self.bob in self.users_there()
        self.sfu.is_down = False
        self.advance_by(6)
        assert self.users_there() == {self.alice, self.rita}

    def test_participant_that_livekit_does_not_remove_delays_no_other(self) -> None:
        stuck = f"{self.bob}:DEVICE"
        self.sfu.stuck.add(stuck)
        self.join_remotely(self.bob, "leave")
        self.join_remotely(self.rita, "leave")
        self.pump()
        assert self.users_there() == {self.alice, self.bob}
        assert self.there() == 2
        # Other events of the homeserver cause no more requests.
        asked = len(self.sfu.asked)
        self.helper.send(self.room_id, "hello", tok=self.alices_token)
        self.pump()
        assert len(self.sfu.asked) == asked
        self.sfu.stuck.clear()
        self.advance_by(6)
        assert self.users_there() == {self.alice}

    def test_duplicate_connection_with_nul_in_its_identity_is_removed(self) -> None:
        self.join_remotely(self.bob, "ban")
        self.pump()
        duplicate = self.sfu.join(self.tokens["bob on one device"], duplicate="#\0")
        assert self.webhook("participant_joined", duplicate, room=self.room).code == 200
        self.pump()
        assert self.users_there() == {self.alice, self.rita}

    def test_participant_of_unknown_user_stays(self) -> None:
        stranger = ParticipantInfo(identity="recorder", sid="PA_X")
        self.sfu.participants[self.room]["recorder"] = stranger
        self.webhook("participant_joined", stranger, room=self.room)
        self.join_remotely(self.bob, "leave")
        self.advance_by(31)
        assert "recorder" in self.sfu.participants[self.room]

    def test_participant_with_token_of_lk_jwt_service_is_removed_by_identity(self) -> None:
        for identity in (f"{self.bob}:DEVICE", f"{self.bob}:8448:DEVICE"):
            self.sfu.participants[self.room][identity] = ParticipantInfo(identity=identity)
        self.join_remotely(self.bob, "leave")
        self.pump()
        # The second one is of another server's user.
        assert f"{self.bob}:DEVICE" not in self.sfu.participants[self.room]
        assert f"{self.bob}:8448:DEVICE" in self.sfu.participants[self.room]

    def test_remote_user_in_room_with_partial_state_stays(self) -> None:
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
        assert participant.identity in self.sfu.participants[self.room]


class NoMembershipTests(FollowingTestCase):
    module_config = {"require_room_membership": False}

    def test_only_users_who_leave_are_removed_without_required_membership(self) -> None:
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

    def test_noted_owner_takes_precedence_over_replaced_attributes(self) -> None:
        for present in list(self.sfu.participants.values()):
            for participant in list(present.values()):
                self.webhook("participant_joined", participant, room=self.room_of(participant))
        participants = [p for present in self.sfu.participants.values() for p in present.values()]
        (alice,) = (p for p in participants if self.owner(p).user_id == self.alice)
        for participant in participants:
            if participant is not alice:
                participant.attributes["synapse_lk_jwt"] = alice.attributes["synapse_lk_jwt"]
        self.join_remotely(self.bob, "ban")
        self.pump()
        assert self.there() == 2
        self.join_remotely(self.rita, "ban")
        self.pump()
        assert self.there() == 1
