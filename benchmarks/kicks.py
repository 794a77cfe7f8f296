# SPDX-License-Identifier: Apache-2.0
"""How long a kick takes to reach LiveKit, with and without a flood in other rooms."""

import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from benchmarks import calls
from benchmarks.calls import Participant
from benchmarks.leaves import POLL_SEC
from benchmarks.setting import StubSfu, module_config
from testbed import service
from testbed.matrix import User
from testbed.process import stop_all, wait_until
from testbed.synapse import Synapse

# The size of the call in which users are kicked.
CALLS = 20
IN_A_CALL = 10
EVERY_SEC = 0.25

SLOTS = 900
FLOOD_USERS = 50
LISTING_MS = 10
# How often each user of the flood leaves and joins again.
FLOOD_SEC = 0.1

HANGING_CALLS = 20
GOAL_MS = 250


def _kick(
    sfu: StubSfu, admin: User, participants: Sequence[Participant]
) -> tuple[list[float], list[float]]:
    """Kicks one participant after the other.

    Returns:
        Seconds from each request to RemoveParticipant, and seconds from each answer.
    """
    calls.join(sfu, participants)
    sent: dict[str, float] = {}
    answered: dict[str, float] = {}

    def kick(participant: Participant) -> None:
        sent[participant.identity] = time.monotonic()
        admin.kick(participant.room_id, participant.user.user_id)
        answered[participant.identity] = time.monotonic()

    def removed() -> dict[str, float]:
        return {
            identity: at
            for _, identity, at in sfu.get("/removed")
            if at > sent.get(identity, math.inf)
        }

    began = time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        kicks = []
        for number, participant in enumerate(participants):
            time.sleep(max(0.0, began + number * EVERY_SEC - time.monotonic()))
            kicks.append(threads.submit(kick, participant))
        for done in kicks:
            done.result()
    wait_until(lambda: len(removed()) >= len(participants), "all of them removed", 120)
    at = removed()
    return (
        [at[identity] - sent[identity] for identity in sent],
        # The module may see the kick before Synapse answers.
        [max(0.0, at[identity] - answered[identity]) for identity in sent],
    )


@contextmanager
def _flood(users: Sequence[User], room_id: str) -> Iterator[list[int]]:
    """Makes users leave and join a Matrix room continuously, and counts the leaves."""
    is_over = threading.Event()
    count = [0]

    def leave_and_join() -> None:
        while True:
            for user in users[1:]:
                if is_over.wait(FLOOD_SEC):
                    return
                user.leave(room_id)
                user.join(room_id)
                count[0] += 1

    thread = threading.Thread(target=leave_and_join)
    thread.start()
    try:
        yield count
    finally:
        is_over.set()
        thread.join()


def measure(directory: Path, is_quick: bool) -> None:
    """Runs the benchmark and prints the table.

    Args:
        directory: for all files.
        is_quick: whether a few kicks are enough.
    """
    in_a_call = 2 if is_quick else IN_A_CALL
    sfu = StubSfu(directory)
    synapse = Synapse("kicks", directory, module_config(sfu, POLL_SEC))
    try:
        sfu.start()
        synapse.start()
        synapse.wait_ready()
        users = calls.users(synapse, CALLS * in_a_call)
        admin = synapse.register("moderator")
        participants = []
        for number in range(CALLS):
            members = users[number * in_a_call : (number + 1) * in_a_call]
            room_id = calls.room([admin, *members])
            participants += [Participant(u, room_id, service.SLOT, "DEVICE") for u in members]
        calls.note_calls(synapse, participants)
        sfu.delay(ListParticipants=LISTING_MS)
        print(
            f"\n{len(participants)} kicks in {CALLS} rooms, one every {EVERY_SEC} s, from the"
            f" request to RemoveParticipant (goal: p99 below {GOAL_MS} ms)"
        )
        print(f"{'':16}{'p50 ms':>8}{'p99 ms':>8}{'max ms':>8}{'CPU':>7}{'module p99 ms':>14}")

        def row(name: str) -> None:
            used, began = synapse.main.cpu_seconds(), time.monotonic()
            times, after_answer = _kick(sfu, admin, participants)
            cpu = (synapse.main.cpu_seconds() - used) / (time.monotonic() - began)
            p50, p99, most = (1000 * calls.quantile(times, part) for part in (0.5, 0.99, 1))
            print(
                f"{name:16}{p50:8.0f}{p99:8.0f}{most:8.0f}{cpu:7.2f}"
                f"{1000 * calls.quantile(after_answer, 0.99):14.0f}"
                f"  {'met' if p99 < GOAL_MS else 'missed'}",
                flush=True,
            )

        row("without a flood")
        for participant in participants:
            participant.user.join(participant.room_id)
        flood_users = users[:FLOOD_USERS]
        flooded = calls.room(flood_users)
        slots = [Participant(users[0], flooded, f"slot{n}", "DEVICE") for n in range(SLOTS)]
        hanging = [calls.room([admin, user]) for user in users[:HANGING_CALLS]]
        stuck = [
            Participant(user, room_id, service.SLOT, "STUCK")
            for user, room_id in zip(users, hanging, strict=False)
        ]
        calls.note_calls(synapse, slots + stuck)
        calls.join(sfu, slots + stuck)
        sfu.hang({participant.livekit_room for participant in stuck})
        for participant in stuck:
            admin.kick(participant.room_id, participant.user.user_id)
        with _flood(flood_users, flooded) as left:
            time.sleep(5)
            row("with a flood")
        asked = sfu.get("/asked")["ListParticipants"][0]
        print(
            f"the flood: {left[0]} leaves in a room of {SLOTS} slots, listings that take"
            f" {LISTING_MS} ms, {HANGING_CALLS} removals on a node that hangs; {asked} listings"
        )
    finally:
        stop_all([sfu.process, *synapse.processes])
