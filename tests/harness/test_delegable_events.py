# SPDX-License-Identifier: Apache-2.0
"""Which events can be delegated, how they are sent, and how often."""

import json
import logging
from typing import Any
from unittest.mock import AsyncMock, patch

from livekit.protocol.models import ParticipantInfo
from parameterized import parameterized
from synapse.api.errors import Codes, SynapseError
from synapse.module_api import make_deferred_yieldable
from twisted.internet.defer import Deferred, succeed

from synapse_lk_jwt.compat.events import Events
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.compat.module_database import ModuleDatabase
from synapse_lk_jwt.delegation import creation
from synapse_lk_jwt.delegation import tables as delegation_tables
from synapse_lk_jwt.delegation.sender import LeaveSender, SendLeave
from synapse_lk_jwt.delegation.service import DelegationService
from synapse_lk_jwt.delegation.state_machine import MAX_IDENTITIES
from synapse_lk_jwt.delegation.tables import DelegationTable
from synapse_lk_jwt.livekit.tables import MAX_SLOTS, SLOTS_RETRY_AFTER_MS, CallTable
from tests.harness.base import SLOT
from tests.harness.test_delegating import HOUR_MS, MEMBER, DelegationTestCase, Died

RTC_MEMBER = "org.matrix.msc4143.rtc.member"
ENCRYPTED = "m.room.encrypted"
OTHER_TYPES = (
    "m.room.message",
    "m.sticker",
    "m.reaction",
    "org.matrix.msc4075.rtc.notification",
    "org.matrix.msc4075.call.notify",
    "org.matrix.msc3381.poll.start",
    "org.example.custom",
)


class EventsTestCase(DelegationTestCase):
    def default_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().default_config()
        config["experimental_features"] = {"msc4354_enabled": True}
        return config

    def schedule(
        self, event_type: str, content: Any, sticky: bool = False, room_id: str | None = None
    ) -> str:
        """Schedules a message event and returns its delay ID."""
        self._transaction = getattr(self, "_transaction", 0) + 1
        path = f"rooms/{room_id or self.room_id}/send/{event_type}/{self._transaction}"
        query = f"?org.matrix.msc4140.delay={HOUR_MS}"
        query += "&org.matrix.msc4354.sticky_duration_ms=3600000" * sticky
        channel = self.make_request("PUT", path + query, content, access_token=self.alices_token)
        assert channel.code == 200, channel.result
        delay_id: str = channel.json_body["delay_id"]
        return delay_id

    def send_now(self, event_type: str, content: Any) -> None:
        self.helper.send_event(self.room_id, event_type, content, tok=self.alices_token)

    def delegate_of(self, delay_id: str, member: str = "member", **more: Any) -> Any:
        """Delegates an event of a member: all members follow identity A of the device, too."""
        ids = {"id": member, "claimed_user_id": self.alice, "claimed_device_id": "DEVICE"}
        return self.delegate(delay_id, member=ids, **more)

    def call(self) -> ParticipantInfo:
        """Joins the call."""
        body = self.sfu_get_body()
        jwt = self.post("/sfu/get", body).json_body["jwt"]
        participant: ParticipantInfo = self.sfu.join(jwt)
        return participant

    def suspend(self) -> None:
        self.get_success(self.store.set_user_suspended_status(self.alice, True))

    def contents(self, event_type: str) -> list[Any]:
        """The contents of all events of that type in the database, in order."""
        rows = self.get_success(
            self.store.db_pool.execute(
                "contents",
                "SELECT json FROM event_json JOIN events USING (event_id) WHERE type = ?"
                " ORDER BY stream_ordering",
                event_type,
            )
        )
        return [json.loads(row[0])["content"] for row in rows]


class AllowListTests(EventsTestCase):
    def test_suspended_user_with_twenty_prepared_events_sends_none(self) -> None:
        alice = self.call()
        for number in range(20):
            event_type = OTHER_TYPES[number % len(OTHER_TYPES)]
            delay_id = self.schedule(event_type, {"body": "x", "msgtype": "m.text"})
            self.assert_error(
                self.delegate_of(delay_id, f"member{number}"), 400, Codes.INVALID_PARAM
            )
        self.advance_by(3)
        self.suspend()
        self.leaves(alice)
        self.advance_by(35)
        assert [self.contents(event_type) for event_type in OTHER_TYPES] == [[]] * len(OTHER_TYPES)

    @parameterized.expand([("m.room.message",), ("m.sticker",)])
    def test_sixty_prepared_messages_are_not_sent_when_the_participant_leaves(
        self, event_type: str
    ) -> None:
        alice = self.call()
        for number in range(60):
            delay_id = self.schedule(event_type, {"body": str(number), "msgtype": "m.text"})
            self.delegate_of(delay_id, f"member{number}")
        self.advance_by(3)
        self.leaves(alice)
        self.advance_by(5)
        assert self.contents(event_type) == []

    def test_membership_with_the_content_of_a_join_is_refused(self) -> None:
        content = {"application": "m.call", "msc4354_sticky_key": "k"}
        delay_id = self.schedule(RTC_MEMBER, content)
        self.assert_error(self.delegate_of(delay_id), 400, Codes.INVALID_PARAM)
        body = self.get_token_body(delay_id=delay_id, delay_timeout=HOUR_MS)
        self.assert_token(self.post("/get_token", body))
        assert self.rows() == []

    def test_suspended_user_genuine_state_leave_is_sent(self) -> None:
        alice = self.call()
        assert self.delegate_of(self.delayed()).code == 200
        self.advance_by(3)
        self.suspend()
        self.leaves(alice)
        assert not self.get_success(self._membership())

    async def _membership(self) -> Any:
        state = await self.hs.get_storage_controllers().state.get_current_state_event(
            self.room_id, MEMBER, self.key
        )
        return state.content

    @parameterized.expand([(True,), (False,)])
    def test_suspended_user_genuine_sticky_leave_is_sent(self, has_slot: bool) -> None:
        content = {"msc4354_sticky_key": "k", **({"slot_id": SLOT} if has_slot else {})}
        alice = self.call()
        delay_id = self.schedule(RTC_MEMBER, content, sticky=True)
        assert self.delegate_of(delay_id).code == 200
        self.advance_by(3)
        self.suspend()
        self.leaves(alice)
        assert self.contents(RTC_MEMBER) == [content]

    def test_delegations_beyond_the_users_limit_are_refused(self) -> None:
        with patch.object(creation, "MAX_DELEGATIONS", 3):
            codes = [
                self.delegate_of(self.delayed(key=f"_{number}"), f"member{number}").code
                for number in range(4)
            ]
            assert codes == [200, 200, 200, 400]
            # A delegation that replaces an older one does not count.
            assert self.delegate_of(self.delayed(key="_0"), "another").code == 200
        assert len(self.rows()) == 3


class AlreadySentTests(EventsTestCase):
    LAPTOP, PHONE = {"msc4354_sticky_key": "laptop"}, {"msc4354_sticky_key": "phone"}

    def lose(self, content: Any) -> None:
        """A participant leaves, and the first attempt to send the leave fails."""
        alice = self.call()
        assert self.delegate_of(self.schedule(RTC_MEMBER, content, sticky=True)).code == 200
        self.advance_by(3)
        with (
            patch.object(Events, "send", side_effect=SynapseError(500, "no luck")),
            self.assertLogs("synapse_lk_jwt", logging.WARNING),
        ):
            self.leaves(alice)
        assert self.contents(RTC_MEMBER) == []

    def test_sticky_leave_is_sent_though_another_device_has_refreshed_its_membership(self) -> None:
        self.lose(self.LAPTOP)
        refreshed = {**self.PHONE, "application": {"type": "m.call"}}
        self.send_now(RTC_MEMBER, refreshed)
        self.advance_by(12)
        assert self.contents(RTC_MEMBER) == [refreshed, self.LAPTOP]
        assert self.rows() == []

    @parameterized.expand([("msc4354_sticky_key",), ("sticky_key",)])
    def test_sticky_leave_is_not_sent_into_a_newer_membership(self, name: str) -> None:
        self.lose(self.LAPTOP)
        newer = {name: "laptop", "application": {"type": "m.call"}}
        self.send_now(RTC_MEMBER, newer)
        self.advance_by(12)
        assert self.contents(RTC_MEMBER) == [newer]
        assert self.rows() == []

    def test_leave_without_a_sticky_key_is_recognised_by_its_content(self) -> None:
        self.lose({"slot_id": "one"})
        self.send_now(RTC_MEMBER, {"slot_id": "other"})
        self.advance_by(12)
        assert self.contents(RTC_MEMBER) == [{"slot_id": "other"}, {"slot_id": "one"}]

    def test_older_sticky_leave_with_the_same_sticky_key_is_cancelled(self) -> None:
        older, newer = (self.schedule(RTC_MEMBER, self.LAPTOP, sticky=True) for _ in range(2))
        phone = self.schedule(RTC_MEMBER, self.PHONE, sticky=True)
        for delay_id, member in ((older, "one"), (phone, "two"), (newer, "three")):
            assert self.delegate_of(delay_id, member).code == 200
        assert sorted(row[0] for row in self.rows()) == sorted([newer, phone])
        assert sorted(self.pending()) == sorted([newer, phone])

    def test_state_leave_does_not_cancel_a_sticky_one(self) -> None:
        sticky = self.schedule(MEMBER, {}, sticky=True)
        state = self.delayed()
        assert self.delegate_of(sticky, "one").code == 200
        assert self.delegate_of(state, "two").code == 200
        assert sorted(self.pending()) == sorted([sticky, state])


class SentOnceTests(EventsTestCase):
    def test_leave_found_unsent_just_before_it_was_sent_is_not_sent_again(self) -> None:
        alice = self.call()
        assert self.delegate_of(self.delayed()).code == 200
        self.advance_by(3)
        noted: Deferred[None] = Deferred()
        write, run_tasks = ModuleDatabase.write, DelegationService.run_tasks
        sending: list[tuple[DelegationService, SendLeave]] = []

        async def when_noted(database: ModuleDatabase, *args: Any) -> Any:
            if sent.called:
                await make_deferred_yieldable(noted)
            return await write(database, *args)

        def run(service: DelegationService, tasks: Any) -> None:
            sending.extend((service, task) for task in tasks if isinstance(task, SendLeave))
            run_tasks(service, tasks)

        with (
            patch.object(ModuleDatabase, "write", when_noted),
            patch.object(DelegationService, "run_tasks", run),
            patch.object(Events, "send", wraps=succeed) as sent,
        ):
            self.leaves(alice)
            # The clock has read the delegation just before.
            ((service, task),) = sending
            service.run_tasks([task])
            self.pump()
            noted.callback(None)
            self.pump()
            assert sent.call_count == 1
        assert self.rows() == []

    def test_leave_that_waits_too_long_on_a_worker_is_sent_by_the_clock_alone(self) -> None:
        worker = Homeserver(self.hs.get_module_api())
        worker.runs_background_tasks = False
        database = ModuleDatabase(worker)
        rooms = AsyncMock(**{"get_participant.return_value": None})
        service = DelegationService(
            worker, database, DelegationTable(database), CallTable(database), rooms
        )
        self.call()
        room = self.sfu.requests[-1][1].name
        there = ParticipantInfo(identity=f"{self.alice}:D", sid="PA_x")
        for number in range(2):
            member = {"id": f"{number}", "claimed_user_id": self.alice, "claimed_device_id": "D"}
            delay_id = self.schedule(RTC_MEMBER, {"sticky_key": f"{number}"}, sticky=True)
            assert self.delegate(delay_id, member=member).code == 200
        assert self.webhook("participant_joined", there).code == 200
        # For longer than a client needs that changes its identity.
        self.advance_by(3)
        waits: Deferred[None] = Deferred()
        sent: list[str] = []

        async def send(events: Events, event: Any) -> None:
            if events is worker.events:
                await make_deferred_yieldable(waits)
            sent.append(event["content"]["sticky_key"])

        with (
            patch.object(Events, "send", send),
            patch("synapse_lk_jwt.delegation.sender.CONCURRENT_SENDS", 1),
        ):
            self.get_success(service.on_left(room, there.identity, there.sid))
            self.advance_by(12)
            waits.callback(None)
            self.pump()
        # The clock does not know that the worker is still sending one of them.
        assert len(sent) == 3, sent
        assert self.rows() == []


class EncryptedTestCase(EventsTestCase):
    def encrypted(self, number: int = 0, room_id: str | None = None) -> str:
        return self.schedule(ENCRYPTED, {"ciphertext": f"leave{number}"}, room_id=room_id)

    def lose(self) -> None:
        alice = self.call()
        assert self.delegate_of(self.encrypted()).code == 200
        self.advance_by(3)
        self.alice_there = alice


class EncryptedTests(EncryptedTestCase):
    def test_encrypted_leave_is_sent_when_the_participant_leaves(self) -> None:
        self.lose()
        self.leaves(self.alice_there)
        assert self.contents(ENCRYPTED) == [{"ciphertext": "leave0"}]
        assert self.rows() == []

    def test_encrypted_leave_of_a_suspended_user_is_refused_for_good(self) -> None:
        self.lose()
        self.suspend()
        self.leaves(self.alice_there)
        self.advance_by(12)
        assert (self.contents(ENCRYPTED), self.rows(), self.pending()) == ([], [], [])

    def test_encrypted_leave_that_was_sent_is_not_sent_again(self) -> None:
        self.lose()
        send = LeaveSender._try_to_send

        async def sent_and_dead(sender: LeaveSender, task: Any) -> None:
            await send(sender, task)
            raise Died

        with patch.object(LeaveSender, "_try_to_send", sent_and_dead):
            self.leaves(self.alice_there)
        self.send_now(ENCRYPTED, {"ciphertext": "chat"})
        self.advance_by(12)
        assert self.contents(ENCRYPTED) == [{"ciphertext": "leave0"}, {"ciphertext": "chat"}]
        assert self.rows() == []

    def test_encrypted_leave_is_sent_though_the_user_has_chatted(self) -> None:
        self.lose()
        with (
            patch.object(Events, "send", side_effect=SynapseError(500, "no luck")),
            self.assertLogs("synapse_lk_jwt", logging.WARNING),
        ):
            self.leaves(self.alice_there)
        self.send_now(ENCRYPTED, {"ciphertext": "chat"})
        self.advance_by(12)
        assert self.contents(ENCRYPTED) == [{"ciphertext": "chat"}, {"ciphertext": "leave0"}]

    def test_sixth_encrypted_delegation_in_a_room_is_refused(self) -> None:
        codes = [
            self.delegate_of(self.encrypted(number), f"member{number}").code for number in range(6)
        ]
        assert codes == [200] * 5 + [400]
        # Another room has a limit of its own, and other kinds of leaves do not count.
        elsewhere = self.helper.create_room_as(self.alice, tok=self.alices_token)
        delegated = self.delegate_of(self.encrypted(room_id=elsewhere), room_id=elsewhere)
        assert delegated.code == 200, delegated.result
        assert self.delegate_of(self.delayed(), "state").code == 200


class LimitedEncryptedTests(EncryptedTestCase):
    def default_config(self) -> dict[str, Any]:
        config = super().default_config()
        config["rc_message"] = {"per_second": 0.1, "burst_count": 10}
        return config

    def test_encrypted_leave_of_a_user_at_the_rate_limit_is_retried(self) -> None:
        self.lose()
        path = f"rooms/{self.room_id}/send/m.sticker/limit"
        codes = [
            self.make_request("PUT", f"{path}{number}", {}, access_token=self.alices_token).code
            for number in range(12)
        ]
        assert codes[-1] == 429
        with self.assertLogs("synapse_lk_jwt", logging.WARNING):
            self.leaves(self.alice_there)
            self.advance_by(2)
        assert self.contents(ENCRYPTED) == []
        self.advance_by(30)
        assert self.contents(ENCRYPTED) == [{"ciphertext": "leave0"}]
        assert self.rows() == []


class DelegatedAgainTests(EventsTestCase):
    def identities(self) -> set[str]:
        return {row[1] for row in self.rows("identities")}

    def test_known_delay_id_through_another_endpoint_adds_its_identity(self) -> None:
        delay_id = self.delayed(60_000)
        delay = {"delay_id": delay_id, "delay_timeout": 60_000}
        self.assert_token(self.post("/sfu/get", self.sfu_get_body(**delay)))
        jwt = self.post("/get_token", self.get_token_body(**delay)).json_body["jwt"]
        assert len(self.identities()) == 2
        assert len(self.rows()) == 1
        # The client connects under the new identity.
        alice = self.sfu.join(jwt)
        self.advance_by(90)
        assert self.is_in_call()
        self.leaves(alice)
        assert not self.is_in_call()

    def test_known_delay_id_queries_livekit_within_a_second(self) -> None:
        delay_id = self.delayed()
        delay = {"delay_id": delay_id, "delay_timeout": HOUR_MS}
        self.assert_token(self.post("/sfu/get", self.sfu_get_body(**delay)))
        # By now the module queries LiveKit about every quarter of an hour.
        self.advance_by(1100)
        self.sfu.join(self.post("/get_token", self.get_token_body()).json_body["jwt"])
        self.assert_token(self.post("/get_token", self.get_token_body(**delay)))
        with patch.object(self.sfu, "asked", []):
            self.advance_by(2)
            assert self.sfu.asked != []
        (row,) = self.rows()
        assert "connected" in row

    def test_identities_of_one_delegation_are_limited(self) -> None:
        delay_id = self.delayed()
        for number in range(20):
            assert self.delegate_of(delay_id, f"member{number}").code == 200
        assert len(self.identities()) == MAX_IDENTITIES

    def test_known_delay_id_for_another_slot_changes_nothing(self) -> None:
        delay_id = self.delayed()
        assert self.delegate_of(delay_id).code == 200
        before = self.rows(), self.rows("identities")
        assert self.delegate_of(delay_id, slot_id="other").code == 200
        assert (self.rows(), self.rows("identities")) == before


class FinalisedTests(EventsTestCase):
    """On a Synapse that keeps delayed events which were sent or cancelled."""

    def prepare(self, reactor: Any, clock: Any, hs: Any) -> None:
        super().prepare(reactor, clock, hs)
        add = "ALTER TABLE delayed_events ADD COLUMN finalised_ts BIGINT"
        self.get_success(self.store.db_pool.execute("add", add))

    def finalise(self, delay_id: str) -> None:
        self.get_success(
            self.store.db_pool.simple_update_one(
                "delayed_events", {"delay_id": delay_id}, {"finalised_ts": 1}
            )
        )

    def finalised(self) -> dict[str, bool]:
        rows = self.get_success(
            self.store.db_pool.execute("f", "SELECT delay_id, finalised_ts FROM delayed_events")
        )
        return {delay_id: finalised_ts is not None for delay_id, finalised_ts in rows}

    def test_finalised_event_cannot_be_delegated(self) -> None:
        delay_id = self.delayed()
        self.finalise(delay_id)
        self.assert_error(self.delegate(delay_id), 400, Codes.INVALID_PARAM)

    def test_delegation_of_an_event_that_is_finalised_later_ends(self) -> None:
        alice = self.call()
        delay_id = self.delayed()
        assert self.delegate_of(delay_id).code == 200
        self.advance_by(3)
        self.finalise(delay_id)
        self.leaves(alice)
        assert self.is_in_call()
        assert self.rows() == []

    def test_restart_of_a_finalised_event_ends_the_delegation(self) -> None:
        self.call()
        delay_id = self.delayed(9_000)
        assert self.delegate_of(delay_id).code == 200
        self.advance_by(2)
        self.finalise(delay_id)
        self.advance_by(5)
        assert self.rows() == []

    def test_superseded_event_is_kept_as_cancelled(self) -> None:
        older, newer = self.delayed(), self.delayed()
        for delay_id in (older, newer):
            assert self.delegate(delay_id).code == 200
        assert self.finalised() == {older: True, newer: False}

    def test_event_that_is_sent_is_not_kept_as_cancelled(self) -> None:
        alice = self.call()
        assert self.delegate_of(self.delayed()).code == 200
        self.advance_by(3)
        self.leaves(alice)
        assert not self.is_in_call()
        assert self.finalised() == {}


class UnreadableRowTests(EventsTestCase):
    def spoil(self, delay_id: str, **values: Any) -> None:
        self.get_success(
            self.store.db_pool.simple_update_one(
                "synapse_lk_jwt_delegations", {"delay_id": delay_id}, values
            )
        )

    @parameterized.expand(
        [
            ("unknown_phase", {"phase": "paused"}),
            ("no_json", {"phase": "leaving", "leave": "{"}),
            ("no_event", {"phase": "leaving", "leave": "{}"}),
            ("no_leave", {"phase": "leaving", "leave": None}),
        ]
    )
    def test_unreadable_row_is_skipped_and_logged_once(self, name: str, values: Any) -> None:
        alice = self.call()
        bad = self.delayed(key="_bad")
        assert self.delegate_of(bad, "bad").code == 200
        self.spoil(bad, due_ts=0, **values)
        with self.assertLogs("synapse_lk_jwt", logging.ERROR) as logs:
            assert self.delegate_of(self.delayed(), "good").code == 200
            # Polls, restarts and webhooks continue.
            self.advance_by(65)
            self.leaves(alice)
            self.advance_by(3)
        assert not self.is_in_call()
        (line,) = logs.output
        assert bad in line
        assert [row[0] for row in self.rows()] == [bad]

    def test_batch_full_of_unreadable_rows_does_not_starve_the_others(self) -> None:
        alice = self.call()
        with patch.object(delegation_tables, "BATCH", 2):
            for number in range(5):
                bad = self.delayed(key=f"_{number}")
                assert self.delegate_of(bad, f"bad{number}").code == 200
                self.spoil(bad, due_ts=0, phase="paused")
            assert self.delegate_of(self.delayed(9_000), "good").code == 200
            # The module must restart it every three seconds, or Synapse would send it.
            self.advance_by(30)
        assert self.is_in_call()
        self.leaves(alice)
        assert not self.is_in_call()


class SlotsTests(EventsTestCase):
    def token_for(self, slot_id: str) -> Any:
        return self.post("/get_token", self.get_token_body(slot_id=slot_id))

    def fill(self) -> None:
        for number in range(MAX_SLOTS):
            self.assert_token(self.token_for(f"slot{number}"))

    def test_slots_beyond_the_limit_get_429_and_are_not_created(self) -> None:
        self.fill()
        created = len(self.sfu.requests)
        channel = self.token_for("another")
        self.assert_error(channel, 429, Codes.LIMIT_EXCEEDED)
        assert channel.json_body["retry_after_ms"] == SLOTS_RETRY_AFTER_MS
        body = self.homeserver_body(slot_id="another")
        self.assert_error(self.post_homeserver(body), 429, Codes.LIMIT_EXCEEDED)
        assert len(self.sfu.requests) == created
        assert len(self.rows("calls")) == MAX_SLOTS

    def test_known_slots_and_other_rooms_are_not_limited(self) -> None:
        self.fill()
        self.advance_by(12)
        self.assert_token(self.token_for("slot3"))
        elsewhere = self.helper.create_room_as(self.alice, tok=self.alices_token)
        body = self.get_token_body(slot_id="another", room_id=elsewhere)
        self.assert_token(self.post("/get_token", body))

    def test_default_slot_cannot_be_blocked_with_other_slots(self) -> None:
        self.fill()
        self.assert_token(self.post("/sfu/get", self.sfu_get_body()))

    def test_slot_whose_call_is_over_frees_its_place(self) -> None:
        self.fill()
        self.advance_by(12)
        room = self.sfu.requests[3][1].name
        del self.sfu.participants[room]
        assert self.webhook("room_finished", room=room).code == 200
        self.assert_token(self.token_for("another"))
