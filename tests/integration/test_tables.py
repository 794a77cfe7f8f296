# SPDX-License-Identifier: Apache-2.0
"""The module's tables on a real PostgreSQL, with as many writers as a large homeserver has."""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from threading import Barrier
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest

from synapse_lk_jwt import store
from synapse_lk_jwt.compat.database import IsolationLevel, PostgresEngine
from synapse_lk_jwt.compat.delayed_events import DelayedEvents
from synapse_lk_jwt.delegation.state_machine import Action, Signal
from synapse_lk_jwt.store import Store, TooManySlots
from testbed.postgres import Postgres
from testbed.process import MissingTool
from testbed.sets import running
from testbed.skips import missing_tool

ROOM = "!room:example.org"
HOUR_MS = 3_600_000
WRITERS = 16
DATABASE = "tables"
# As many as Synapse makes.
ATTEMPTS = 5


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    try:
        server = Postgres(tmp_path_factory.mktemp("postgres"))
    except MissingTool as e:
        missing_tool(e)
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
    """A cursor that takes `?` as Synapse's does, and knows its engine."""

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
    """A store with a connection of its own, as each process of Synapse has.

    Attributes:
        store: the store.
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
        self.store = Store(homeserver)

    def time_msec(self) -> int:
        return int(time.time() * 1000)

    async def _run(
        self, desc: str, func: Callable[..., Any], *args: Any, isolation_level: Any = None
    ) -> Any:
        """As Synapse: REPEATABLE READ unless something else is asked for, five attempts."""
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

    def do(self, method: str, *args: Any, **more: Any) -> Any:
        return asyncio.run(getattr(self.store, method)(*args, **more))

    def close(self) -> None:
        self._connection.close()


def postgres_error() -> type[Exception]:
    import psycopg2

    return psycopg2.Error


@pytest.fixture
def processes(postgres: Postgres) -> Iterator[list[Process]]:
    opened = [Process(postgres) for _ in range(WRITERS)]
    for process in opened:
        process.do("calls")
    with opened[0]._connection, opened[0]._connection.cursor() as cursor:
        for table in ("calls", "owners", "delegations", "identities"):
            cursor.execute(f"DELETE FROM synapse_lk_jwt_{table}")
        cursor.execute("DELETE FROM delayed_events")
    yield opened
    for process in opened:
        process.close()


def at_once(processes: list[Process], do: Callable[[int, Process], Any]) -> list[Any]:
    """Has all processes do something at the same moment; what each raises is its result."""
    barrier = Barrier(len(processes))

    def one(number: int) -> Any:
        barrier.wait()
        try:
            return do(number, processes[number])
        except Exception as e:
            return e

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(one, range(len(processes))))


def note_call(livekit_room: str, number: int, process: Process) -> None:
    process.do("note_call", livekit_room, ROOM)


@pytest.mark.parametrize("again_ms", [store.NOTE_AGAIN_MS, 0])
def test_note_call_from_sixteen_processes_fails_for_none(
    again_ms: int, processes: list[Process]
) -> None:
    with patch.object(store, "NOTE_AGAIN_MS", again_ms):
        for number in range(20):
            room = f"call{number % 2}"
            noted = at_once(processes, partial(note_call, room))
            assert noted == [None] * WRITERS
    assert sum(process.failed for process in processes) == 0
    assert processes[0].do("calls") == {"call0": ROOM, "call1": ROOM}


def test_note_call_of_a_call_that_was_just_noted_writes_nothing(processes: list[Process]) -> None:
    processes[0].do("note_call", "call", ROOM)
    processes[1].transactions.clear()
    processes[1].do("note_call", "call", ROOM)
    ((statement,),) = processes[1].transactions
    assert statement[0].startswith("SELECT")


def test_joined_from_sixteen_processes_fails_for_none(processes: list[Process]) -> None:
    with patch.object(store, "NOTE_AGAIN_MS", 0):
        for _ in range(20):
            joined = at_once(
                processes,
                lambda number, process: process.do(
                    "joined", "call", f"identity{number}", "PA_1", ROOM
                ),
            )
            assert joined == [None] * WRITERS
    assert sum(process.failed for process in processes) == 0


def test_note_call_of_many_new_slots_at_once_keeps_the_limit(processes: list[Process]) -> None:
    for number in range(10):
        processes[0].do("note_call", f"call{number}", ROOM)
    noted = at_once(
        processes, lambda number, process: process.do("note_call", f"new{number}", ROOM)
    )
    refused = [result for result in noted if isinstance(result, TooManySlots)]
    assert len(refused) == WRITERS - 10
    assert noted.count(None) == 10
    assert len(processes[0].do("calls")) == store.MAX_SLOTS


def fill(process: Process, number: int, next_ms: int) -> None:
    """Notes that participants are connected, in one LiveKit room, and their delayed events."""
    with process._connection, process._connection.cursor() as cursor:
        for index in range(number):
            cursor.execute(
                "INSERT INTO synapse_lk_jwt_delegations (delay_id, user_id, livekit_room, member,"
                " event_type, delay_ms, taken_ms, several, phase, next_ms, restarted_ms,"
                " connected_ms, doubted_ms, tries)"
                " VALUES (%s, %s, 'call', 'm', 't', %s, 0, false, 'connected', %s, 0, 0, 0, 0)",
                (f"delay{index:04}", f"@user{index}:example.org", HOUR_MS, next_ms),
            )
            cursor.execute(
                "INSERT INTO synapse_lk_jwt_identities (livekit_room, identity, delay_id)"
                " VALUES ('call', %s, %s)",
                (f"identity{index}", f"delay{index:04}"),
            )
            cursor.execute(
                "INSERT INTO delayed_events (delay_id, user_localpart, delay, send_ts)"
                " VALUES (%s, %s, %s, 0)",
                (f"delay{index:04}", f"user{index}", HOUR_MS),
            )


def test_finished_call_of_a_thousand_is_dealt_with_in_batches(processes: list[Process]) -> None:
    process = processes[0]
    fill(process, 1_000, 2**53)
    process.transactions.clear()
    tasks = process.do("finished", "call")
    assert {task.delay_id: task.identities for task in tasks} == {
        f"delay{index:04}": {f"identity{index}"} for index in range(1_000)
    }
    assert all(task.action is Action.ASK for task in tasks)
    # The call itself, ten batches, and the one that finds no more.
    assert len(process.transactions) == 12
    for statements in process.transactions:
        selected = [rows for statement, rows in statements if statement.startswith("SELECT")]
        # The delegations and the identities of all of them.
        assert len(selected) <= 2
        assert max(selected, default=0) <= store.BATCH


def test_due_ends_the_delegation_of_a_finalised_event(processes: list[Process]) -> None:
    process = processes[0]
    fill(process, 2, 0)
    with process._connection, process._connection.cursor() as cursor:
        cursor.execute("UPDATE delayed_events SET finalised_ts = 1 WHERE delay_id = 'delay0000'")
    assert process.do("due") == ([], True)
    assert [tracked.delay_id for tracked in process.do("tracked")] == ["delay0001"]


def test_writers_of_the_same_delegations_do_not_fail(
    processes: list[Process],
) -> None:
    number = 300
    fill(processes[0], number, 0)

    def work(index: int, process: Process) -> None:
        for step in range(8):
            match index % 4:
                case 0:
                    process.do("due")
                case 1:
                    process.do("finished", "call")
                case 2:
                    identity = f"identity{(number - 1 - 7 * step - index) % number}"
                    process.do("joined", "call", identity, "PA_1", None)
                case 3:
                    delay_id = f"delay{(number - 1 - 5 * step - index) % number:04}"
                    process.do("happened", delay_id, Signal.SEEN)

    assert at_once(processes, work) == [None] * WRITERS
    assert sum(process.failed for process in processes) == 0
