# SPDX-License-Identifier: Apache-2.0
"""Users who leave a call or the Matrix room, with a real LiveKit that fails in several ways."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from testbed.call import CallRejected, Participant
from testbed.livekit import LiveKit
from testbed.matrix import User
from testbed.member import POWER_LEVELS, Member, delegate_leave, enter, is_kept_out
from testbed.process import until, wait_until
from testbed.sets import one_homeserver
from testbed.synapse import Synapse

HOUR_MS = 3_600_000
POLL_SEC = 2


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Synapse, LiveKit]]:
    directory = tmp_path_factory.mktemp("leaving")
    with one_homeserver(directory, "l", sanity_check_interval=f"{POLL_SEC}s") as (synapse, livekit):
        yield synapse, livekit
    assert "Traceback" not in synapse.log_text()


@pytest.fixture
def synapse(one: tuple[Synapse, LiveKit]) -> Synapse:
    return one[0]


@pytest.fixture
def livekit(one: tuple[Synapse, LiveKit]) -> LiveKit:
    return one[1]


number = iter(range(10_000))


def users_in_room(synapse: Synapse) -> tuple[User, User, str]:
    """Create two users in a room in which both may send memberships."""
    alice, bob = (synapse.register(f"{name}{next(number)}") for name in ("alice", "bob"))
    room_id = alice.create_room(
        invite=[bob.user_id], power_levels=POWER_LEVELS, preset="public_chat"
    )
    bob.join(room_id)
    return alice, bob, room_id


@contextlib.asynccontextmanager
async def call(
    synapse: Synapse, livekit: LiveKit, delay_ms: int = HOUR_MS
) -> AsyncIterator[tuple[Member, Member]]:
    alice, bob, room_id = users_in_room(synapse)
    members = (
        await enter(alice, room_id, livekit, HOUR_MS),
        await enter(bob, room_id, livekit, delay_ms),
    )
    try:
        yield members
    finally:
        for member in members:
            await member.there.leave()


def test_delegated_leave_with_short_delay_is_restarted_until_the_client_disconnects(
    synapse: Synapse, livekit: LiveKit
) -> None:
    async def test() -> None:
        async with call(synapse, livekit, delay_ms=5_000) as (alice, bob):
            (event,) = bob.user.delayed()
            began = event["running_since"]

            def restarted_for_three_times_the_delay() -> bool:
                (event,) = bob.user.delayed()
                return bool(event["running_since"] >= began + 15_000)

            await until(restarted_for_three_times_the_delay, "restarts", 30)
            assert bob.is_in_room(alice.user)
            await bob.there.leave()
            await until(lambda: not bob.is_in_room(alice.user), "leave", 2)
            assert bob.user.delayed() == []
            assert bob.leaves_sent() == 1
            assert alice.is_in_room(alice.user)

    asyncio.run(test())


def test_ten_reconnects_keep_the_membership_and_one_delayed_event(
    synapse: Synapse, livekit: LiveKit
) -> None:
    async def test() -> None:
        async with call(synapse, livekit) as (alice, bob):
            for _ in range(10):
                bob.there = await Participant.join(livekit.url, bob.jwt)
                delegate_leave(bob, HOUR_MS)
            assert bob.is_in_room(alice.user)
            assert len(bob.user.delayed()) == 1
            await bob.there.leave()
            # A participant who joined a moment ago may reconnect with another identity.
            await until(lambda: not bob.is_in_room(alice.user), "leave", 5)
            assert bob.user.delayed() == []

    asyncio.run(test())


def test_client_that_disconnects_while_synapse_is_down_leaves_after_the_start(
    synapse: Synapse, livekit: LiveKit
) -> None:
    async def test() -> None:
        async with call(synapse, livekit) as (alice, bob):
            # The module has seen both participants in a poll.
            polls = synapse.log_text().count("ListRooms")
            await until(lambda: synapse.log_text().count("ListRooms") >= polls + 2, "two polls")
            synapse.kill()
            await bob.there.leave()
            synapse.start()
            synapse.wait_ready()
            await until(lambda: not bob.is_in_room(alice.user), "leave", 5 * POLL_SEC)
            assert bob.leaves_sent() == 1
            assert alice.is_in_room(alice.user)
            # The other leave works as before.
            await alice.there.leave()
            await until(lambda: not alice.is_in_room(alice.user), "leave", 2)

    asyncio.run(test())


def test_leave_without_webhooks_is_sent_after_a_poll(synapse: Synapse, livekit: LiveKit) -> None:
    urls, livekit.webhook_urls = livekit.webhook_urls, []
    livekit.restart()

    async def test() -> None:
        async with call(synapse, livekit, delay_ms=6_000) as (alice, bob):
            await bob.there.leave()
            await until(lambda: not bob.is_in_room(alice.user), "leave", 5 * POLL_SEC)
            assert bob.leaves_sent() == 1
            assert alice.is_in_room(alice.user)
            alice.user.kick(alice.room_id, bob.user.user_id)
            await Participant.join(livekit.url, bob.jwt)
            await until(
                lambda: len(livekit.participants(alice.livekit_room)) == 1,
                "removal",
                3 * POLL_SEC,
            )

    try:
        asyncio.run(test())
    finally:
        livekit.webhook_urls = urls
        livekit.restart()


def test_livekit_restart_during_a_call_keeps_the_membership(
    synapse: Synapse, livekit: LiveKit
) -> None:
    async def test() -> None:
        async with call(synapse, livekit) as (alice, bob):
            # A poll has listed both participants.
            await asyncio.to_thread(
                wait_until, lambda: synapse.log_text().count("ListParticipants") >= 4, "poll"
            )
            livekit.process.kill()
            livekit.start()
            livekit.wait_ready()
            for member in (alice, bob):
                member.there = await rejoin(livekit, member.jwt)
            await until(lambda: len(livekit.participants(alice.livekit_room)) == 2, "both")
            # Longer than the module waits before it sends a leave.
            polls = synapse.log_text().count("ListRooms")
            await until(lambda: synapse.log_text().count("ListRooms") >= polls + 4, "four polls")
            assert alice.is_in_room(alice.user)
            assert bob.is_in_room(alice.user)

    asyncio.run(test())


async def rejoin(livekit: LiveKit, jwt: str) -> Participant:
    """Connects again and again for a while, as browsers do."""
    for _ in range(100):
        with contextlib.suppress(CallRejected):
            return await Participant.join(livekit.url, jwt)
        await asyncio.sleep(0.1)
    raise AssertionError("LiveKit does not let them back in")


REMOVALS: dict[str, Callable[[Member, Member, User], None]] = {
    "leaves": lambda alice, bob, admin: bob.user.leave(bob.room_id),
    "is kicked": lambda alice, bob, admin: alice.user.kick(bob.room_id, bob.user.user_id),
    "is banned": lambda alice, bob, admin: alice.user.ban(bob.room_id, bob.user.user_id),
    "is deactivated": lambda alice, bob, admin: admin.deactivate(bob.user.user_id),
}


@pytest.mark.parametrize("removal", REMOVALS)
def test_user_removed_from_the_room_is_removed_from_the_call(
    removal: str, synapse: Synapse, livekit: LiveKit
) -> None:
    admin = synapse.register(f"admin{next(number)}", admin=True)

    async def test() -> None:
        async with call(synapse, livekit) as (alice, bob):
            REMOVALS[removal](alice, bob, admin)
            await until(lambda: not bob.there.is_connected, "disconnect", 5)
            assert alice.there.is_connected
            # LiveKit still accepts the token, but the module removes the participant.
            await is_kept_out(livekit.url, bob.jwt)
            assert len(livekit.participants(alice.livekit_room)) == 1

    asyncio.run(test())


def test_user_kicked_while_livekit_is_down_is_removed_after_its_restart(
    synapse: Synapse, livekit: LiveKit
) -> None:
    async def test() -> None:
        async with call(synapse, livekit) as (alice, bob):
            os.kill(livekit.process.pid, signal.SIGSTOP)
            try:
                await asyncio.to_thread(alice.user.kick, bob.room_id, bob.user.user_id)
                synapse.kill()
            finally:
                os.kill(livekit.process.pid, signal.SIGCONT)
            synapse.start()
            synapse.wait_ready()
            await until(lambda: not bob.there.is_connected, "disconnect", 10)

    asyncio.run(test())


def test_call_after_the_last_local_user_left_ends(synapse: Synapse, livekit: LiveKit) -> None:
    async def test() -> None:
        async with call(synapse, livekit) as (alice, bob):
            for member in (alice, bob):
                member.user.leave(member.room_id)
            await until(
                lambda: alice.livekit_room not in {room["name"] for room in livekit.rooms()},
                "end of the call",
            )

    asyncio.run(test())
