# SPDX-License-Identifier: Apache-2.0
"""Guests who registered with Synapse, on each endpoint that Synapse lets them reach."""

import json
from typing import Any

from parameterized import parameterized
from synapse.api.errors import Codes

from synapse_lk_jwt.livekit.tokens import MUST_NOT_CREATE
from tests.harness.base import response
from tests.harness.test_delegating import HOUR_MS, MEMBER, DelegationTestCase
from tests.harness.test_discovery import STABLE, UNSTABLE
from tests.harness.test_homeserver import JWT


class GuestTests(DelegationTestCase):
    module_config = {"full_access_homeservers": "*"}

    def default_config(self) -> dict[str, Any]:
        return {**super().default_config(), "allow_guest_access": True}

    def prepare(self, reactor: Any, clock: Any, hs: Any) -> None:
        super().prepare(reactor, clock, hs)
        channel = self.make_request("POST", "/_matrix/client/v3/register?kind=guest", {})
        assert channel.code == 200, channel.result
        self.guest = channel.json_body["user_id"]
        self.guests_token = channel.json_body["access_token"]
        for kind, content in (
            ("m.room.guest_access", {"guest_access": "can_join"}),
            ("m.room.power_levels", {"users": {self.alice: 100}, "events": {MEMBER: 0}}),
        ):
            self.helper.send_state(self.room_id, kind, content, tok=self.alices_token)

    def join(self) -> None:
        self.helper.join(self.room_id, self.guest, tok=self.guests_token)

    def test_stable_transports_are_served_to_guest(self) -> None:
        channel = self.make_request("GET", STABLE, access_token=self.guests_token)
        assert channel.code == 200, channel.result

    def test_unstable_transports_are_refused_to_guest_by_synapse(self) -> None:
        channel = self.make_request("GET", UNSTABLE, access_token=self.guests_token)
        self.assert_error(channel, 403, Codes.GUEST_ACCESS_FORBIDDEN)

    def test_openid_token_is_refused_to_guest_by_synapse(self) -> None:
        path = f"/_matrix/client/v3/user/{self.guest}/openid/request_token"
        channel = self.make_request("POST", path, {}, access_token=self.guests_token)
        self.assert_error(channel, 403, Codes.GUEST_ACCESS_FORBIDDEN)

    def test_client_get_token_of_guest_outside_the_room_is_rejected_with_403(self) -> None:
        channel = self.post_homeserver(self.homeserver_body(), self.guests_token)
        self.assert_error(channel, 403, Codes.FORBIDDEN)

    @parameterized.expand(["v1", "unstable/io.element.msc4195"])
    def test_client_get_token_of_guest_issues_restricted_token_that_can_publish(
        self, prefix: str
    ) -> None:
        self.join()
        channel = self.post_homeserver(self.homeserver_body(), self.guests_token, prefix)
        claims = self.assert_token(channel)
        assert claims["roomPreset"] == MUST_NOT_CREATE
        assert claims["video"]["canPublish"] is True
        assert self.sfu.requests == []

    def test_client_get_token_of_guest_for_another_server_is_requested_there(self) -> None:
        self.join()
        self.join_remotely(self.rita)
        self.others.always(response(200, json.dumps({"jwt": JWT}).encode()))
        body = self.homeserver_body(server_name=self.OTHER_SERVER_NAME, url="wss://other")
        assert self.post_homeserver(body, self.guests_token).code == 200
        ((_, _, request),) = self.others.requests
        assert request["user_id"] == self.guest

    @parameterized.expand(["v1", "unstable/io.element.msc4195"])
    def test_client_delegate_of_guest_delegates_the_leave_without_creating_a_call(
        self, prefix: str
    ) -> None:
        self.join()
        key = f"_{self.guest}_DEVICE"
        self.helper.send_state(
            self.room_id, MEMBER, {"in": "the call"}, tok=self.guests_token, state_key=key
        )
        delay_id = self.delayed(key=key, token=self.guests_token)
        body = self.homeserver_body(delay_id=delay_id, delay_timeout=HOUR_MS)
        channel = self.delegate_homeserver(body, self.guests_token, prefix)
        assert channel.code == 200, channel.result
        assert self.sfu.requests == []
