# SPDX-License-Identifier: Apache-2.0
"""Events that a user has delegated to be sent later, on a real Synapse and LiveKit."""

import asyncio
import itertools
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from testbed import service
from testbed.call import Participant
from testbed.livekit import LiveKit
from testbed.matrix import User
from testbed.member import MEMBER, POWER_LEVELS
from testbed.process import until
from testbed.sets import module_config, running
from testbed.synapse import Synapse

HOUR_MS = 3_600_000
RTC_MEMBER = "org.matrix.msc4143.rtc.member"
STICKY = "&org.matrix.msc4354.sticky_duration_ms=3600000"
SPAM = ("m.sticker", "m.reaction", "org.matrix.msc4075.rtc.notification", "org.example.custom")

number = itertools.count()


@pytest.fixture(scope="module")
def livekit(tmp_path_factory: pytest.TempPathFactory) -> LiveKit:
    return LiveKit(tmp_path_factory.mktemp("livekit"))


@pytest.fixture(scope="module")
def synapse(livekit: LiveKit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Synapse]:
    server = Synapse(
        "d",
        tmp_path_factory.mktemp("delegation"),
        module_config(livekit, sanity_check_interval="2s"),
        {"experimental_features": {"msc4354_enabled": True}},
    )
    livekit.webhook_urls.append(server.client_url + service.PREFIX + "/sfu_webhook")
    with running(livekit, server):
        yield server
    assert "Traceback" not in server.log_text()


class Mallory:
    """A user in a call, with delayed events to be sent when the user leaves it."""

    def __init__(self, synapse: Synapse) -> None:
        self.admin = synapse.register(f"admin{next(number)}", admin=True)
        self.user = synapse.register(f"mallory{next(number)}")
        self.url = synapse.client_url
        self.room_id = self.admin.create_room(preset="public_chat", power_levels=POWER_LEVELS)
        self.user.join(self.room_id)
        self.key = f"_{self.user.user_id}_{self.user.device_id}"
        self.members = 0

    async def join(self, livekit: LiveKit) -> Participant:
        body = service.sfu_get_body(self.user, self.room_id)
        jwt = service.post(self.url, "/sfu/get", body).ok()["jwt"]
        return await Participant.join(livekit.url, jwt)

    def schedule(self, event_type: str, content: Any, sticky: bool = False) -> str:
        path = f"/_matrix/client/v3/rooms/{self.room_id}/send/{event_type}/{next(number)}"
        query = f"?org.matrix.msc4140.delay={HOUR_MS}{STICKY * sticky}"
        delay_id: str = self.user.call("PUT", path + query, content).ok()["delay_id"]
        return delay_id

    def delegate(self, delay_id: str) -> int:
        """Delegates an event of a new member. All members follow the same participant."""
        self.members += 1
        body = service.get_token_body(
            self.user, self.room_id, delay_id=delay_id, delay_timeout=HOUR_MS
        )
        body["member"]["id"] = f"member{self.members}"
        return service.post(self.url, "/delegate_delayed_leave", body).status

    def send_state_leave(self, key: str) -> str:
        self.user.send_state(self.room_id, MEMBER, {"in": "the call"}, key)
        return self.user.delay_state(self.room_id, MEMBER, {}, key)

    def sent(self, *event_types: str) -> list[Any]:
        """The contents of the user's events, the oldest first."""
        return [
            event["content"]
            for event in reversed(self.admin.timeline(self.room_id))
            if event["type"] in event_types and event["sender"] == self.user.user_id
        ]


def test_suspended_user_leaves_and_none_of_the_prepared_events_is_sent(
    synapse: Synapse, livekit: LiveKit
) -> None:
    mallory = Mallory(synapse)
    sticky = {"slot_id": service.SLOT, "msc4354_sticky_key": "member"}

    async def test() -> None:
        there = await mallory.join(livekit)
        spam = [mallory.schedule(SPAM[i % len(SPAM)], {"body": str(i)}) for i in range(20)]
        refused = {mallory.delegate(delay_id) for delay_id in spam}
        encrypted = mallory.schedule("m.room.encrypted", {"ciphertext": "spam"})
        leaves = [mallory.send_state_leave(mallory.key), mallory.schedule(RTC_MEMBER, sticky, True)]
        accepted = {mallory.delegate(delay_id) for delay_id in (*leaves, encrypted)}
        await until(lambda: connected(synapse) >= 2, "all delegations connected")
        mallory.admin.suspend(mallory.user.user_id)
        # The poll removes a suspended user's participant, which triggers the delegations.
        await until(lambda: not there.is_connected, "removal", 10)
        await until(lambda: mallory.sent(RTC_MEMBER) == [sticky], "sticky leave", 10)
        await until(lambda: mallory.sent(MEMBER)[-1] == {}, "state leave", 10)
        await until(lambda: delegations(synapse) == [], "end of all delegations", 10)
        assert mallory.sent(*SPAM, "m.room.encrypted") == []
        assert (refused, accepted) == ({400}, {200})

    asyncio.run(test())


def test_sixty_prepared_messages_are_not_sent_when_the_participant_leaves(
    synapse: Synapse, livekit: LiveKit
) -> None:
    mallory = Mallory(synapse)

    async def test() -> None:
        there = await mallory.join(livekit)
        spam = [mallory.schedule("m.sticker", {"body": str(i)}) for i in range(60)]
        refused = {mallory.delegate(delay_id) for delay_id in spam}
        leave = mallory.send_state_leave(mallory.key)
        assert mallory.delegate(leave) == 200
        await until(lambda: connected(synapse) >= 1, "delegation connected")
        await there.leave()
        await until(lambda: mallory.sent(MEMBER)[-1] == {}, "state leave", 10)
        assert (mallory.sent("m.sticker"), refused) == ([], {400})

    asyncio.run(test())


def test_encrypted_leave_is_sent_when_the_participant_leaves(
    synapse: Synapse, livekit: LiveKit
) -> None:
    mallory = Mallory(synapse)
    content = {"algorithm": "m.megolm.v1.aes-sha2", "ciphertext": "leave"}

    async def test() -> None:
        there = await mallory.join(livekit)
        delay_id = mallory.schedule("m.room.encrypted", content, sticky=True)
        assert mallory.delegate(delay_id) == 200
        await until(lambda: connected(synapse) >= 1, "delegation connected")
        await there.leave()
        await until(lambda: mallory.sent("m.room.encrypted") == [content], "leave", 10)
        await until(lambda: delegations(synapse) == [], "end of the delegation", 10)

    asyncio.run(test())


def delegations(synapse: Synapse) -> list[str]:
    """The phase of each delegation."""
    database = synapse.directory / "homeserver.db"
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        rows = connection.execute("SELECT phase FROM synapse_lk_jwt_delegations")
        return [phase for (phase,) in rows]


def connected(synapse: Synapse) -> int:
    return delegations(synapse).count("connected")


def test_user_who_is_not_suspended_sends_the_prepared_events(synapse: Synapse) -> None:
    mallory = Mallory(synapse)
    user: User = mallory.user
    path = f"/_matrix/client/v3/rooms/{mallory.room_id}/send"
    for event_type in SPAM:
        user.call("PUT", f"{path}/{event_type}/{next(number)}", {"body": "x"}).ok()
    assert len(mallory.sent(*SPAM)) == len(SPAM)
