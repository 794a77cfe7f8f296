# SPDX-License-Identifier: Apache-2.0
"""Which processes have the module, as each of them sees it."""

import logging
from typing import Any

from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.process_registry import BEAT_MS, GONE_MS
from synapse_lk_jwt.store import Process, Store
from tests.harness.base import ModuleTestCase


class BackgroundTests(ModuleTestCase):
    def default_config(self) -> dict[str, Any]:
        # This one is not it.
        return {**super().default_config(), "run_background_tasks_on": "background"}

    def beat(self, times: int = 1) -> None:
        for _ in range(times):
            self.reactor.advance(BEAT_MS / 1000)
            self.pump()

    def test_a_background_process_without_the_module_is_named_once(self) -> None:
        with self.assertNoLogs("synapse_lk_jwt", logging.ERROR):
            self.beat(GONE_MS // BEAT_MS - 1)
        with self.assertLogs("synapse_lk_jwt", logging.ERROR) as logs:
            self.beat(GONE_MS // BEAT_MS + 2)
        (line,) = logs.output
        assert "background tasks is not there" in line
        assert line.endswith("-m synapse_lk_jwt check'")

    def test_one_with_the_module_is_known(self) -> None:
        store = Store(Homeserver(self.hs.get_module_api()))
        with self.assertNoLogs("synapse_lk_jwt", logging.ERROR):
            for _ in range(10):
                now_ms = self.clock.time_msec()
                there = Process(
                    "background", is_background=True, seen_ms=now_ms, webhook_ms=0, refused_ms=0
                )
                self.get_success(store.note_process(there, forget_ms=0))
                self.beat()
