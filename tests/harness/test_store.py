# SPDX-License-Identifier: Apache-2.0
"""The module's own tables."""

from typing import Any
from unittest.mock import patch

from twisted.internet.defer import fail

from synapse_lk_jwt import store
from synapse_lk_jwt.compat.homeserver import Homeserver
from tests.harness.base import ModuleTestCase

ROOM, LIVEKIT_ROOM = "!room:test", "livekit-room"


class MigrationTests(ModuleTestCase):
    def prepare(self, reactor: object, clock: object, hs: object) -> None:
        super().prepare(reactor, clock, hs)
        self.pump()
        for table in (
            "schema",
            "calls",
            "owners",
            "delegations",
            "identities",
            "stream",
            "processes",
        ):
            self.get_success(
                self.store.db_pool.execute("drop", f"DROP TABLE IF EXISTS synapse_lk_jwt_{table}")
            )
        self.tables = store.Store(Homeserver(self.hs.get_module_api()))

    def version(self) -> int:
        version: int = self.get_success(
            self.store.db_pool.simple_select_one_onecol("synapse_lk_jwt_schema", {}, "version")
        )
        return version

    def test_they_are_made_once(self) -> None:
        for _ in range(2):
            another = store.Store(Homeserver(self.hs.get_module_api()))
            self.get_success(another.note_call(LIVEKIT_ROOM, ROOM))
        assert self.get_success(self.tables.calls()) == {LIVEKIT_ROOM: ROOM}
        assert self.version() == len(store.MIGRATIONS)

    def test_a_process_that_dies_in_between_leaves_nothing_half_done(self) -> None:
        broken = (store.MIGRATIONS[0], (*store.MIGRATIONS[1], "CREATE NONSENSE"))
        with patch.object(store, "MIGRATIONS", broken):
            self.get_failure(self.tables.calls(), Exception)
        self.get_success(self.tables.note_call(LIVEKIT_ROOM, ROOM))
        assert self.get_success(self.tables.calls()) == {LIVEKIT_ROOM: ROOM}

    def test_the_next_version_is_added_to_what_is_there(self) -> None:
        self.get_success(self.tables.note_call(LIVEKIT_ROOM, ROOM))
        more = ("ALTER TABLE synapse_lk_jwt_calls ADD COLUMN more TEXT",)
        with patch.object(store, "MIGRATIONS", (*store.MIGRATIONS, more)):
            newer = store.Store(Homeserver(self.hs.get_module_api()))
            assert self.get_success(newer.calls()) == {LIVEKIT_ROOM: ROOM}
            assert self.version() == len(store.MIGRATIONS)
        # And an older version of the module gets on with it.
        older = store.Store(Homeserver(self.hs.get_module_api()))
        assert self.get_success(older.calls()) == {LIVEKIT_ROOM: ROOM}
        assert self.version() == len(store.MIGRATIONS) + 1


class NoteCallTests(ModuleTestCase):
    def prepare(self, reactor: object, clock: object, hs: object) -> None:
        super().prepare(reactor, clock, hs)
        self.homeserver = Homeserver(self.hs.get_module_api())
        self.error = self.homeserver.database.error
        self.tables = store.Store(self.homeserver)
        self.get_success(self.tables.calls())

    def errors(self, number: int) -> Any:
        """Lets that many transactions end with an error of the database."""
        run = self.homeserver.database.run_interaction
        results = iter([fail(self.error("the connection is closed")) for _ in range(number)])

        def or_fail(*args: Any, **more: Any) -> Any:
            failed = next(results, None)
            return run(*args, **more) if failed is None else failed

        return patch.object(self.homeserver.database, "run_interaction", or_fail)

    def test_note_call_after_one_database_error_is_tried_again(self) -> None:
        with self.errors(1):
            self.get_success(self.tables.note_call(LIVEKIT_ROOM, ROOM))
        assert self.get_success(self.tables.calls()) == {LIVEKIT_ROOM: ROOM}

    def test_note_call_with_a_database_error_that_persists_fails(self) -> None:
        with self.errors(2):
            self.get_failure(self.tables.note_call(LIVEKIT_ROOM, ROOM), self.error)
