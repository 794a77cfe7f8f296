# SPDX-License-Identifier: Apache-2.0
"""Which processes have the module, as each of them sees it."""

import logging
from typing import Any

import attr

from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.compat.module_database import ModuleDatabase
from synapse_lk_jwt.process_registry import GONE_MS, HEARTBEAT_MS, Process, ProcessTable
from tests.harness.base import ModuleTestCase


class BackgroundTests(ModuleTestCase):
    def default_config(self) -> dict[str, Any]:
        # Another process than the one under test.
        return {**super().default_config(), "run_background_tasks_on": "background"}

    def beat(self, times: int = 1) -> None:
        for _ in range(times):
            self.reactor.advance(HEARTBEAT_MS / 1000)
            self.pump()

    def test_registry_without_a_background_process_logs_that_once(self) -> None:
        with self.assertNoLogs("synapse_lk_jwt", logging.ERROR):
            self.beat(GONE_MS // HEARTBEAT_MS - 1)
        with self.assertLogs("synapse_lk_jwt", logging.ERROR) as logs:
            self.beat(GONE_MS // HEARTBEAT_MS + 2)
        (line,) = logs.output
        assert "background worker is not running" in line
        assert line.endswith("-m synapse_lk_jwt check'")

    def test_registry_with_a_background_process_logs_nothing(self) -> None:
        table = ProcessTable(ModuleDatabase(Homeserver(self.hs.get_module_api())))
        with self.assertNoLogs("synapse_lk_jwt", logging.ERROR):
            for _ in range(10):
                background = Process(
                    "background",
                    is_background=True,
                    seen_ts=self.clock.time_msec(),
                    webhook_ts=0,
                    rejected_ts=0,
                )
                self.get_success(table.note(background, forget_before_ts=0))
                self.beat()

    def test_process_that_was_restarted_keeps_the_times_of_its_webhooks(self) -> None:
        table = ProcessTable(ModuleDatabase(Homeserver(self.hs.get_module_api())))
        before = Process("worker", is_background=False, seen_ts=1, webhook_ts=5, rejected_ts=7)
        self.get_success(table.note(before, forget_before_ts=0))
        restarted = attr.evolve(before, seen_ts=9, webhook_ts=0, rejected_ts=0)
        self.get_success(table.note(restarted, forget_before_ts=0))
        (after,) = (p for p in self.get_success(table.all()) if p.instance == "worker")
        assert after == attr.evolve(before, seen_ts=9)

    def test_process_without_a_heartbeat_is_forgotten(self) -> None:
        table = ProcessTable(ModuleDatabase(Homeserver(self.hs.get_module_api())))
        old = Process("old", is_background=False, seen_ts=1, webhook_ts=0, rejected_ts=0)
        new = attr.evolve(old, instance="new", seen_ts=9)
        for process in (old, new):
            self.get_success(table.note(process, forget_before_ts=5))
        assert "old" not in {process.instance for process in self.get_success(table.all())}
