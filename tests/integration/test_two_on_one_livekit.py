# SPDX-License-Identifier: Apache-2.0
"""Two homeservers that share one LiveKit and its secret."""

import asyncio
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest

from testbed import service
from testbed.call import CallRejected, Participant
from testbed.livekit import LiveKit
from testbed.matrix import User
from testbed.member import POWER_LEVELS, Member, enter, is_kept_out
from testbed.process import until
from testbed.sets import module_config, running
from testbed.synapse import Synapse

HOUR_MS = 3_600_000
POLL_SEC = 1

number = itertools.count()


@dataclass(frozen=True, eq=False)
class Shared:
    """Homeservers A and B, which federate. LiveKit sends its webhooks to both."""

    a: Synapse
    b: Synapse
    livekit: LiveKit

    def user_of(self, server: Synapse) -> User:
        return server.register(f"user{next(number)}")

    def room_of_both(self, creator: User, other: User) -> str:
        room_id = creator.create_room(
            invite=[other.user_id], power_levels=POWER_LEVELS, preset="public_chat"
        )
        server = creator.user_id.partition(":")[2]
        other.join(room_id, via=[server])
        return room_id

    async def polls(self, count: int = 3) -> None:
        """Waits until both homeservers have polled after this call."""
        begun = {server: listed(server) for server in (self.a, self.b)}
        await until(
            lambda: all(listed(server) >= n + count for server, n in begun.items()), "polls", 20
        )

    def rooms(self) -> set[str]:
        return {room["name"] for room in self.livekit.rooms()}


def listed(server: Synapse) -> int:
    """The number of ListRooms requests that a homeserver has sent."""
    return server.log_text().count("twirp/livekit.RoomService/ListRooms")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    directory = tmp_path_factory.mktemp("shared")
    livekit = LiveKit(directory)
    config = module_config(livekit, sanity_check_interval=f"{POLL_SEC}s")
    # Server ACLs and the module's lists ignore ports, so the homeservers need two host names.
    a = Synapse("a", directory, config)
    b = Synapse("b", directory, {**config, "rooms_elsewhere": "refuse"}, host="localhost")
    for server in (a, b):
        livekit.webhook_urls.append(server.client_url + service.PREFIX + "/sfu_webhook")
    with running(livekit, a, b):
        yield Shared(a, b, livekit)
    for server in (a, b):
        assert "Traceback" not in server.log_text()


def recreated(server: Synapse) -> set[str]:
    """The Matrix rooms whose calls a homeserver has recreated."""
    return set(re.findall(r"lost the room of a call of '(.*?)'; recreated", server.log_text()))


def is_recreated(server: Synapse, member: Member) -> bool:
    return member.room_id in recreated(server)


async def leave(*members: Member) -> None:
    for member in members:
        await member.there.leave()


def test_call_in_room_unknown_to_the_other_homeserver_continues(shared: Shared) -> None:
    """B issues no tokens for rooms that it is not in, and would remove their participants."""
    alice = shared.user_of(shared.a)
    room_id = alice.create_room(power_levels=POWER_LEVELS)

    async def test() -> None:
        member = await enter(alice, room_id, shared.livekit, HOUR_MS)
        await shared.polls()
        assert member.there.is_connected
        assert len(shared.livekit.participants(member.livekit_room)) == 1
        await leave(member)
        await until(lambda: not member.is_in_room(alice), "leave", 10)

    asyncio.run(test())


@pytest.mark.parametrize("leaver", ["b", "a"])
def test_call_after_last_user_of_one_homeserver_left_continues_for_the_other(
    leaver: str, shared: Shared
) -> None:
    stayer, leaving = (shared.a, shared.b) if leaver == "b" else (shared.b, shared.a)
    alice, bob = shared.user_of(stayer), shared.user_of(leaving)
    room_id = shared.room_of_both(alice, bob)

    async def test() -> None:
        members = [await enter(user, room_id, shared.livekit, HOUR_MS) for user in (alice, bob)]
        assert members[0].livekit_room == members[1].livekit_room
        await shared.polls()
        await asyncio.to_thread(bob.leave, room_id)
        await until(lambda: not members[1].there.is_connected, "removal", 10)
        await is_kept_out(shared.livekit.url, members[1].jwt)
        await shared.polls()
        assert members[0].there.is_connected
        assert members[0].livekit_room in shared.rooms()
        await leave(*members)

    asyncio.run(test())


@pytest.mark.parametrize("server", ["a", "b"])
def test_ban_removes_the_user_of_either_homeserver_and_no_other(
    server: str, shared: Shared
) -> None:
    servers = (shared.a, shared.b) if server == "b" else (shared.b, shared.a)
    alice, bob = (shared.user_of(s) for s in servers)
    room_id = shared.room_of_both(alice, bob)

    async def test() -> None:
        members = [await enter(user, room_id, shared.livekit, HOUR_MS) for user in (alice, bob)]
        await asyncio.to_thread(alice.ban, room_id, bob.user_id)
        await until(lambda: not members[1].there.is_connected, "removal", 10)
        await is_kept_out(shared.livekit.url, members[1].jwt)
        assert members[0].there.is_connected
        await leave(*members)

    asyncio.run(test())


def test_livekit_restart_makes_each_homeserver_recreate_only_its_own_calls(shared: Shared) -> None:
    alice, bob = shared.user_of(shared.a), shared.user_of(shared.b)
    rooms = {user: user.create_room(power_levels=POWER_LEVELS) for user in (alice, bob)}

    async def test() -> None:
        members = [
            await enter(user, room_id, shared.livekit, HOUR_MS) for user, room_id in rooms.items()
        ]
        await shared.polls()
        shared.livekit.process.kill()
        shared.livekit.start()
        shared.livekit.wait_ready()
        names = {member.livekit_room for member in members}
        await until(lambda: names <= shared.rooms(), "rooms", 20)
        both = list(zip((shared.a, shared.b), members, strict=True))
        for server, member in both:
            await until(partial(is_recreated, server, member), "log line", 5)
        # Each homeserver has had time to recreate the other one's calls as well.
        await shared.polls()
        # Rooms of earlier tests may be among those that were recreated.
        for server, (_, other) in zip((shared.a, shared.b), reversed(both), strict=True):
            assert not is_recreated(server, other)
        await leave(*members)

    asyncio.run(test())


def test_livekit_restart_in_a_call_of_both_homeservers_reconnects_the_users(shared: Shared) -> None:
    alice, bob = shared.user_of(shared.a), shared.user_of(shared.b)
    room_id = shared.room_of_both(alice, bob)

    async def test() -> None:
        members = [await enter(user, room_id, shared.livekit, HOUR_MS) for user in (alice, bob)]
        await shared.polls()
        shared.livekit.process.kill()
        shared.livekit.start()
        shared.livekit.wait_ready()
        await until(lambda: members[0].livekit_room in shared.rooms(), "room", 20)
        for member in members:
            await member.there.leave()
            member.there = await _back(shared.livekit, member.jwt)
        await shared.polls()
        assert all(member.is_in_room(alice) for member in members)
        await leave(*members)

    asyncio.run(test())


async def _back(livekit: LiveKit, jwt: str) -> Participant:
    for _ in range(20):
        try:
            return await Participant.join(livekit.url, jwt, timeout=5.0)
        except CallRejected:
            await asyncio.sleep(0.2)
    raise AssertionError("LiveKit does not let the client back in")
