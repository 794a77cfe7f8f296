# SPDX-License-Identifier: Apache-2.0
"""What a thousand leaves cost while LiveKit hangs, and how soon they are sent afterwards."""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import attr

from benchmarks import calls
from benchmarks.calls import Participant
from benchmarks.leaves import webhook
from benchmarks.load import run
from benchmarks.setting import URL, StubSfu, module_config, port
from testbed import service
from testbed.http import WrongAnswer, http
from testbed.matrix import User
from testbed.process import stop_all, wait_until
from testbed.synapse import Synapse

PARTICIPANTS = 1000
IN_A_LARGE_CALL = 100
USERS = 20
POLL_SEC = 30
ROWS = 10
GOAL_RUNNING = 60
GOAL_SEC = 20


@attr.s(auto_attribs=True, frozen=True)
class Moment:
    """Measurements while LiveKit hangs.

    Attributes:
        running: the number of running background processes of the module.
        in_flight: the highest number of requests that waited for LiveKit since the last sample.
        cpu: CPU seconds that Synapse uses in a second.
    """

    running: int
    in_flight: int
    cpu: float


def guest(synapse: Synapse, room_id: str) -> User:
    """Creates a guest in a room. Tokens of guests are restricted."""
    url = f"{synapse.client_url}/_matrix/client/v3/register?kind=guest"
    account = http("POST", url, {}).ok()
    guest = User(synapse.client_url, account["user_id"], "guest", account["access_token"])
    guest.join(room_id)
    return guest


@contextmanager
def timing(do: Callable[[], object], pause_sec: float = 0.2) -> Iterator[list[float]]:
    """Calls a function repeatedly, and records its seconds, or infinity if it fails."""
    times: list[float] = []
    is_over = threading.Event()

    def repeat() -> None:
        while not is_over.wait(pause_sec):
            began = time.perf_counter()
            try:
                do()
            except WrongAnswer:
                times.append(math.inf)
            else:
                times.append(time.perf_counter() - began)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield times
    finally:
        is_over.set()
        thread.join()


def _many_calls(users: Sequence[User]) -> list[Participant]:
    rooms = calls.rooms(users, PARTICIPANTS)
    return [
        Participant(users[n % USERS], room_id, service.SLOT, f"DEVICE{n}")
        for n, room_id in enumerate(rooms)
    ]


def _large_calls(users: Sequence[User]) -> list[Participant]:
    rooms = [calls.room(users) for _ in range(PARTICIPANTS // IN_A_LARGE_CALL)]
    return [
        Participant(users[n % USERS], room_id, service.SLOT, f"DEVICE{number}-{n}")
        for number, room_id in enumerate(rooms)
        for n in range(IN_A_LARGE_CALL)
    ]


def _measure(
    directory: Path,
    name: str,
    make: Callable[[Sequence[User]], list[Participant]],
    seconds: float,
) -> None:
    directory.mkdir()
    sfu = StubSfu(directory)
    synapse = Synapse("hanging", directory, module_config(sfu, POLL_SEC))
    synapse.extra_config["allow_guest_access"] = True
    try:
        sfu.start()
        synapse.start()
        synapse.wait_ready()
        users = calls.users(synapse, USERS)
        participants = make(users)
        calls.join(sfu, participants)
        calls.note_calls(synapse, participants)
        calls.delegate(synapse, participants)
        access = {"type": "m.room.guest_access", "content": {"guest_access": "can_join"}}
        open_room = users[0].create_room(preset="public_chat", initial_state=[access])
        restricted = guest(synapse, open_room)
        body = service.homeserver_body(restricted, open_room, URL)

        def token() -> None:
            service.homeserver_get_token(restricted, body).ok()

        def message() -> None:
            users[0].send_text(open_room, "Good morning")

        # Warms up caches.
        token()
        message()
        print(
            f"\n{PARTICIPANTS} participants in {name} leave while LiveKit hangs for"
            f" {seconds:g} s (goal: at most {GOAL_RUNNING} processes and requests)"
        )
        print(f"{'seconds':>8}{'processes':>11}{'requests':>10}{'CPU':>7}")
        sfu.hang()
        began = time.monotonic()
        moments = []
        with timing(token) as tokens, timing(message) as messages:
            calls.leave(sfu, participants)
            webhooks = [
                webhook("participant_left", p.livekit_room, p.identity, p.attributes)
                for p in participants
            ]
            asyncio.run(run(port(synapse.client_url), webhooks, 16, 600))
            used, since = synapse.main.cpu_seconds(), time.monotonic()
            for row in range(1, ROWS + 1):
                time.sleep(max(1.0, began + row * seconds / ROWS - time.monotonic()))
                now = time.monotonic()
                cpu = (synapse.main.cpu_seconds() - used) / (now - since)
                running = calls.metric(
                    synapse, "synapse_background_process_in_flight_count", '"synapse_lk_jwt'
                )
                moment = Moment(round(running), sfu.in_flight()[1], cpu)
                moments.append(moment)
                print(
                    f"{now - began:8.0f}{moment.running:11}{moment.in_flight:10}{moment.cpu:7.2f}",
                    flush=True,
                )
                used, since = synapse.main.cpu_seconds(), time.monotonic()
            for what, times in (("token of a restricted user", tokens), ("message", messages)):
                print(
                    f"{what}: p50 {1000 * calls.quantile(times, 0.5):.0f} ms,"
                    f" p99 {1000 * calls.quantile(times, 0.99):.0f} ms,"
                    f" max {1000 * max(times):.0f} ms,"
                    f" failed: {times.count(math.inf)} of {len(times)}"
                )
            again_ms = int(1000 * time.time())
            sfu.hang([])
            used = synapse.main.cpu_seconds()

            def all_are_sent() -> bool:
                time.sleep(0.2)
                return calls.leaves_since(synapse, again_ms)[0] >= PARTICIPANTS

            wait_until(all_are_sent, "all leaves", 300)
        _, last_ms = calls.leaves_since(synapse, again_ms)
        taken = (last_ms - again_ms) / 1000
        most = max(max(moment.running, moment.in_flight) for moment in moments)
        print(
            f"at most {most}: {'met' if most <= GOAL_RUNNING else 'missed'}; all leaves are sent"
            f" {taken:.1f} s after LiveKit answers again ({synapse.main.cpu_seconds() - used:.1f} s"
            f" of CPU time): {'met' if taken <= GOAL_SEC else 'missed'}, goal {GOAL_SEC} s"
        )
    finally:
        stop_all([sfu.process, *synapse.processes])


def measure(directory: Path, seconds: float) -> None:
    """Runs the benchmark and prints the tables.

    Args:
        directory: for all files.
        seconds: how long LiveKit hangs each time.
    """
    large = f"{PARTICIPANTS // IN_A_LARGE_CALL} calls of {IN_A_LARGE_CALL}"
    _measure(directory / "large", large, _large_calls, seconds)
    _measure(directory / "many", f"{PARTICIPANTS:,} calls", _many_calls, seconds)
