# SPDX-License-Identifier: Apache-2.0
"""What tokens, webhooks, polls and restarts cost each process of a Synapse with workers."""

import asyncio
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import attr

from benchmarks.leaves import POLL_SEC, RESTART_MS, Many, webhook
from benchmarks.load import Result, run
from benchmarks.setting import StubSfu, module_config, port
from testbed.postgres import Postgres
from testbed.process import stop_all, wait_until
from testbed.redis import Redis
from testbed.synapse import Synapse

# The number of calls in the estimate of docs/performance.md.
CALLS = 20_000
USERS_PER_CALL = 5

CONNECTIONS = 8
# With this pause each worker is busy for a third of the time, so that no process waits for a core.
PAUSE_SEC = 0.02
IDLE_SEC = 10


@attr.s(auto_attribs=True, frozen=True)
class Cost:
    """The cost of many equal operations.

    Attributes:
        count: the number of operations.
        seconds: how long they took together.
        cpu: the CPU seconds that each process used in that time.
        restarts: the number of delayed leaves that were restarted in that time.
    """

    count: int
    seconds: float
    cpu: dict[str, float]
    restarts: int

    def each_ms(self, process: str) -> float:
        """The CPU milliseconds that a process used for one operation."""
        return 1000 * self.cpu[process] / self.count

    def without(self, restarts: "Cost") -> "Cost":
        """The cost without the restarts that happened in the same time."""
        part = self.restarts / restarts.count
        cpu = {name: used - part * restarts.cpu[name] for name, used in self.cpu.items()}
        return attr.evolve(self, cpu=cpu)


class Bench:
    """A homeserver with two generic workers and a background worker, and a stub SFU."""

    def __init__(self, directory: Path, postgres: Postgres, redis: Redis, sfu: StubSfu) -> None:
        self._postgres = postgres
        self.synapse = Synapse(
            "workers",
            directory,
            module_config(sfu, POLL_SEC),
            postgres=postgres,
            redis=redis,
            workers=2,
            background_worker=True,
        )
        self._connection = postgres.connect(self.synapse.name)
        self._connection.autocommit = True
        self.ports = [port(url) for url in self.synapse.worker_urls]

    def start(self) -> None:
        """Starts the homeserver, and waits for it."""
        self.synapse.start()
        self.synapse.wait_ready()

    def cost(self, do: Callable[[], int]) -> Cost:
        """The cost of a function that returns the number of its operations."""
        before, began, began_ms = self._cpu(), time.perf_counter(), _now_ms()
        count = do()
        seconds = time.perf_counter() - began
        cpu = {name: used - before[name] for name, used in self._cpu().items()}
        return Cost(count, seconds, cpu, self.count("restarted_ms >= %s", began_ms))

    def _cpu(self) -> dict[str, float]:
        workers = self.synapse.workers
        return {
            "workers": workers["worker1"].cpu_seconds() + workers["worker2"].cpu_seconds(),
            "main": self.synapse.main.cpu_seconds(),
            "background": workers["background"].cpu_seconds(),
            "PostgreSQL": self._postgres.process.cpu_seconds_of_all(),
        }

    def analyze(self) -> None:
        """Updates PostgreSQL's statistics of the tables, as autovacuum does after a while."""
        with closing(self._connection.cursor()) as cursor:
            cursor.execute("ANALYZE")

    def count(self, condition: str, *values: object) -> int:
        """The number of delegations for which an SQL condition is true."""
        with closing(self._connection.cursor()) as cursor:
            cursor.execute(
                f"SELECT COUNT(*) FROM synapse_lk_jwt_delegations WHERE {condition}", values
            )
            return int(cursor.fetchone()[0])


def _now_ms() -> int:
    return int(1000 * time.time())


def load(
    ports: list[int], requests: list[bytes], seconds: float, pause: float = 0.0
) -> list[Result]:
    """Sends requests to several processes at once. Each process gets a part of them."""

    async def all_of_them() -> list[Result]:
        return await asyncio.gather(
            *(
                run(port, requests[number :: len(ports)], CONNECTIONS, seconds, pause)
                for number, port in enumerate(ports)
            )
        )

    return asyncio.run(all_of_them())


def measure_tokens(bench: Bench, many: Many, rounds: int, seconds: float) -> None:
    """Prints the cost of a token with one worker and with two."""
    print(
        f"\nCPU ms of one token, {rounds} rounds of {seconds:g} s with {CONNECTIONS} connections to"
        f" each worker, medians:\nwith pauses of {1000 * PAUSE_SEC:g} ms, so that no process waits"
        " for a core, and tokens/s without pauses.\n"
        "PostgreSQL and the client share the cores with the workers.\n"
        f"{'':34}{'workers':>10}{'main':>10}{'PostgreSQL':>12}{'tokens/s':>10}"
    )
    kinds = {"/get_token": many.tokens.get_token, "client get_token": many.tokens.client_get_token}
    for name, make in kinds.items():
        costs: dict[tuple[int, float], list[Cost]] = {
            (workers, pause): [] for workers in (1, 2) for pause in (PAUSE_SEC, 0.0)
        }
        load(bench.ports, make(400), 10)
        for number in range(rounds):
            # The first of the two has colder caches, so they take turns.
            for workers, pause in list(costs) if number % 2 else reversed(costs):
                ports = bench.ports if workers == 2 else [bench.ports[number % 2]]
                costs[workers, pause].append(
                    _cost_of_tokens(bench, ports, make(int(2500 * seconds)), seconds, pause)
                )
        for workers in (1, 2):
            line = f"{name + f', {workers} worker' + 's' * (workers > 1):34}"
            for process, width in (("workers", 10), ("main", 10), ("PostgreSQL", 12)):
                each = [cost.each_ms(process) for cost in costs[workers, PAUSE_SEC]]
                line += f"{statistics.median(each):{width}.3f}"
            rate = statistics.median(cost.count / cost.seconds for cost in costs[workers, 0.0])
            print(f"{line}{rate:10.0f}")
        ratio = statistics.median(
            two.each_ms("workers") / one.each_ms("workers")
            for one, two in zip(costs[1, PAUSE_SEC], costs[2, PAUSE_SEC], strict=True)
        )
        print(f"{'':34}{ratio:10.3f} x with two workers (goal: within 10 %)", flush=True)


def _cost_of_tokens(
    bench: Bench, ports: list[int], requests: list[bytes], seconds: float, pause: float
) -> Cost:
    return bench.cost(
        lambda: sum(len(result.times) for result in load(ports, requests, seconds, pause))
    )


def measure_many(bench: Bench, many: Many, sfu: StubSfu, calls: int, requests: int) -> None:
    """Prints the cost of webhooks, restarts and polls while very many users are in calls."""
    users = calls * USERS_PER_CALL
    bench.synapse.stop()
    many.fill_up_to(users)
    bench.analyze()
    bench.start()
    poll_seconds = 0.0

    def poll() -> int:
        nonlocal poll_seconds
        poll_seconds = many.wait_for_poll()
        return calls

    def wait() -> int:
        began_ms = _now_ms()
        time.sleep(IDLE_SEC)
        return bench.count("restarted_ms >= %s", began_ms)

    def send_webhooks(event: str, participants: list[tuple[str, str, str]]) -> None:
        webhooks = [webhook(event, room, identity, {}) for room, identity, _ in participants]
        load(bench.ports[:1], webhooks, 600)

    def join() -> int:
        send_webhooks("participant_joined", many.participants(requests))
        return requests

    def leave() -> int:
        gone = many.participants(requests)
        sfu.put("/gone", {room: {identity: {}} for room, identity, _ in gone})
        send_webhooks("participant_left", gone)
        delay_ids = tuple(delay_id for _, _, delay_id in gone)
        wait_until(lambda: bench.count("delay_id IN %s", delay_ids) == 0, "all leaves", 600)
        return requests

    polled = bench.cost(poll)
    # Restarts that fell due while Synapse was down.
    wait_until(lambda: bench.count("next_ms < %s", _now_ms() - 2_000) == 0, "restarts", 600)
    restarts = bench.cost(wait)
    costs = {
        "webhook of a join": bench.cost(join).without(restarts),
        "webhook of a leave, with the leave event": bench.cost(leave).without(restarts),
        "restart of a delayed leave": restarts,
        "poll, for each call": polled.without(restarts),
    }
    print(
        f"\nCPU ms, {users:,} users in {calls:,} calls\n"
        f"{'':38}{'workers':>10}{'main':>10}{'background':>12}{'PostgreSQL':>12}"
    )
    for name, cost in costs.items():
        line = f"{name:38}{cost.each_ms('workers'):10.3f}{cost.each_ms('main'):10.3f}"
        print(line + f"{cost.each_ms('background'):12.3f}{cost.each_ms('PostgreSQL'):12.3f}")
    print(f"the poll took {poll_seconds:.1f} s")
    done, wanted = restarts.count / restarts.seconds, 1000 * users / RESTART_MS
    print(f"restarts: {done:.0f} per second, of {wanted:.0f} that were due")
    for name, process in {"main": bench.synapse.main, **bench.synapse.workers}.items():
        print(f"memory of {name}: {process.memory() / 2**20:.0f} MiB")


def measure(directory: Path, rounds: int, seconds: float, is_quick: bool) -> None:
    """Runs the benchmarks and prints the tables."""
    redis, postgres, sfu = Redis(directory), Postgres(directory), StubSfu(directory)
    started = [redis.process, sfu.process]
    try:
        redis.start()
        postgres.start()
        redis.wait_ready()
        postgres.wait_ready()
        sfu.start()
        bench = Bench(directory, postgres, redis, sfu)
        started += bench.synapse.processes
        bench.start()
        many = Many(bench.synapse, sfu, USERS_PER_CALL)
        measure_tokens(bench, many, rounds, seconds)
        measure_many(bench, many, sfu, 200 if is_quick else CALLS, 50 if is_quick else 400)
    finally:
        stop_all(started)
        postgres.stop()
