# SPDX-License-Identifier: Apache-2.0
"""The rule "may this user be in a call of this Matrix room", written out as tables."""

from typing import Any

from parameterized import parameterized

from synapse_lk_jwt.auth.room_access import RoomAccess, RoomAccessRule
from synapse_lk_jwt.compat.homeserver import Homeserver
from tests.harness.base import ModuleTestCase
from tests.harness.test_following import FollowingTestCase

ALLOWED, UNKNOWN = RoomAccess.ALLOWED, RoomAccess.UNKNOWN
NOT_JOINED, BANNED, INACTIVE = RoomAccess.NOT_JOINED, RoomAccess.BANNED, RoomAccess.INACTIVE

ELSEWHERE = "!elsewhere:other.example.com"
LOCAL, REMOTE = "@bob:test", "@rita:other.example.com"


class RoomAccessTestCase(ModuleTestCase):
    def rule(self, *, required: bool = True, elsewhere: bool = True) -> RoomAccessRule:
        return RoomAccessRule(
            homeserver=Homeserver(self.hs.get_module_api()),
            require_room_membership=required,
            believe_rooms_elsewhere=elsewhere,
        )

    def of_request(self, user_id: str, room_id: str | None = None, **more: Any) -> RoomAccess:
        rule = self.rule(required=more.pop("required", True), elsewhere=more.pop("elsewhere", True))
        access = rule.of_request(user_id, room_id or self.room_id, **more)
        return self.result_of(access)

    def of_participant(self, user_id: str, room_id: str | None = None, **more: Any) -> RoomAccess:
        rule = self.rule(required=more.pop("required", True), elsewhere=more.pop("elsewhere", True))
        return self.result_of(rule.of_participant(user_id, room_id or self.room_id, **more))

    def result_of(self, access: Any) -> RoomAccess:
        result = self.get_success(access)
        assert isinstance(result, RoomAccess)
        return result

    def set_membership(self, user_id: str, membership: str | None) -> None:
        """Gives a user a membership of the room, as a real server would, by way of a join."""
        if user_id == LOCAL:
            self.register_user("bob", "password")
        if membership is not None:
            if membership != "invite":
                self.join_remotely(user_id)
            if membership != "join":
                self.join_remotely(user_id, membership)

    def set_acl(self) -> None:
        self.helper.send_state(
            self.room_id,
            "m.room.server_acl",
            {"allow": ["*"], "deny": [self.OTHER_SERVER_NAME]},
            tok=self.alices_token,
        )

    def set_partial_state(self) -> None:
        self.get_success(
            self.store.store_partial_state_room(
                self.room_id, {self.OTHER_SERVER_NAME}, 1, self.OTHER_SERVER_NAME
            )
        )
        self.store.is_partial_state_room.invalidate((self.room_id,))


MEMBERSHIPS = [
    (user_id, membership, access)
    for user_id in (LOCAL, REMOTE)
    for membership, access in (
        (None, NOT_JOINED),
        ("join", ALLOWED),
        ("invite", NOT_JOINED),
        ("leave", NOT_JOINED),
        ("ban", BANNED),
    )
]


class MembershipTests(RoomAccessTestCase):
    @parameterized.expand(MEMBERSHIPS)
    def test_request_with_membership_gets_access(
        self, user_id: str, membership: str | None, access: RoomAccess
    ) -> None:
        self.set_membership(user_id, membership)
        assert self.of_request(user_id) is access
        assert self.of_request(user_id, strict=True, required=False) is access

    @parameterized.expand(MEMBERSHIPS)
    def test_participant_with_membership_gets_the_same_access_as_a_request(
        self, user_id: str, membership: str | None, access: RoomAccess
    ) -> None:
        self.set_membership(user_id, membership)
        assert self.of_participant(user_id) is access
        assert self.of_participant(user_id, is_issued_here=False) is access
        assert self.of_participant(user_id, has_membership_changed=True) is access

    @parameterized.expand([(None,), ("join",), ("invite",), ("leave",), ("ban",)])
    def test_request_without_required_membership_is_allowed(self, membership: str | None) -> None:
        self.set_membership(REMOTE, membership)
        assert self.of_request(REMOTE, required=False) is ALLOWED

    @parameterized.expand(
        (membership, access, is_issued_here)
        for membership, access in (
            (None, NOT_JOINED),
            ("join", ALLOWED),
            ("invite", ALLOWED),
            ("leave", NOT_JOINED),
            ("ban", BANNED),
        )
        for is_issued_here in (True, False)
    )
    def test_participant_without_required_membership_who_left_is_refused(
        self, membership: str | None, access: RoomAccess, is_issued_here: bool
    ) -> None:
        self.set_membership(REMOTE, membership)
        more: dict[str, Any] = {"required": False, "is_issued_here": is_issued_here}
        assert self.of_participant(REMOTE, **more) is ALLOWED
        assert self.of_participant(REMOTE, has_membership_changed=True, **more) is access


class ShutOutTests(RoomAccessTestCase):
    def test_request_from_server_that_acl_denies_is_banned(self) -> None:
        self.set_membership(REMOTE, "join")
        self.set_acl()
        assert self.of_request(REMOTE) is BANNED
        assert self.of_participant(REMOTE, is_issued_here=False) is BANNED

    def test_request_for_blocked_room_is_banned(self) -> None:
        self.set_membership(REMOTE, "join")
        self.get_success(self.store.block_room(self.room_id, self.alice))
        assert self.of_request(self.alice) is BANNED
        assert self.of_request(REMOTE) is BANNED

    def test_participant_with_token_of_another_homeserver_stays_in_blocked_room(self) -> None:
        self.set_membership(REMOTE, "join")
        self.get_success(self.store.block_room(self.room_id, self.alice))
        assert self.of_participant(REMOTE, is_issued_here=False) is ALLOWED
        assert self.of_participant(self.alice, is_issued_here=False) is BANNED

    def test_participant_with_locked_account_is_inactive(self) -> None:
        self.get_success(self.store.set_user_locked_status(self.alice, True))
        assert self.of_participant(self.alice) is INACTIVE


class ElsewhereTests(RoomAccessTestCase):
    @parameterized.expand(
        [
            ({"required": True}, UNKNOWN),
            ({"required": True, "strict": True}, NOT_JOINED),
            ({"required": True, "elsewhere": False}, NOT_JOINED),
            ({"required": False}, UNKNOWN),
            ({"required": False, "elsewhere": False}, NOT_JOINED),
        ]
    )
    def test_request_of_remote_user_for_room_elsewhere_follows_the_options(
        self, more: dict[str, bool], access: RoomAccess
    ) -> None:
        assert self.of_request(REMOTE, ELSEWHERE, **more) is access

    def test_request_of_local_user_for_room_elsewhere_is_not_joined(self) -> None:
        assert self.of_request(self.alice, ELSEWHERE) is NOT_JOINED

    def test_participant_with_token_of_another_homeserver_elsewhere_is_unknown(self) -> None:
        more = {"elsewhere": False, "is_issued_here": False}
        assert self.of_participant(REMOTE, ELSEWHERE, **more) is UNKNOWN


class PartialStateTests(RoomAccessTestCase):
    @parameterized.expand(
        [
            (None, UNKNOWN),
            ("join", ALLOWED),
            ("invite", UNKNOWN),
            ("leave", NOT_JOINED),
            ("ban", BANNED),
        ]
    )
    def test_request_of_remote_user_with_partial_state_follows_the_known_membership(
        self, membership: str | None, access: RoomAccess
    ) -> None:
        self.set_membership(REMOTE, membership)
        self.set_partial_state()
        assert self.of_request(REMOTE) is access

    def test_request_of_local_user_with_partial_state_is_not_joined(self) -> None:
        self.set_membership(LOCAL, None)
        self.set_partial_state()
        assert self.of_request(LOCAL) is NOT_JOINED


class InvitedAgainTests(FollowingTestCase):
    """The poll is off: only the membership change removes the user."""

    module_config = {"sanity_check_interval": 0}

    @parameterized.expand([("invite",), ("knock",)])
    def test_user_who_left_and_is_invited_again_is_removed_at_once(self, membership: str) -> None:
        self.join_remotely(self.rita, "leave")
        self.join_remotely(self.rita, membership)
        self.pump()
        assert self.users_there() == {self.alice, self.bob}

    def test_user_who_is_invited_and_in_the_call_is_removed_at_once(self) -> None:
        token = self.tokens["rita"]
        self.join_remotely(self.rita, "leave")
        self.join_remotely(self.rita, "invite")
        self.pump()
        self.sfu.join(token)
        self.join_remotely(self.rita, "invite")
        self.pump()
        assert self.users_there() == {self.alice, self.bob}
