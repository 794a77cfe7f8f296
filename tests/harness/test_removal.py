# SPDX-License-Identifier: Apache-2.0
"""Removal of participants that try to stay in the call."""

import json
from typing import Any
from unittest.mock import patch

from livekit.protocol.models import ParticipantInfo, Room, TrackInfo
from livekit.protocol.room import ListRoomsResponse
from parameterized import parameterized
from twisted.internet.defer import Deferred

from synapse_lk_jwt import poll_schedule
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.compat.module_database import ModuleDatabase
from synapse_lk_jwt.delegation.tables import DelegationTable
from synapse_lk_jwt.enforcement.participants import ParticipantEnforcer
from synapse_lk_jwt.enforcement.removals import CONCURRENT_CALLS
from synapse_lk_jwt.livekit import listings, tables
from synapse_lk_jwt.livekit.naming import hash_of_identity, livekit_room_name
from synapse_lk_jwt.livekit.participants import Listing
from tests.harness.base import SLOT, claims, protobuf
from tests.harness.test_following import FollowingTestCase


class AttackTestCase(FollowingTestCase):
    def prepare(self, reactor: Any, clock: Any, hs: Any) -> None:
        super().prepare(reactor, clock, hs)
        # The participants of the base class leave.
        for name in self.sfu.participants:
            self.sfu.participants[name] = {}
        self.alices_identity = claims(self.tokens["alice"])["sub"]

    def connect(self, name: str, duplicate: str = "") -> ParticipantInfo:
        participant: ParticipantInfo = self.sfu.join(self.tokens[name], duplicate)
        return participant

    def identities(self) -> list[str]:
        return [i for present in self.sfu.participants.values() for i in present]


class LongIdentityTests(AttackTestCase):
    @parameterized.expand([(321,), (5_000,), (300_000,)])
    def test_poll_removes_identities_that_no_client_has(self, length: int) -> None:
        duplicate = self.connect("bob on one device")
        duplicate.identity = duplicate.identity.ljust(length, "#")
        self.sfu.participants[self.room] = {duplicate.identity: duplicate}
        self.connect("alice")
        self.advance_by(31)
        assert self.identities() == [self.alices_identity]

    def test_poll_identity_of_a_client_stays(self) -> None:
        duplicate = self.connect("bob on one device", "#" + "x" * 60)
        self.advance_by(31)
        assert self.identities() == [duplicate.identity]

    def test_webhook_of_a_long_identity_removes_it(self) -> None:
        duplicate = self.connect("bob on one device", "#" * 5_000)
        assert self.webhook("participant_joined", duplicate, room=self.room).code == 200
        self.pump()
        assert self.identities() == []

    def test_poll_room_of_another_tool_keeps_its_participants(self) -> None:
        self.sfu.participants["recordings"] = {"r" * 1_000: ParticipantInfo(identity="r" * 1_000)}
        self.advance_by(61)
        assert self.identities() == ["r" * 1_000]


class LargeListingTests(AttackTestCase):
    def test_ban_with_megabytes_of_track_names_removes_the_user(self) -> None:
        for name in ("bob on one device", "bob on another"):
            self.connect(name).tracks.extend([TrackInfo(name="n" * 6_000_000)] * 2)
        self.connect("alice")
        self.join_remotely(self.bob, "ban")
        self.pump()
        assert self.identities() == [self.alices_identity]

    def test_ban_with_more_participants_than_a_listing_holds_removes_the_user(self) -> None:
        for number in range(5):
            self.connect("rita", f"#{number}")
        self.connect("bob on one device")
        with patch.object(listings, "MAX_PARTICIPANTS", 3):
            self.join_remotely(self.rita, "ban")
            self.pump()
        assert self.identities() == [f"{self.bob}:DEVICE"]

    def test_ban_from_a_call_that_cannot_be_listed_ends_it(self) -> None:
        for number in range(5):
            self.connect("alice", f"#{number}")
        self.connect("rita")
        with (
            patch.object(listings, "MAX_PARTICIPANTS", 3),
            self.assertLogs("synapse_lk_jwt.enforcement.removals", "WARNING") as logs,
        ):
            self.join_remotely(self.rita, "ban")
            self.pump()
        assert self.room not in self.sfu.participants
        assert "too long to find the users who left" in logs.output[0]

    def test_ban_known_identity_beyond_the_listing_is_removed_by_name(self) -> None:
        self.sfu.participants[self.room] = {
            f"x{n}": ParticipantInfo(identity=f"x{n}", sid="PA_x") for n in range(3)
        }
        self.connect("bob on one device").identity = f"{self.bob}:{self.device_of_bob()}"
        (bob,) = (p for p in self.sfu.participants[self.room].values() if p.identity[0] == "@")
        self.sfu.participants[self.room].pop(f"{self.bob}:DEVICE")
        self.sfu.participants[self.room][bob.identity] = bob
        with patch.object(listings, "MAX_PARTICIPANTS", 3):
            self.join_remotely(self.bob, "ban")
            self.pump()
        assert bob.identity not in self.identities()
        assert self.room in self.sfu.participants

    def device_of_bob(self) -> str:
        (device_id,) = self.get_success(self.store.get_devices_by_user(self.bob))
        assert isinstance(device_id, str)
        return device_id


class SilentParticipantTests(AttackTestCase):
    module_config = {"sanity_check_interval": 0}

    def test_banned_user_without_a_webhook_is_removed_for_as_long_as_tokens_live(self) -> None:
        self.connect("alice")
        self.join_remotely(self.bob, "ban")
        for _ in range(3):
            self.connect("bob on one device")
            self.advance_by(3)
            assert self.identities() == [self.alices_identity]
            self.advance_by(250)

    def test_recheck_after_tokens_have_expired_sends_no_request(self) -> None:
        self.connect("alice")
        self.join_remotely(self.bob, "ban")
        self.advance_by(3_601)
        asked = len(self.sfu.asked)
        self.advance_by(60)
        assert len(self.sfu.asked) == asked

    def test_banned_user_who_connects_with_tokens_of_livekit_is_removed_each_time(self) -> None:
        self.connect("alice")
        self.join_remotely(self.bob, "ban")
        for _ in range(4):
            # At this connection LiveKit sends a token that is valid for ten more minutes.
            self.connect("bob on one device")
            self.advance_by(3)
            assert self.identities() == [self.alices_identity]
            self.advance_by(590)


class SilentParticipantWithShortTokenTests(AttackTestCase):
    module_config = {"sanity_check_interval": 0, "token_lifetime": "60s"}

    def test_banned_user_with_a_token_of_livekit_is_removed_after_the_token_lifetime(self) -> None:
        self.connect("alice")
        self.join_remotely(self.bob, "ban")
        self.advance_by(590)
        self.connect("bob on one device")
        self.advance_by(3)
        assert self.identities() == [self.alices_identity]


class SilentInactiveUserTests(AttackTestCase):
    def test_suspended_user_who_connects_again_is_removed_within_seconds(self) -> None:
        self.connect("alice")
        self.connect("bob on one device")
        self.get_success(self.store.set_user_suspended_status(self.bob, True))
        self.advance_by(31)
        assert self.identities() == [self.alices_identity]
        self.connect("bob on one device")
        self.advance_by(3)
        assert self.identities() == [self.alices_identity]


class UnansweredRemovalTests(AttackTestCase):
    def test_participant_that_leaves_by_itself_meanwhile_is_no_failure(self) -> None:
        self.connect("bob on one device")
        answer = self.sfu._answer

        def leave_first(name: str, data: bytes) -> Any:
            if name == "RemoveParticipant":
                self.sfu.participants[self.room].clear()
                self.sfu.has_nodes = True
                self.sfu.without_node.clear()
                return answer("ListParticipants", b"\x0a\x01x")
            self.sfu.has_nodes = False
            return answer(name, data)

        with (
            patch.object(self.sfu, "_answer", leave_first),
            self.assertNoLogs("synapse_lk_jwt.livekit", "WARNING"),
        ):
            self.join_remotely(self.bob, "leave")
            self.pump()
        assert self.identities() == []


class PostponedTests(AttackTestCase):
    def test_database_error_keeps_the_removals_that_were_postponed(self) -> None:
        self.connect("bob on one device")
        self.connect("rita")
        self.sfu.is_down = True
        self.join_remotely(self.bob, "leave")
        self.advance_by(1)
        error = self.store.database_engine.module.OperationalError("database is away")
        with patch.object(tables.CallTable, "in_rooms", side_effect=error):
            self.advance_by(6)
        self.sfu.is_down = False
        # Only the postponed removal contains it.
        with patch.object(DelegationTable, "tracked", side_effect=error):
            self.advance_by(6)
        assert self.identities() == [next(iter(self.sfu.participants[self.room]))]
        assert self.bob not in self.users_there()


class LostCallTests(AttackTestCase):
    def test_poll_with_one_room_that_fails_polls_the_others(self) -> None:
        other = livekit_room_name(self.room_id, "other")
        self.connect("bob in another slot")
        self.connect("bob on one device")
        self.get_success(self.store.set_user_locked_status(self.bob, True))
        list_participants = ParticipantEnforcer.list_participants

        async def fail_once(enforcer: ParticipantEnforcer, livekit_room: str) -> Listing:
            if livekit_room == other:
                raise ValueError("a bug")
            return await list_participants(enforcer, livekit_room)

        with (
            patch.object(ParticipantEnforcer, "list_participants", fail_once),
            self.assertLogs("synapse_lk_jwt.monitor", "ERROR") as logs,
        ):
            self.advance_by(31)
        # One for each poll, and the first one may be at the start.
        assert len(logs.output) in (1, 2)
        assert all("a bug" in line for line in logs.output)
        assert list(self.sfu.participants[self.room]) == []


class LargeWebhookTests(AttackTestCase):
    def large(self, event: str, participant: ParticipantInfo) -> bytes:
        """As LiveKit writes it, with a varying number of blanks."""
        beginning = {"event": event, "room": {"sid": "RM_x", "name": self.room}}
        body = json.dumps(beginning, separators=(",", ": "))[:-1]
        tracks = [{"name": "n" * 6_000_000}] * 2
        rest = json.dumps({"participant": {"identity": participant.identity, "tracks": tracks}})
        return f"{body}, {rest[1:]}".encode()

    def test_webhook_of_12_megabytes_that_a_banned_user_joined_removes_them(self) -> None:
        self.join_remotely(self.bob, "ban")
        self.pump()
        bob = self.connect("bob on one device")
        assert self.post_webhook(self.large("participant_joined", bob)).code == 200
        self.pump()
        assert self.identities() == []

    def test_webhook_of_12_megabytes_with_another_body_is_rejected(self) -> None:
        body = self.large("participant_left", ParticipantInfo())
        channel = self.post_webhook(body, sha256="another")
        assert channel.code == 401

    def test_webhook_of_12_megabytes_that_a_participant_left_sends_the_leave(self) -> None:
        token = self.ask(self.alice, self.alices_token)
        alice = self.sfu.join(token)
        self.assert_token(self.post("/get_token", self.get_token_body()))
        delay_id = self.delayed()
        assert self.post("/sfu/get", self.sfu_get_body(delay_id=delay_id, delay_timeout=1)).code
        self.webhook("participant_joined", alice, room=self.room)
        self.helper.send_state(
            self.room_id,
            "org.matrix.msc3401.call.member",
            {"in": "the call"},
            tok=self.alices_token,
            state_key=self.key,
        )
        assert self.is_in_call()
        self.sfu.participants[self.room].clear()
        assert self.post_webhook(self.large("participant_left", alice)).code == 200
        self.advance_by(2)
        assert not self.is_in_call()


class ForeignAbortTests(AttackTestCase):
    def test_webhooks_of_a_long_identity_that_broke_off_query_no_other_participant(self) -> None:
        alice = self.connect("alice")
        assert (
            self.post(
                "/get_token", self.get_token_body(delay_id=self.delayed(), delay_timeout=1)
            ).code
            == 200
        )
        self.webhook("participant_joined", alice, room=self.room)
        self.pump()
        self.sfu.asked.clear()
        duplicate = ParticipantInfo(identity=self.alices_identity + "#" * 5_000)
        for event in ("participant_connection_aborted", "participant_left"):
            assert self.webhook(event, duplicate, room=self.room).code == 200
            self.pump()
        assert {name for name, _ in self.sfu.asked} <= {"ListParticipants"}
        table = DelegationTable(ModuleDatabase(Homeserver(self.hs.get_module_api())))
        (delegation,) = self.get_success(table.tracked())
        assert delegation.is_settled


class OwnMetadataTests(AttackTestCase):
    module_config = {"can_update_own_metadata": True}

    @parameterized.expand([("",), ("#duplicate",), ("###",)])
    def test_ban_attributes_replaced_at_join_without_a_webhook_removes_the_user(
        self, duplicate: str
    ) -> None:
        hidden = self.connect("bob, MSC4195", duplicate)
        hidden.attributes["synapse_lk_jwt"] = "x"
        self.join_remotely(self.bob, "ban")
        self.pump()
        assert self.identities() == []

    def test_ban_attributes_replaced_at_join_device_with_signs_removes_the_user(self) -> None:
        body = self.sfu_get_body(
            openid_token=self.openid_token(self.bob, self.bobs_token), device_id="A#B#C"
        )
        hidden = self.sfu.join(self.assert_jwt(self.post("/sfu/get", body)), "#duplicate")
        hidden.attributes["synapse_lk_jwt"] = "x"
        self.join_remotely(self.bob, "ban")
        self.pump()
        assert self.identities() == []

    def test_poll_thousand_duplicate_connections_of_signs_note_few_owners(self) -> None:
        hidden = self.connect("bob, MSC4195")
        for number in range(1_000):
            identity = f"{hidden.identity}#{number}".ljust(320, "#")
            self.sfu.participants[self.room][identity] = ParticipantInfo(
                identity=identity, sid="PA_x"
            )
        with patch.object(tables, "hash_of_identity", wraps=hash_of_identity) as hashed:
            self.advance_by(31)
        # The polls at the start, and half a minute later.
        assert hashed.call_count <= 2 * 2 * 1_001

    def test_issue_more_identities_than_a_client_needs_is_rate_limited(self) -> None:
        with patch.object(tables, "MAX_OWNED", 3):
            for number in range(10):
                body = self.homeserver_body(member_id=f"member {number}")
                channel = self.post_homeserver(body)
                if channel.code != 200:
                    break
        self.assert_error(channel, 429, "M_LIMIT_EXCEEDED")
        # An identity that is noted can have several tokens.
        assert self.post_homeserver(self.homeserver_body(member_id="member 0")).code == 200

    def test_poll_forgets_identities_whose_tokens_have_expired(self) -> None:
        self.connect("bob, MSC4195")
        self.advance_by(2 * 3_600)
        users = {row[2] for row in self.rows("owners")}
        assert users == {self.bob}
        self.sfu.participants.clear()
        self.advance_by(2 * 3_600)
        assert self.rows("owners") == []


class QuietRoomTests(AttackTestCase):
    def listings(self, seconds: float) -> int:
        asked = len(self.sfu.asked)
        self.advance_by(seconds)
        return [name for name, _ in self.sfu.asked[asked:]].count("ListParticipants")

    def test_poll_lists_a_quiet_room_every_five_minutes(self) -> None:
        self.connect("alice")
        self.advance_by(31)
        with patch.object(poll_schedule, "MIN_SWEPT", 0):
            assert self.listings(600) in (2, 3)

    def test_poll_lists_the_few_rooms_of_a_small_server_every_time(self) -> None:
        self.connect("alice")
        self.advance_by(31)
        assert self.listings(300) == 10

    def test_poll_lists_a_room_whose_number_of_participants_changes(self) -> None:
        self.connect("alice")
        self.advance_by(61)
        self.connect("rita")
        assert self.listings(31) == 1

    def test_poll_lists_a_quiet_room_of_a_user_who_was_locked(self) -> None:
        self.connect("alice")
        self.connect("bob on one device")
        self.advance_by(61)
        self.get_success(self.store.set_user_locked_status(self.bob, True))
        self.advance_by(31)
        assert self.identities() == [self.alices_identity]

    def test_poll_lists_the_quiet_calls_of_a_room_that_was_blocked(self) -> None:
        self.connect("alice")
        self.advance_by(61)
        self.get_success(self.store.block_room(self.room_id, self.alice))
        self.advance_by(31)
        assert self.identities() == []

    def test_poll_reads_a_list_of_rooms_above_16_megabytes(self) -> None:
        self.connect("bob on one device")
        self.get_success(self.store.set_user_locked_status(self.bob, True))
        others = [
            Room(name=f"{number:0>43}", metadata="m" * 1_000, num_participants=0)
            for number in range(20_000)
        ]
        answer = self.sfu._answer

        def many(name: str, data: bytes) -> Any:
            said = answer(name, data)
            if name == "ListRooms":
                listed = ListRoomsResponse.FromString(said.body)
                listed.rooms.extend(others)
                return protobuf(listed.SerializeToString())
            return said

        with patch.object(self.sfu, "_answer", many):
            self.advance_by(31)
        assert self.identities() == []


class SlotTests(AttackTestCase):
    def test_leave_of_user_in_several_slots_removes_the_user_from_all(self) -> None:
        for name in ("bob on one device", "bob in another slot", "rita"):
            self.connect(name)
        self.join_remotely(self.bob, "leave")
        self.pump()
        assert self.users_there() == {self.rita}
        assert self.room == livekit_room_name(self.room_id, SLOT)

    def test_leave_from_many_slots_lists_few_of_them_at_a_time(self) -> None:
        self.connect("bob on one device")
        self.get_success(
            self.store.db_pool.simple_insert_many(
                table="synapse_lk_jwt_calls",
                keys=("livekit_room", "room_id", "seen_ts"),
                values=[(f"slot{number}", self.room_id, 0) for number in range(20)],
                desc="test",
            )
        )
        (before,) = self.get_success(
            self.store.db_pool.simple_select_onecol(
                table="synapse_lk_jwt_calls",
                keyvalues={"room_id": self.room_id},
                retcol="COUNT(*)",
                desc="test",
            )
        )
        self.sfu.asked.clear()
        waiting: Deferred[None] = Deferred()
        self.sfu.answers_wait_for = waiting
        self.join_remotely(self.bob, "leave")
        self.pump()
        assert len(self.sfu.asked) == CONCURRENT_CALLS
        self.sfu.answers_wait_for = None
        waiting.callback(None)
        self.pump()
        assert len({room for _, room in self.sfu.asked}) == before
        assert self.users_there() == set()
