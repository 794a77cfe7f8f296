# SPDX-License-Identifier: Apache-2.0
"""The module's tables on a real PostgreSQL, with as many writers as a large homeserver has."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from threading import Barrier
from types import SimpleNamespace
from typing import Any, TypeVar, cast
from unittest.mock import AsyncMock, patch

import pytest

from synapse_lk_jwt.compat.database import IsolationLevel, PostgresEngine
from synapse_lk_jwt.compat.delayed_events import DelayedEvents
from synapse_lk_jwt.compat.module_database import ModuleDatabase
from synapse_lk_jwt.delegation import tables as delegation_tables
from synapse_lk_jwt.delegation.service import DelegationService, QuerySfu, Task
from synapse_lk_jwt.delegation.state_machine import Signal
from synapse_lk_jwt.delegation.tables import BATCH, DelegationTable
from synapse_lk_jwt.livekit import tables as livekit_tables
from synapse_lk_jwt.livekit.participants import Listing
from synapse_lk_jwt.livekit.tables import MAX_SLOTS, NOTE_AGAIN_MS, CallTable, TooManySlots
from testbed.postgres import Postgres
from testbed.sets import running

T = TypeVar("T")

ROOM = "!room:example.org"
HOUR_MS = 3_600_000
WRITERS = 16
DATABASE = "tables"
# As many attempts as Synapse makes.
ATTEMPTS = 5


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    server = Postgres(tmp_path_factory.mktemp("postgres"))
    with running(server):
        server.create_database(DATABASE)
        with closing(server.connect(DATABASE)) as connection, connection.cursor() as cursor:
            # What the module uses of Synapse's own tables.
            cursor.execute("CREATE TABLE schema_version (version INTEGER)")
            cursor.execute(
                "CREATE TABLE delayed_events (delay_id TEXT, user_localpart TEXT, delay BIGINT,"
                " send_ts BIGINT, room_id TEXT, event_type TEXT, state_key TEXT,"
                " origin_server_ts BIGINT, content TEXT, is_processed BOOLEAN DEFAULT FALSE,"
                " finalised_ts BIGINT)"
            )
            connection.commit()
        yield server


class Transaction:
    """A cursor that accepts `?` as Synapse's does, and has its engine."""

    def __init__(self, cursor: Any, engine: PostgresEngine) -> None:
        self._cursor = cursor
        self.database_engine = engine
        self.statements: list[tuple[str, int]] = []

    def execute(self, statement: str, args: Any = ()) -> None:
        self._cursor.execute(statement.replace("?", "%s"), tuple(args))
        self.statements.append((statement, self._cursor.rowcount))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._cursor)


class Process:
    """What one process of Synapse has of the module, with a connection of its own.

    Attributes:
        calls: the calls.
        table: the delegations.
        service: works on them. Its tasks are not run.
        tasks: the tasks that it would have run.
        failed: how many attempts at a transaction failed.
        transactions: the statements of each transaction, with their numbers of rows.
    """

    def __init__(self, postgres: Postgres) -> None:
        self._connection = postgres.connect(DATABASE)
        self._engine = PostgresEngine({})
        self.failed = 0
        self.transactions: list[list[tuple[str, int]]] = []
        homeserver: Any = SimpleNamespace(
            clock=self,
            database=SimpleNamespace(run_interaction=self._run, error=postgres_error()),
            delayed_events=DelayedEvents(cast(Any, self), are_enabled=True),
        )
        database = ModuleDatabase(homeserver)
        self.calls = CallTable(database)
        self.table = DelegationTable(database)
        self.service = DelegationService(
            homeserver, database, self.table, self.calls, rooms=AsyncMock()
        )
        self.tasks: list[Task] = []
        patch.object(self.service, "run_tasks", self.tasks.extend).start()

    def time_msec(self) -> int:
        return int(time.time() * 1000)

    async def _run(
        self, desc: str, func: Callable[..., Any], *args: Any, isolation_level: Any = None
    ) -> Any:
        """As Synapse: REPEATABLE READ unless the caller chooses another level, five attempts."""
        level = {None: "REPEATABLE READ", IsolationLevel.READ_COMMITTED: "READ COMMITTED"}
        attempts = 0
        while True:
            try:
                self._connection.set_session(isolation_level=level[isolation_level])
                with self._connection, self._connection.cursor() as cursor:
                    txn = Transaction(cursor, self._engine)
                    result = func(txn, *args)
            except postgres_error():
                self.failed += 1
                attempts += 1
                if attempts == ATTEMPTS:
                    raise
            else:
                self.transactions.append(txn.statements)
                return result

    def execute(self, statement: str, args: Any = ()) -> None:
        with self._connection, self._connection.cursor() as cursor:
            cursor.execute(statement, args)

    def close(self) -> None:
        self._connection.close()


def postgres_error() -> type[Exception]:
    import psycopg2

    return psycopg2.Error


def do(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


@pytest.fixture
def processes(postgres: Postgres) -> Iterator[list[Process]]:
    opened = [Process(postgres) for _ in range(WRITERS)]
    for process in opened:
        do(process.calls.all())
    for table in ("calls", "owners", "delegations", "identities"):
        opened[0].execute(f"DELETE FROM synapse_lk_jwt_{table}")
    opened[0].execute("DELETE FROM delayed_events")
    yield opened
    for process in opened:
        process.close()


def at_once(processes: list[Process], work: Callable[[int, Process], Any]) -> list[Any]:
    """Lets all processes work at the same moment. An exception of one is its result."""
    barrier = Barrier(len(processes))

    def one(number: int) -> Any:
        barrier.wait()
        try:
            return work(number, processes[number])
        except Exception as e:
            return e

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(one, range(len(processes))))


def note_call(livekit_room: str, number: int, process: Process) -> None:
    do(process.calls.note(livekit_room, ROOM))


@pytest.mark.parametrize("again_ms", [NOTE_AGAIN_MS, 0])
def test_note_call_from_sixteen_processes_fails_for_none(
    again_ms: int, processes: list[Process]
) -> None:
    with patch.object(livekit_tables, "NOTE_AGAIN_MS", again_ms):
        for number in range(20):
            room = f"call{number % 2}"
            noted = at_once(processes, partial(note_call, room))
            assert noted == [None] * WRITERS
    assert sum(process.failed for process in processes) == 0
    assert do(processes[0].calls.all()) == {"call0": ROOM, "call1": ROOM}


def test_note_call_of_a_call_that_was_just_noted_writes_nothing(processes: list[Process]) -> None:
    do(processes[0].calls.note("call", ROOM))
    processes[1].transactions.clear()
    do(processes[1].calls.note("call", ROOM))
    ((statement,),) = processes[1].transactions
    assert statement[0].startswith("SELECT")


def test_on_joined_from_sixteen_processes_fails_for_none(processes: list[Process]) -> None:
    with patch.object(livekit_tables, "NOTE_AGAIN_MS", 0):
        for _ in range(20):
            joined = at_once(
                processes,
                lambda number, process: do(
                    process.service.on_joined("call", f"identity{number}", "PA_1", ROOM)
                ),
            )
            assert joined == [None] * WRITERS
    assert sum(process.failed for process in processes) == 0


def test_note_call_of_many_new_slots_at_once_keeps_the_limit(processes: list[Process]) -> None:
    for number in range(10):
        do(processes[0].calls.note(f"call{number}", ROOM))
    noted = at_once(processes, lambda number, process: do(process.calls.note(f"new{number}", ROOM)))
    refused = [result for result in noted if isinstance(result, TooManySlots)]
    assert len(refused) == WRITERS - 10
    assert noted.count(None) == 10
    assert len(do(processes[0].calls.all())) == MAX_SLOTS


def fill(process: Process, number: int, due_ts: int) -> None:
    """Delegates the leaves of connected participants in one LiveKit room."""
    for index in range(number):
        process.execute(
            "INSERT INTO synapse_lk_jwt_delegations (delay_id, user_id, room_id, livekit_room,"
            " member_identity, event_type, delay_ms, created_ts, has_multiple_identities, phase,"
            " due_ts, restarted_ts, connected_ts, suspected_gone_ts, attempts)"
            " VALUES (%s, %s, %s, 'call', 'm', 't', %s, 0, 0, 'connected', %s, 0, 0, 0, 0)",
            (f"delay{index:04}", f"@user{index}:example.org", ROOM, HOUR_MS, due_ts),
        )
        process.execute(
            "INSERT INTO synapse_lk_jwt_identities (livekit_room, identity, delay_id)"
            " VALUES ('call', %s, %s)",
            (f"identity{index}", f"delay{index:04}"),
        )
        process.execute(
            "INSERT INTO delayed_events (delay_id, user_localpart, delay, send_ts)"
            " VALUES (%s, %s, %s, 0)",
            (f"delay{index:04}", f"user{index}", HOUR_MS),
        )


def selected(statements: list[tuple[str, int]]) -> list[int]:
    """The numbers of rows that each SELECT of a transaction has read."""
    return [rows for statement, rows in statements if statement.startswith("SELECT")]


def test_on_room_finished_thousand_participants_are_suspected_in_batches(
    processes: list[Process],
) -> None:
    process = processes[0]
    fill(process, 1_000, 2**53)
    process.transactions.clear()
    do(process.service.on_room_finished("call"))
    queries = [task for task in process.tasks if isinstance(task, QuerySfu)]
    assert {task.delay_id: set(task.identities) for task in queries} == {
        f"delay{index:04}": {f"identity{index}"} for index in range(1_000)
    }
    # The call itself, ten batches, and the one that finds no more.
    assert len(process.transactions) == 12
    for statements in process.transactions:
        # The delegations and the identities of all of them.
        assert len(selected(statements)) <= 2
        assert max(selected(statements), default=0) <= BATCH


def test_on_poll_three_hundred_absent_participants_take_three_transactions(
    processes: list[Process],
) -> None:
    process = processes[0]
    fill(process, 300, 2**53)
    tracked = do(process.table.tracked())
    process.transactions.clear()
    do(process.service.on_poll(tracked, Listing(process.time_msec(), ())))
    assert len(process.transactions) == 3
    assert max(rows for txn in process.transactions for rows in selected(txn)) <= BATCH
    assert all(not tracked.is_settled for tracked in do(process.table.tracked()))


@pytest.mark.parametrize("livekit_room", [None, "call"])
def test_tracked_reads_in_batches_and_names_each_delegation_once(
    livekit_room: str | None, processes: list[Process]
) -> None:
    process = processes[0]
    fill(process, 25, 2**53)
    process.transactions.clear()
    with patch.object(delegation_tables, "READ_BATCH", 10):
        tracked = do(process.table.tracked(livekit_room))
    assert [delegation.delay_id for delegation in tracked] == [f"delay{i:04}" for i in range(25)]
    assert [selected(txn) for txn in process.transactions] == [[10], [10], [5]]


def test_process_due_event_that_is_finalised_ends_its_delegation(processes: list[Process]) -> None:
    process = processes[0]
    fill(process, 2, 0)
    process.execute("UPDATE delayed_events SET finalised_ts = 1 WHERE delay_id = 'delay0000'")
    do(process.service.process_due())
    assert process.tasks == []
    assert [tracked.delay_id for tracked in do(process.table.tracked())] == ["delay0001"]


def test_writers_of_the_same_delegations_do_not_fail(processes: list[Process]) -> None:
    number = 300
    fill(processes[0], number, 0)
    tracked = do(processes[0].table.tracked())

    def work(index: int, process: Process) -> None:
        service = process.service
        for step in range(8):
            identity = f"identity{(number - 1 - 7 * step - index) % number}"
            match index % 6:
                case 0:
                    do(service.process_due())
                case 1:
                    do(service.on_room_finished("call"))
                case 2:
                    do(service.on_joined("call", identity, "PA_1", None))
                case 3:
                    delay_id = f"delay{(number - 1 - 5 * step - index) % number:04}"
                    do(service.apply_signal(delay_id, Signal.SEEN))
                case 4:
                    do(service.on_poll(tracked, Listing(process.time_msec(), ())))
                case 5:
                    do(service.on_session_replaced("call", identity, "PA_1"))

    assert at_once(processes, work) == [None] * WRITERS
    assert sum(process.failed for process in processes) == 0
