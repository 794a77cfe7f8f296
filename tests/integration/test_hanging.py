# SPDX-License-Identifier: Apache-2.0
"""A stub LiveKit that accepts connections and never answers."""

import asyncio
import time
from collections.abc import Iterator

import pytest

from benchmarks import calls
from benchmarks.calls import Participant
from benchmarks.leaves import webhook
from benchmarks.load import run
from benchmarks.setting import StubSfu, module_config, port
from testbed.process import stop_all, wait_until
from testbed.service import SLOT
from testbed.synapse import Synapse

# The module sends requests about 50 rooms at a time. The rest is for its periodic work.
MAX_RUNNING = 60
# The stub may count a request that timed out together with the next one.
MAX_REQUESTS = 2 * MAX_RUNNING
OURS = '"synapse_lk_jwt'
POLL_SEC = 4
# Longer than the module waits for an answer of LiveKit.
HANGING_SEC = 12
SENT_SEC = 20


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Synapse, StubSfu]]:
    directory = tmp_path_factory.mktemp("hanging")
    sfu = StubSfu(directory)
    synapse = Synapse("hanging", directory, module_config(sfu, POLL_SEC))
    try:
        sfu.start()
        synapse.start()
        synapse.wait_ready()
        yield synapse, sfu
    finally:
        stop_all([sfu.process, *synapse.processes])
    assert "Traceback" not in synapse.log_text()


@pytest.fixture
def synapse(one: tuple[Synapse, StubSfu]) -> Synapse:
    return one[0]


@pytest.fixture
def sfu(one: tuple[Synapse, StubSfu]) -> Iterator[StubSfu]:
    yield one[1]
    one[1].hang([])
    one[1].delay(CreateRoom=0)


number = iter(range(10_000))


def in_calls(synapse: Synapse, sfu: StubSfu, slots: int, in_a_call: int) -> list[Participant]:
    """Participants of one user in calls of a new Matrix room, with delegated leaves."""
    user = synapse.register(f"alice{next(number)}")
    room_id = calls.room([user])
    participants = [
        Participant(user, room_id, f"slot{slot}", f"DEVICE{slot}-{device}")
        for slot in range(slots)
        for device in range(in_a_call)
    ]
    calls.join(sfu, participants)
    calls.note_calls(synapse, participants)
    calls.delegate(synapse, participants)
    return participants


def removed(sfu: StubSfu) -> set[str]:
    return {identity for _, identity, _ in sfu.get("/removed")}


@pytest.mark.parametrize(("slots", "in_a_call"), [(300, 1), (3, 100)])
def test_hanging_livekit_with_300_suspected_leaves_gets_bounded_requests_and_they_are_sent_later(
    slots: int, in_a_call: int, synapse: Synapse, sfu: StubSfu
) -> None:
    participants = in_calls(synapse, sfu, slots, in_a_call)
    began_ms = int(1000 * time.time())
    sfu.hang()
    calls.leave(sfu, participants)
    gone = [
        webhook("participant_left", p.livekit_room, p.identity, p.attributes) for p in participants
    ]
    asyncio.run(run(port(synapse.client_url), gone, 16, 60))
    until = time.monotonic() + HANGING_SEC
    most_running, most_requests = 0.0, 0
    while time.monotonic() < until:
        running = calls.metric(synapse, "synapse_background_process_in_flight_count", OURS)
        most_running = max(most_running, running)
        most_requests = max(most_requests, sfu.in_flight()[1])
    assert calls.leaves_since(synapse, began_ms)[0] == 0
    assert most_running <= MAX_RUNNING
    assert most_requests <= MAX_REQUESTS
    sfu.hang([])
    wait_until(
        lambda: calls.leaves_since(synapse, began_ms)[0] == len(participants),
        "all leaves",
        SENT_SEC,
    )


def test_kick_while_listing_of_another_room_hangs_removes_the_participant(
    synapse: Synapse, sfu: StubSfu
) -> None:
    admin, mallory = (synapse.register(f"user{next(number)}") for _ in range(2))
    hangs, works = calls.room([admin, mallory]), calls.room([admin, mallory])
    stuck = [Participant(mallory, hangs, f"slot{slot}", f"STUCK{slot}") for slot in range(5)]
    kicked = Participant(mallory, works, SLOT, "DEVICE")
    calls.join(sfu, [*stuck, kicked])
    calls.note_calls(synapse, [*stuck, kicked])
    sfu.hang({participant.livekit_room for participant in stuck})
    admin.kick(hangs, mallory.user_id)
    wait_until(lambda: sfu.in_flight()[0] >= 1, "listing that hangs")
    admin.kick(works, mallory.user_id)
    wait_until(lambda: kicked.identity in removed(sfu), "removal", 2)
    assert sfu.in_flight()[0] >= 1
    sfu.hang([])
    wait_until(lambda: {p.identity for p in stuck} <= removed(sfu), "other removals", SENT_SEC)


def test_poll_after_livekit_lost_20_rooms_recreates_them_concurrently(
    synapse: Synapse, sfu: StubSfu
) -> None:
    participants = in_calls(synapse, sfu, 20, 1)
    sfu.delay(CreateRoom=1_000)
    sfu.put("/gone", {participant.livekit_room: {} for participant in participants})
    wait_until(lambda: sfu.get("/count") >= len(participants), "rooms", 60)
    _, first, last = sfu.get("/asked")["CreateRoom"]
    assert last - first < 5
