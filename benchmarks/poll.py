# SPDX-License-Identifier: Apache-2.0
"""What a poll costs if nothing has changed, and how soon a poll notices a lost participant."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attr

from benchmarks import calls
from benchmarks.calls import Participant
from benchmarks.setting import StubSfu, module_config
from testbed.matrix import User
from testbed.process import stop_all, wait_until
from testbed.synapse import Synapse

CALLS = (100, 1_000, 10_000)
DELEGATIONS = (0, 1, 2)
PARTICIPANTS = 5
USERS = 50
WITH_A_VANISHED = 1_000
POLL_SEC = 30
SAMPLE_SEC = 0.005
GOAL_MS = 0.15
GOAL_BLOCK_MS = 50

# The poll reads from the database before its first request, and writes after its last one.
AROUND_SEC = 2.0


@attr.s(auto_attribs=True, frozen=True)
class Poll:
    """The cost of one poll.

    Attributes:
        seconds: the seconds from its first request to its last one.
        cpu: CPU seconds of Synapse, without those that it uses between polls.
        block: the longest time in seconds that a trivial request waited.
        requests: the number of requests that LiveKit got, by method.
    """

    seconds: float
    cpu: float
    block: float
    requests: dict[str, int]


class Polls:
    """Recognises the polls of a Synapse by the requests that the stub SFU gets."""

    def __init__(self, synapse: Synapse, sfu: StubSfu) -> None:
        self._synapse = synapse
        self._sfu = sfu
        self._next = 0.0

    def _asked(self) -> dict[str, Any]:
        asked: dict[str, Any] = self._sfu.get("/asked")
        return asked

    def count(self) -> int:
        """The number of polls since the last change of the stub's participants."""
        return int(self._asked().get("ListRooms", [0])[0])

    def first(self) -> Poll:
        """The first poll after Synapse's start, which lists every room."""
        return self._measure(0)

    def next(self) -> Poll:
        """The next poll. Nothing changes in the rooms."""
        began, used = time.monotonic(), self._synapse.main.cpu_seconds()
        time.sleep(max(0.0, self._next - AROUND_SEC - time.monotonic()))
        idle = time.monotonic() - began
        # After a poll that takes nearly the whole interval, no idle time is left to compare with.
        rate = (self._synapse.main.cpu_seconds() - used) / idle if idle > 1 else 0.0
        return self._measure(rate)

    def _measure(self, idle_cpu: float) -> Poll:
        before = {method: asked[0] for method, asked in self._asked().items()}
        polls = before.get("ListRooms", 0)
        began, used = time.monotonic(), self._synapse.main.cpu_seconds()
        with calls.sampling(self._synapse, SAMPLE_SEC) as times:
            wait_until(lambda: self.count() > polls, "poll", 120)
            self._wait_for_quiet()
            asked = self._asked()
            cpu = self._synapse.main.cpu_seconds() - used
            cpu -= idle_cpu * (time.monotonic() - began)
        first = asked["ListRooms"][2]
        last = max(at for _, _, at in asked.values())
        self._next = first + POLL_SEC
        # The requests that measure the delay cost CPU time, too.
        cpu -= len(times) * self._cpu_of_a_sample()
        requests = {m: number - before.get(m, 0) for m, (number, _, _) in asked.items()}
        return Poll(last - first, cpu, max(times), requests)

    def _wait_for_quiet(self) -> None:
        """Waits until LiveKit has had no request for a while."""
        count, since = -1, time.monotonic()
        while time.monotonic() < since + AROUND_SEC:
            time.sleep(0.2)
            now = sum(asked[0] for asked in self._asked().values())
            if now != count:
                count, since = now, time.monotonic()

    def _cpu_of_a_sample(self) -> float:
        with calls.sampling(self._synapse, SAMPLE_SEC) as times:
            used = self._synapse.main.cpu_seconds()
            time.sleep(1)
            return (self._synapse.main.cpu_seconds() - used) / len(times)


def _participants(users: Sequence[User], room_id: str, numbers: range) -> list[list[Participant]]:
    """The participants of several calls of one Matrix room, ordered by call."""
    return [
        [
            Participant(users[(PARTICIPANTS * n + i) % USERS], room_id, f"slot{n}", f"DEVICE{i}")
            for i in range(PARTICIPANTS)
        ]
        for n in numbers
    ]


def _row(number: int, delegations: int, what: str, polls: Sequence[Poll], has_goal: bool) -> str:
    cpu_ms = 1000 * statistics.median(poll.cpu for poll in polls) / number
    block_ms = 1000 * statistics.median(poll.block for poll in polls)

    def requests(method: str) -> int:
        return round(statistics.median(poll.requests.get(method, 0) for poll in polls))

    row = (
        f"{number:>7,}{delegations:13}  {what:6}{statistics.median(p.seconds for p in polls):8.1f}"
        f"{cpu_ms:9.3f}{block_ms:9.0f}{requests('ListParticipants'):9}"
        f"{requests('GetParticipant'):9}"
    )
    if not has_goal:
        return row
    missed = ["block"] * (block_ms > GOAL_BLOCK_MS)
    if not delegations:
        missed += ["CPU"] * (cpu_ms > GOAL_MS)
        missed += ["listings"] * (requests("ListParticipants") > number * POLL_SEC / 300 + 1)
    return row + "  " + (f"missed: {', '.join(missed)}" if missed else "met")


def _vanish(synapse: Synapse, sfu: StubSfu, call: Sequence[Participant], polls: Polls) -> None:
    """Prints how soon a poll notices a participant who leaves while another one joins."""
    polls.next()
    now_ms = int(1000 * time.time())
    calls.leave(sfu, call[:1])
    sfu.put("/rooms", {call[0].livekit_room: {"@another:server:DEVICE": {}}})
    wait_until(lambda: calls.leaves_since(synapse, now_ms)[0] > 0, "leave", 5 * POLL_SEC)
    # `/rooms` resets the counts.
    number, seconds = polls.count(), calls.leaves_since(synapse, now_ms)[1] / 1000 - now_ms / 1000
    print(
        f"a delegated participant who vanished without a webhook while another one joined: the"
        f" leave was sent after {number} polls, {seconds:.0f} s (goal: 2 polls)",
        flush=True,
    )


def measure(directory: Path, rounds: int, is_quick: bool) -> None:
    """Runs the benchmark and prints the tables.

    Args:
        directory: for all files.
        rounds: the number of polls of each kind.
        is_quick: whether to leave out the largest number of calls.
    """
    print(
        f"\npolls of quiet calls of {PARTICIPANTS} participants, every {POLL_SEC} s, {rounds}"
        f" rounds, medians (goals: {GOAL_MS} ms of CPU time for a call without delegations, a tenth"
        f" of these listed, no block of the reactor above {GOAL_BLOCK_MS} ms)"
    )
    print(
        f"{'calls':>7}{'delegations':>13}  {'poll':6}{'seconds':>8}{'CPU ms':>9}{'block ms':>9}"
        f"{'listed':>9}{'asked':>9}"
    )
    for delegations in DELEGATIONS:
        place = directory / f"{delegations}"
        place.mkdir()
        sfu = StubSfu(place)
        synapse = Synapse("poll", place, module_config(sfu, POLL_SEC))
        try:
            sfu.start()
            synapse.start()
            synapse.wait_ready()
            users = calls.users(synapse, USERS)
            room_id = calls.room(users)
            done = 0
            for number in CALLS[:-1] if is_quick else CALLS:
                synapse.stop()
                new = _participants(users, room_id, range(done, number))
                done = number
                calls.note_calls(synapse, [call[0] for call in new])
                if delegations:
                    calls.delegate(synapse, [p for call in new for p in call[:delegations]])
                calls.join(sfu, [p for call in new for p in call])
                synapse.start()
                synapse.wait_ready()
                polls = Polls(synapse, sfu)
                first = polls.first()
                print(_row(number, delegations, "first", [first], False), flush=True)
                quiet = [polls.next() for _ in range(rounds)]
                print(_row(number, delegations, "quiet", quiet, True), flush=True)
                if delegations and number == WITH_A_VANISHED:
                    _vanish(synapse, sfu, new[0], polls)
        finally:
            stop_all([sfu.process, *synapse.processes])
