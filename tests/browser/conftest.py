# SPDX-License-Identifier: Apache-2.0
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from testbed.browser import Scene, chromium
from testbed.element_call import find_element_call
from testbed.stage import BrowserStage

ROOT = Path(__file__).resolve().parents[2]
FAILURES = ROOT / "browser-failures"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--headed", action="store_true", help="show the browser window")
    parser.addoption(
        "--pictures", action="store_true", help="write the pictures for the docs to docs/pictures"
    )


@pytest.fixture(scope="session")
def browser(pytestconfig: pytest.Config) -> Iterator[Browser]:
    find_element_call()
    with chromium(pytestconfig.getoption("--headed")) as started:
        yield started


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserStage]:
    stage = BrowserStage(tmp_path_factory.mktemp("stage"))
    try:
        stage.start()
        yield stage
    finally:
        stage.stop()


@pytest.fixture
def scene(browser: Browser, stage: BrowserStage) -> Iterator[Scene]:
    scene = Scene(browser, stage)
    yield scene
    scene.end()


@pytest.fixture
def pictures(pytestconfig: pytest.Config, tmp_path: Path) -> Path:
    """The directory for pictures: docs/pictures with `--pictures`, or a temporary one."""
    return ROOT / "docs" / "pictures" if pytestconfig.getoption("--pictures") else tmp_path


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    values = getattr(item, "funcargs", {}).values()
    scene = next((value for value in values if isinstance(value, Scene)), None)
    if report.failed and report.when == "call" and scene is not None:
        directory = FAILURES / item.name
        scene.write_down(directory)
        report.sections.append(
            ("browser", f"Screenshots, the browser's console and the servers' logs: {directory}")
        )
    return report
