# SPDX-License-Identifier: Apache-2.0
import functools
import os
import threading
from collections.abc import Generator

import pytest
from twisted.python.threadpool import ThreadPool

from testbed.process import MissingTool
from testbed.synapse_tests import make_importable

# Older harnesses do not stop the thread pools of every homeserver, which would delay the end of
# the run.
setattr(ThreadPool, "threadFactory", functools.partial(threading.Thread, daemon=True))  # noqa: B010

try:
    make_importable()
except MissingTool as e:
    if os.environ.get("REQUIRE_REAL_PARTS") == "1":
        raise
    collect_ignore_glob = ["test_*.py"]
    _skip_reason = str(e)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(
        terminalreporter: pytest.TerminalReporter,
    ) -> Generator[None, None, None]:
        yield
        terminalreporter.section("ALL TESTS IN tests/harness WERE SKIPPED", sep="!", red=True)
        terminalreporter.line(_skip_reason, red=True)
