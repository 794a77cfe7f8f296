# SPDX-License-Identifier: Apache-2.0
"""When Synapse stops, connected participants keep the full delay of their delayed leaves."""

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from testbed.livekit import LiveKit
from testbed.member import enter
from testbed.postgres import Postgres
from testbed.process import until
from testbed.sets import module_config, running
from testbed.synapse import Synapse

# Long enough for no other restart during the test.
DELAY_MS = 900_000


@pytest.fixture
def livekit(tmp_path: Path) -> Iterator[LiveKit]:
    server = LiveKit(tmp_path)
    with running(server):
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def postgres(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Postgres | None]:
    if request.param == "sqlite":
        yield None
        return
    server = Postgres(tmp_path)
    with running(server):
        yield server


def _execute(synapse: Synapse, postgres: Postgres | None, sql: str) -> list[tuple[Any, ...]]:
    connection: Any = (
        sqlite3.connect(synapse.directory / "homeserver.db", timeout=30)
        if postgres is None
        else postgres.connect(synapse.name)
    )
    with closing(connection), connection, closing(connection.cursor()) as cursor:
        cursor.execute(sql)
        return list(cursor.fetchall()) if cursor.description else []


def test_shutdown_restarts_the_delayed_leave_of_a_connected_participant(
    livekit: LiveKit, postgres: Postgres | None, tmp_path: Path
) -> None:
    synapse = Synapse("a", tmp_path, module_config(livekit), postgres=postgres)
    execute = partial(_execute, synapse, postgres)

    async def test() -> None:
        alice = synapse.register("alice")
        member = await enter(alice, alice.create_room(), livekit, DELAY_MS)
        await until(
            lambda: execute("SELECT phase FROM synapse_lk_jwt_delegations") == [("connected",)],
            "connected delegation",
        )
        execute("UPDATE delayed_events SET send_ts = send_ts - 60000")
        stopping_ms = time.time() * 1000
        await asyncio.to_thread(synapse.stop)
        ((send_ts,),) = execute("SELECT send_ts FROM delayed_events")
        assert send_ts >= stopping_ms + DELAY_MS

        # Without the module, the room shows the participant until that time.
        synapse.module_config = None
        await asyncio.to_thread(synapse.restart)
        assert member.is_in_room(alice)
        assert "Traceback" not in synapse.log_text()
        await member.there.leave()

    with running(synapse):
        asyncio.run(test())
