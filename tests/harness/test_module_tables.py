# SPDX-License-Identifier: Apache-2.0
"""The module's tables: how they are created, and how database errors are retried."""

from typing import Any
from unittest.mock import patch

from twisted.internet.defer import fail

from synapse_lk_jwt import LiveKitJwtModule
from synapse_lk_jwt.compat import module_database
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.compat.module_database import (
    PREFIX,
    SCHEMA,
    SCHEMA_VERSION,
    ModuleDatabase,
    UnsupportedSchema,
)
from synapse_lk_jwt.livekit.tables import CallTable
from tests.harness.base import ModuleTestCase

ROOM, LIVEKIT_ROOM = "!room:test", "livekit-room"
TABLES = ("schema", "calls", "owners", "delegations", "identities", "stream", "processes")


class TablesTestCase(ModuleTestCase):
    def database(self) -> ModuleDatabase:
        """As another process has it."""
        return ModuleDatabase(Homeserver(self.hs.get_module_api()))

    def calls(self) -> CallTable:
        return CallTable(self.database())


class CreateTablesTests(TablesTestCase):
    def prepare(self, reactor: object, clock: object, hs: object) -> None:
        super().prepare(reactor, clock, hs)
        self.pump()
        for table in TABLES:
            self.get_success(
                self.store.db_pool.execute("drop", f"DROP TABLE IF EXISTS {PREFIX}{table}")
            )

    def version(self) -> int:
        version: int = self.get_success(
            self.store.db_pool.simple_select_one_onecol(f"{PREFIX}schema", {}, "version")
        )
        return version

    def test_create_tables_by_two_processes_creates_them_once(self) -> None:
        for _ in range(2):
            self.get_success(self.calls().note(LIVEKIT_ROOM, ROOM))
        assert self.get_success(self.calls().all()) == {LIVEKIT_ROOM: ROOM}
        assert self.version() == SCHEMA_VERSION

    def test_create_tables_process_that_dies_leaves_nothing_half_done(self) -> None:
        with patch.object(module_database, "SCHEMA", (*SCHEMA, "CREATE NONSENSE")):
            self.get_failure(self.calls().all(), Exception)
        self.get_success(self.calls().note(LIVEKIT_ROOM, ROOM))
        assert self.get_success(self.calls().all()) == {LIVEKIT_ROOM: ROOM}

    def test_create_tables_with_newer_tables_changes_nothing(self) -> None:
        with patch.object(module_database, "SCHEMA_VERSION", SCHEMA_VERSION + 1):
            self.get_success(self.calls().note(LIVEKIT_ROOM, ROOM))
        failure = self.get_failure(self.calls().all(), UnsupportedSchema)
        assert f"version {SCHEMA_VERSION + 1}" in str(failure.value)
        assert self.version() == SCHEMA_VERSION + 1

    def test_tables_have_no_boolean_columns(self) -> None:
        # synapse_port_db fails at BOOLEAN columns that it does not list.
        assert "BOOL" not in "".join(SCHEMA).upper()


class NewerTablesTests(ModuleTestCase):
    def test_module_with_newer_tables_logs_an_error_and_serves_nothing(self) -> None:
        error = UnsupportedSchema(SCHEMA_VERSION + 1)
        api = self.hs.get_module_api()
        ((_, config),) = self.hs.config.modules.loaded_modules
        with (
            patch("synapse_lk_jwt.module.unsupported_schema", return_value=error),
            patch.object(api, "register_web_resource") as register,
            self.assertLogs("synapse_lk_jwt") as logs,
        ):
            LiveKitJwtModule(config, api)
        register.assert_not_called()
        assert logs.output[-1].startswith("ERROR")
        assert str(error) in logs.output[-1]


class NoteCallTests(TablesTestCase):
    def prepare(self, reactor: object, clock: object, hs: object) -> None:
        super().prepare(reactor, clock, hs)
        self.homeserver = Homeserver(self.hs.get_module_api())
        self.error = self.homeserver.database.error
        self.table = CallTable(ModuleDatabase(self.homeserver))
        self.get_success(self.table.all())

    def errors(self, number: int) -> Any:
        """Makes this many transactions fail with a database error."""
        run = self.homeserver.database.run_interaction
        results = iter([fail(self.error("the connection is closed")) for _ in range(number)])

        def or_fail(*args: Any, **more: Any) -> Any:
            failed = next(results, None)
            return run(*args, **more) if failed is None else failed

        return patch.object(self.homeserver.database, "run_interaction", or_fail)

    def test_note_call_after_one_database_error_is_retried(self) -> None:
        with self.errors(1):
            self.get_success(self.table.note(LIVEKIT_ROOM, ROOM))
        assert self.get_success(self.table.all()) == {LIVEKIT_ROOM: ROOM}

    def test_note_call_with_a_database_error_that_persists_fails(self) -> None:
        with self.errors(2):
            self.get_failure(self.table.note(LIVEKIT_ROOM, ROOM), self.error)
