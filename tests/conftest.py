# SPDX-License-Identifier: Apache-2.0
import contextlib
import os
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

import synapse_lk_jwt

ROOT = Path(__file__).resolve().parent.parent

# At the end of the path: tests import `testbed` and `demo` from the checkout, but they must import
# the installed package.
sys.path.append(str(ROOT))

if "TOX_ENV_NAME" in os.environ:
    assert not Path(synapse_lk_jwt.__file__).is_relative_to(ROOT / "synapse_lk_jwt"), (
        "the tests must import the built wheel, not the checkout"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, None, None]:
    with _required_tools():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    with _required_tools():
        yield


@contextlib.contextmanager
def _required_tools() -> Iterator[None]:
    """Lets a fixture or test raise `MissingTool`, and skips the test (or fails it) in that case."""
    # The path to it is added above.
    from testbed.process import MissingTool
    from testbed.skips import missing_tool

    try:
        yield
    except MissingTool as e:
        missing_tool(e)


# Around all other hooks, so that it prints last, below the coverage report.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter,
) -> Generator[None, None, None]:
    yield
    skipped = terminalreporter.stats.get("skipped", [])
    ran = sum(len(terminalreporter.stats.get(key, [])) for key in ("passed", "failed", "error"))
    if not skipped:
        return
    terminalreporter.section(
        f"{len(skipped)} of {len(skipped) + ran} TESTS WERE SKIPPED", sep="!", red=True, bold=True
    )
    reasons = Counter(_reason(report) for report in skipped)
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:4} skipped: {reason}", red=True)
    terminalreporter.line("With REQUIRE_REAL_PARTS=1 a missing program fails its tests.", red=True)


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test was skipped, which names the program to install."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")
