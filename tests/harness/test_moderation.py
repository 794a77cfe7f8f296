# SPDX-License-Identifier: Apache-2.0
"""Decisions of moderators and admins take effect in calls."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from parameterized import parameterized
from synapse.api.errors import Codes
from synapse.types import UserID

from synapse_lk_jwt.compat.rate_limits import RateLimits
from synapse_lk_jwt.poll_schedule import SWEEP_MS
from tests.harness.base import SLOT, URL, ModuleTestCase
from tests.harness.test_delegating import DelegationTestCase

ELSEWHERE = "!elsewhere:other.example.com"

# After this time the poll has listed each room once more.
SWEEP_SEC = SWEEP_MS // 1000 + 60


class ModerationTestCase(ModuleTestCase):
    def ask_as_local_user(self) -> list[tuple[str, Callable[[], Any]]]:
        """The requests of a local user for a token, one for each endpoint."""
        token = self.openid_token()
        return [
            ("sfu_get", lambda: self.post("/sfu/get", self.sfu_get_body(openid_token=token))),
            ("get_token", lambda: self.post("/get_token", self.get_token_body(openid_token=token))),
            ("client", lambda: self.post_homeserver(self.homeserver_body())),
            (
                "client, SFU of another server",
                lambda: self.post_homeserver(
                    self.homeserver_body(server_name=self.OTHER_SERVER_NAME)
                ),
            ),
        ]

    def ask_as_remote_user(self, room_id: str) -> list[tuple[str, Callable[[], Any]]]:
        """The requests of a remote user for a token, one for each endpoint."""
        token = self.remote_token(self.rita)
        return [
            (
                "sfu_get",
                lambda: self.post("/sfu/get", self.sfu_get_body(openid_token=token, room=room_id)),
            ),
            (
                "get_token",
                lambda: self.post(
                    "/get_token",
                    self.get_token_body(self.rita, openid_token=token, room_id=room_id),
                ),
            ),
            (
                "federation",
                lambda: self.post_federation(
                    self.homeserver_body(user_id=self.rita, room_id=room_id)
                ),
            ),
        ]

    def assert_all_forbidden(self, ways: list[tuple[str, Callable[[], Any]]]) -> None:
        for way, ask in ways:
            channel = ask()
            seen = (channel.code, channel.json_body.get("errcode"))
            assert seen == (403, Codes.FORBIDDEN), (way, channel.result)

    def block(self, room_id: str) -> None:
        self.get_success(self.store.block_room(room_id, "@admin:test"))

    def set_partial_state(self) -> None:
        self.get_success(
            self.store.store_partial_state_room(
                self.room_id, {self.OTHER_SERVER_NAME}, 1, self.OTHER_SERVER_NAME
            )
        )
        self.store.is_partial_state_room.invalidate((self.room_id,))


class BlockedRoomTests(ModerationTestCase):
    module_config = {"full_access_homeservers": "*"}

    def test_token_for_member_of_blocked_room_is_refused(self) -> None:
        self.join_remotely(self.rita)
        self.block(self.room_id)
        self.assert_all_forbidden(self.ask_as_local_user())
        self.assert_all_forbidden(self.ask_as_remote_user(self.room_id))
        assert self.sfu.requests == []

    def test_token_for_blocked_room_elsewhere_is_refused(self) -> None:
        self.block(ELSEWHERE)
        self.assert_all_forbidden(self.ask_as_remote_user(ELSEWHERE))
        assert self.sfu.requests == []

    def test_token_for_unblocked_room_is_issued_at_once(self) -> None:
        self.block(self.room_id)
        self.assert_all_forbidden(self.ask_as_local_user())
        self.get_success(self.store.unblock_room(self.room_id))
        self.assert_token(self.post("/sfu/get", self.sfu_get_body()))


class BlockedRoomWithoutMembershipTests(ModerationTestCase):
    module_config = {"require_room_membership": False}

    def test_token_without_required_membership_for_blocked_room_is_refused(self) -> None:
        self.block(self.room_id)
        self.assert_all_forbidden(self.ask_as_local_user())


class BlockedCallTests(DelegationTestCase):
    module_config = {"full_access_homeservers": "*"}

    def test_participants_in_room_that_is_blocked_are_removed(self) -> None:
        self.join_remotely(self.rita)
        rita_asks = self.sfu_get_body(openid_token=self.remote_token(self.rita))
        for body in (self.sfu_get_body(), rita_asks):
            self.sfu.join(self.post("/sfu/get", body).json_body["jwt"])
        (present,) = self.sfu.participants.values()
        assert len(present) == 2
        self.get_success(self.store.block_room(self.room_id, "@admin:test"))
        self.advance_by(SWEEP_SEC)
        assert not present

    def test_remote_participant_in_room_elsewhere_that_is_blocked_is_removed(self) -> None:
        body = self.sfu_get_body(openid_token=self.remote_token(self.rita), room=ELSEWHERE)
        self.sfu.join(self.post("/sfu/get", body).json_body["jwt"])
        (present,) = self.sfu.participants.values()
        self.advance_by(60)
        assert len(present) == 1
        self.get_success(self.store.block_room(ELSEWHERE, "@admin:test"))
        self.advance_by(SWEEP_SEC)
        assert not present


class PartialStateTests(ModerationTestCase):
    @parameterized.expand(["leave", "ban"])
    def test_token_for_remote_user_known_to_have_left_is_refused(self, membership: str) -> None:
        self.join_remotely(self.rita)
        self.join_remotely(self.rita, membership)
        self.set_partial_state()
        self.assert_all_forbidden(self.ask_as_remote_user(self.room_id))

    @parameterized.expand([None, "invite", "join"])
    def test_token_for_remote_user_who_may_be_joined_is_issued(
        self, membership: str | None
    ) -> None:
        if membership is not None:
            self.join_remotely(self.rita, membership)
        self.set_partial_state()
        for _, ask in self.ask_as_remote_user(self.room_id):
            self.assert_token(ask())


class RoomsElsewhereTests(ModerationTestCase):
    module_config = {"rooms_elsewhere": "refuse"}

    def test_token_for_remote_user_in_room_elsewhere_is_refused(self) -> None:
        self.assert_all_forbidden(self.ask_as_remote_user(ELSEWHERE))

    def test_token_for_remote_member_of_room_here_is_issued(self) -> None:
        self.join_remotely(self.rita)
        for _, ask in self.ask_as_remote_user(self.room_id):
            self.assert_token(ask())


class RoomsElsewhereWithoutMembershipTests(ModerationTestCase):
    module_config = {"rooms_elsewhere": "refuse", "require_room_membership": False}

    def test_token_without_required_membership_in_room_elsewhere_is_refused(self) -> None:
        body = self.sfu_get_body(room=ELSEWHERE)
        self.assert_error(self.post("/sfu/get", body), 403, Codes.FORBIDDEN)
        body = self.sfu_get_body(openid_token=self.remote_token(self.rita), room=ELSEWHERE)
        self.assert_error(self.post("/sfu/get", body), 403, Codes.FORBIDDEN)

    def test_token_without_required_membership_in_room_here_is_issued(self) -> None:
        body = self.sfu_get_body(openid_token=self.remote_token(self.rita))
        self.assert_token(self.post("/sfu/get", body))


class AccountValidityTests(ModerationTestCase):
    def default_config(self) -> dict[str, Any]:
        validity = {"enabled": True, "period": "6w"}
        return {**super().default_config(), "account_validity": validity}

    def test_endpoints_with_expired_user_reject_the_request(self) -> None:
        ways = self.ask_as_local_user()
        self.get_success(self.store.set_account_validity_for_user(self.alice, 0, email_sent=False))
        for way, ask in ways:
            channel = ask()
            if way.startswith("client"):
                # Synapse itself rejects the access token.
                self.assert_error(channel, 403, Codes.EXPIRED_ACCOUNT)
            else:
                self.assert_error(channel, 401, Codes.UNAUTHORIZED)

    def test_token_for_expired_user_of_application_service_is_issued(self) -> None:
        user_id = "@bridged:test"
        self.get_success(self.store.register_user(user_id, appservice_id="bridge"))
        self.get_success(self.store.set_account_validity_for_user(user_id, 0, email_sent=False))
        self.join_remotely(user_id)
        self.get_success(self.store.insert_open_id_token("bridged", 2**52, user_id))
        token = {"access_token": "bridged", "matrix_server_name": "test"}
        self.assert_token(self.post("/sfu/get", self.sfu_get_body(openid_token=token)))


class AccountValidityModuleTests(ModerationTestCase):
    def test_token_for_user_expired_by_a_module_is_refused(self) -> None:
        token = self.openid_token()
        expired = {self.alice}

        async def is_user_expired(user_id: str) -> bool | None:
            return user_id in expired

        self.hs.get_module_api().register_account_validity_callbacks(
            is_user_expired=is_user_expired
        )
        body = self.sfu_get_body(openid_token=token)
        self.assert_error(self.post("/sfu/get", body), 401, Codes.UNAUTHORIZED)
        expired.clear()
        self.assert_token(self.post("/sfu/get", body))


class DisabledHomeserverTests(ModerationTestCase):
    def assert_limited(self, limit_type: str) -> None:
        for way, ask in self.ask_as_local_user():
            channel = ask()
            assert channel.code == 403, (way, channel.result)
            said = (channel.json_body["errcode"], channel.json_body["limit_type"])
            assert said == (Codes.RESOURCE_LIMIT_EXCEEDED, limit_type), way

    def test_endpoints_of_disabled_homeserver_reject_local_users(self) -> None:
        ways = self.ask_as_remote_user(ELSEWHERE)[:2]
        self.hs.config.server.hs_disabled = True
        self.hs.get_auth_blocking()._hs_disabled = True
        self.assert_limited("hs_disabled")
        # Users of other servers are served, as Synapse itself still serves federation.
        self.remote_token(self.rita)
        for _, ask in ways:
            self.assert_token(ask())

    def test_endpoints_with_user_beyond_the_limit_of_active_users_reject_the_request(self) -> None:
        self.hs.config.server.limit_usage_by_mau = True
        blocking = self.hs.get_auth_blocking()
        blocking._limit_usage_by_mau = True
        blocking._max_mau_value = 0
        self.assert_limited("monthly_active_user")

    def test_token_of_disabled_homeserver_for_user_of_application_service_is_issued(self) -> None:
        user_id = "@bridged:test"
        self.get_success(self.store.register_user(user_id, appservice_id="bridge"))
        self.join_remotely(user_id)
        self.get_success(self.store.insert_open_id_token("bridged", 2**52, user_id))
        token = {"access_token": "bridged", "matrix_server_name": "test"}
        self.hs.config.server.hs_disabled = True
        self.hs.get_auth_blocking()._hs_disabled = True

        class Bridge:
            id = "bridge"

            def is_rate_limited(self) -> bool:
                return True

        with (
            patch.object(self.store, "get_app_service_by_id", return_value=Bridge()),
            patch.object(RateLimits, "is_exempt", return_value=True),
        ):
            body = self.sfu_get_body(openid_token=token)
            self.assert_token(self.post("/sfu/get", body))


class StandingTests(ModerationTestCase):
    module_config = {"full_access_homeservers": "*"}

    def local_tokens(self) -> list[dict[str, Any]]:
        return [self.assert_token(ask()) for way, ask in self.ask_as_local_user()[:3]]

    def test_registered_user_has_full_access(self) -> None:
        for token in self.local_tokens():
            assert token["video"]["canPublish"] is True
        assert self.sfu.requests != []

    def test_shadow_banned_user_is_restricted_and_cannot_publish(self) -> None:
        self.get_success(self.store.set_shadow_banned(UserID.from_string(self.alice), True))
        for token in self.local_tokens():
            video = token["video"]
            assert (video["canPublish"], video["canPublishData"]) == (False, False)
            assert video["canSubscribe"] is True
        assert self.sfu.requests == []
        self.get_success(self.store.set_shadow_banned(UserID.from_string(self.alice), False))
        for token in self.local_tokens():
            assert token["video"]["canPublish"] is True

    def test_guest_is_restricted_and_can_publish(self) -> None:
        guest = "@guest:test"
        self.get_success(self.store.register_user(guest, make_guest=True))
        self.get_success(self.store.add_access_token_to_user(guest, "guest_token", None, None))
        self.get_success(self.store.insert_open_id_token("guests", 2**52, guest))
        self.join_remotely(guest)
        token = {"access_token": "guests", "matrix_server_name": "test"}
        for channel in (
            self.post("/sfu/get", self.sfu_get_body(openid_token=token)),
            self.post("/get_token", self.get_token_body(guest, openid_token=token)),
            self.make_request(
                "POST",
                "/_matrix/client/v1/rtc/livekit/get_token",
                {"url": URL, "room_id": self.room_id, "slot_id": SLOT, "member_id": "m"},
                access_token="guest_token",
            ),
        ):
            assert self.assert_token(channel)["video"]["canPublish"] is True
        assert self.sfu.requests == []
