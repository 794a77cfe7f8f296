# SPDX-License-Identifier: Apache-2.0
"""Measures tokens per second on a real Synapse, compared with Synapse's own requests."""

import argparse
import asyncio
import os
import platform
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attr

from benchmarks import ending, hanging, kicks, leaves, poll, workers
from benchmarks.load import Result, run
from benchmarks.setting import (
    KEY,
    RATE_OFF,
    SECRET,
    URL,
    StubSfu,
    Tokens,
    as_json,
    http_request,
    port,
)
from testbed import service
from testbed.federation import authorization
from testbed.matrix import User
from testbed.process import free_port, stop_all
from testbed.synapse import Synapse

USERS = 50
CONNECTIONS = 16
STORM = 1000


@attr.s(auto_attribs=True, frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: the endpoint.
        baseline: the row that it is compared with.
        goal: the intended requests per second, divided by those of the baseline.
        make: creates a number of requests.
    """

    name: str
    baseline: str | None
    goal: float | None
    make: Callable[[int], list[bytes]]


class Bench:
    """A homeserver with users and rooms, a second one that federates with it, and a stub SFU."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sfu_port = free_port()
        self.a = Synapse("a", directory, self.module_config())
        self.b = Synapse("b", directory)
        self.port = port(self.a.client_url)
        listener = {"type": "http", "bind_addresses": ["127.0.0.1"]}
        self.a.extra_config["listeners"] = [
            {**listener, "port": self.port, "resources": [{"names": ["client", "federation"]}]},
            {
                **listener,
                "port": port(self.a.server_name),
                "tls": True,
                "resources": [{"names": ["federation", "openid"]}],
            },
        ]

    def module_config(self) -> dict[str, Any]:
        return {
            "livekit_url": URL,
            "livekit_internal_url": f"http://127.0.0.1:{self.sfu_port}",
            "livekit_key": KEY,
            "livekit_secret": SECRET,
            "rc_token": RATE_OFF,
            "rc_openid": RATE_OFF,
        }

    def sfu(self, delay_ms: int) -> StubSfu:
        """Starts a stub SFU."""
        sfu = StubSfu(self.directory, delay_ms, self.sfu_port)
        sfu.start()
        return sfu

    def start(self) -> None:
        """Starts the homeservers and creates users and rooms."""
        for synapse in (self.a, self.b):
            synapse.start()
        for synapse in (self.a, self.b):
            synapse.wait_ready()
        self.users = [self.a.register(f"user{number}") for number in range(USERS)]
        self.rita: User = self.b.register("rita")
        self.room_id = self.users[0].create_room(preset="public_chat")
        for user in self.users[1:]:
            user.join(self.room_id)
        self.rita.join(self.room_id, via=[self.a.server_name])
        self.tokens = Tokens(self.a, self.users, self.room_id)

    def rows(self) -> list[Row]:
        """The rows of the table."""
        return [
            Row("whoami", None, None, self._whoami),
            Row("/sfu/get", "whoami", 0.62, self.tokens.sfu_get),
            Row("/get_token", "whoami", 0.62, self.tokens.get_token),
            Row("client get_token", "whoami", 0.75, self.tokens.client_get_token),
            Row("federation openid/userinfo", None, None, self._userinfo),
            Row("federation get_token", "federation openid/userinfo", None, self._federation_token),
        ]

    def _whoami(self, count: int) -> list[bytes]:
        path = "/_matrix/client/v3/account/whoami"
        requests = [_request("GET", path, user=user) for user in self.users]
        return [requests[number % USERS] for number in range(count)]

    def _userinfo(self, count: int) -> list[bytes]:
        path = "/_matrix/federation/v1/openid/userinfo?access_token="
        return [
            _request("GET", path + token["access_token"]) for _, token in self.tokens.openid(count)
        ]

    def _federation_token(self, count: int) -> list[bytes]:
        path = "/_matrix/federation/v1/rtc/livekit/get_token"
        body = service.homeserver_body(self.rita, self.room_id, URL, user_id=self.rita.user_id)
        signed = authorization(self.b, self.a.server_name, "POST", path, body)
        return [_request("POST", path, body, authorization=signed)] * count


def _request(
    method: str,
    path: str,
    body: Any = None,
    user: User | None = None,
    authorization: str | None = None,
) -> bytes:
    if user is not None:
        authorization = f"Bearer {user.access_token}"
    return http_request(method, path, None if body is None else as_json(body), authorization)


def measure(bench: Bench, rounds: int, seconds: float) -> None:
    """Prints the table of requests per second."""
    rows = bench.rows()
    results: dict[str, list[Result]] = {row.name: [] for row in rows}
    cpu: dict[str, list[float]] = {row.name: [] for row in rows}
    for row in rows:
        # Warms up caches, and makes Synapse fetch the key of the other homeserver.
        asyncio.run(run(bench.port, row.make(4 * USERS), 4, 10))
    for _ in range(rounds):
        for row in rows:
            requests = row.make(int(4000 * seconds))
            used = bench.a.main.cpu_seconds()
            result = asyncio.run(run(bench.port, requests, CONNECTIONS, seconds))
            used = bench.a.main.cpu_seconds() - used
            results[row.name].append(result)
            cpu[row.name].append(used / len(result.times))

    def median(name: str, what: Callable[[Result], float]) -> float:
        return statistics.median(map(what, results[name]))

    columns = "".join(f"{column:>8}" for column in ("req/s", "p50 ms", "p99 ms", "CPU ms"))
    print(f"\n{'':28}{columns}{'CPU':>8}{'ratio':>8}  goal")
    for row in rows:
        rate = median(row.name, lambda result: result.per_second)
        line = f"{row.name:28}{rate:8.0f}"
        for part in (0.5, 0.99):
            line += f"{1000 * median(row.name, lambda r, part=part: r.quantile(part)):8.1f}"  # type: ignore[misc]
        cpu_seconds = statistics.median(cpu[row.name])
        line += f"{1000 * cpu_seconds:8.3f}"
        if row.baseline is not None:
            line += f"{statistics.median(cpu[row.baseline]) / cpu_seconds:8.2f}"
            ratio = rate / median(row.baseline, lambda result: result.per_second)
            line += f"{ratio:8.2f}"
            if row.goal is not None:
                line += f"  {'met' if ratio >= row.goal else 'missed'}, {row.goal} x {row.baseline}"
            else:
                line += f"  x {row.baseline}"
        print(line)


def storm(bench: Bench) -> None:
    """Prints how long token requests take when very many users join a new call at once."""
    sfu = bench.sfu(delay_ms=50)
    try:
        # A new Matrix room, so that the module has cached nothing of the call.
        bench.tokens.room_id = bench.users[0].create_room(preset="public_chat")
        for user in bench.users[1:]:
            user.join(bench.tokens.room_id)
        requests = bench.tokens.get_token(STORM)
        result = asyncio.run(run(bench.port, requests, STORM, 60))
        print(
            f"\nstorm: {STORM} requests for one new call at once, an SFU that takes 50 ms: all"
            f" served in {result.seconds:.2f} s, p50 {result.quantile(0.5):.2f} s,"
            f" p99 {result.quantile(0.99):.2f} s, CreateRoom requests: {sfu.get('/count')}"
        )
    finally:
        sfu.stop()


def cost_of_the_module(directory: Path, starts: int) -> None:
    """Prints what the module adds to Synapse's start time and memory."""
    seen: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
    directory.mkdir()
    synapses = {
        True: Synapse(
            "with",
            directory,
            {"livekit_url": URL, "livekit_key": KEY, "livekit_secret": "s" * 32},
        ),
        False: Synapse("without", directory),
    }
    for number in range(starts + 1):
        for module, synapse in synapses.items():
            began = time.perf_counter()
            synapse.start()
            synapse.wait_ready()
            took = time.perf_counter() - began
            # The first start creates the database.
            if number > 0:
                seen[module].append((took, synapse.main.memory()))
            synapse.stop()
    times = {module: statistics.median(t for t, _ in seen[module]) for module in seen}
    memory = {module: statistics.median(m for _, m in seen[module]) for module in seen}
    added_ms = 1000 * (times[True] - times[False])
    added_mib = (memory[True] - memory[False]) / 2**20
    print(
        f"\nthe module adds {added_ms:.0f} ms to a start of {times[False]:.2f} s (goal: below 300),"
        f" and {added_mib:.1f} MiB to {memory[False] / 2**20:.0f} MiB (goal: below 25)"
    )


def profile(bench: Bench, name: str, seconds: float) -> None:
    """Prints a profile of the requests of one row."""
    (row,) = (row for row in bench.rows() if row.name == name)
    bench.a.stop()
    output = bench.directory / "profile"
    command = bench.a.main.command
    bench.a.main.command = [command[0], "-m", "cProfile", "-o", str(output), *command[1:]]
    bench.a.start()
    bench.a.wait_ready()
    result = asyncio.run(run(bench.port, row.make(int(4000 * seconds)), CONNECTIONS, seconds))
    bench.a.stop()
    print(f"{len(result.times)} requests to {name}")
    pstats.Stats(str(output)).sort_stats("cumulative").print_stats(r"synapse_lk_jwt|livekit|jwt/")
    pstats.Stats(str(output)).sort_stats("tottime").print_stats(40)


def main() -> None:
    """Runs the benchmark that the command line chooses."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each row is measured")
    parser.add_argument(
        "--seconds", type=float, default=5, help="seconds for each row in each round"
    )
    parser.add_argument(
        "--starts", type=int, default=5, help="starts of Synapse with and without the module"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one short round, to test the benchmark"
    )
    parser.add_argument("--profile", metavar="ROW", help="profile the requests of one row")
    parser.add_argument(
        "--leaves", action="store_true", help="removals and leaves instead of tokens"
    )
    parser.add_argument(
        "--workers", action="store_true", help="tokens of one worker and of two, on PostgreSQL"
    )
    parser.add_argument("--hanging", action="store_true", help="a LiveKit that never answers")
    parser.add_argument(
        "--minutes", type=float, default=5, help="duration of the outage with --hanging"
    )
    parser.add_argument("--poll", action="store_true", help="polls of up to 10,000 calls")
    parser.add_argument(
        "--end-of-call", action="store_true", help="a call of 1,000 participants that ends"
    )
    parser.add_argument("--kicks", action="store_true", help="kicks during a flood in other rooms")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds, options.starts, options.minutes = 1, 1, 1, 0.5
    database = "PostgreSQL" if options.workers else "SQLite"
    where = (
        f"Synapse {version('matrix-synapse')} on {database}, log level INFO, Python"
        f" {platform.python_version()}, {os.cpu_count()} cores"
    )
    if options.workers:
        print(where)
        with tempfile.TemporaryDirectory() as name:
            workers.measure(Path(name), options.rounds, options.seconds, options.quick)
        return
    others: dict[str, Callable[[Path], None]] = {
        "leaves": lambda directory: leaves.measure(directory, options.quick),
        "hanging": lambda directory: hanging.measure(directory, 60 * options.minutes),
        "poll": lambda directory: poll.measure(directory, options.rounds, options.quick),
        "end_of_call": lambda directory: ending.measure(directory, options.rounds, options.quick),
        "kicks": lambda directory: kicks.measure(directory, options.quick),
    }
    chosen = [other for name, other in others.items() if getattr(options, name)]
    if chosen:
        print(where)
        for other in chosen:
            with tempfile.TemporaryDirectory() as name:
                other(Path(name))
        return
    print(
        f"{where}; {CONNECTIONS} connections,"
        f" {options.rounds} rounds of {options.seconds:g} s, medians; {USERS} users in one call"
    )
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        bench = Bench(directory)
        sfu = bench.sfu(delay_ms=0)
        try:
            bench.start()
            if options.profile:
                profile(bench, options.profile, options.seconds)
                return
            measure(bench, options.rounds, options.seconds)
            sfu.stop()
            storm(bench)
        finally:
            stop_all([sfu.process, *bench.a.processes, *bench.b.processes])
        cost_of_the_module(directory / "starts", options.starts)


if __name__ == "__main__":
    main()
