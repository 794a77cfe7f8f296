# SPDX-License-Identifier: Apache-2.0
"""What `./run demo` prints before it downloads."""

import shutil
from pathlib import Path

import pytest

from demo.downloads import downloads
from testbed.cache import cache_directory
from testbed.element_call import has_element_call
from testbed.livekit_program import VERSION

PIP = "Python packages with pip, into .venv and .tox"
GO = f"Go modules, to build LiveKit {VERSION}"
NPM = "Element Call with npm"


@pytest.fixture(autouse=True)
def fresh_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with an empty cache and without LiveKit."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "which", lambda name: None)


def add_python_packages(root: Path) -> None:
    (root / ".tox/demo/lib/python3.11/site-packages/synapse_lk_jwt").mkdir(parents=True)


def add_livekit() -> None:
    program = cache_directory() / f"livekit-server-{VERSION}" / "server"
    program.parent.mkdir(parents=True)
    program.touch()


def listed(root: Path, with_browser: bool) -> list[str]:
    return [what for what, _ in downloads(root, with_browser)]


@pytest.mark.parametrize(("with_browser", "expected"), [(False, [PIP, GO]), (True, [PIP, GO, NPM])])
def test_downloads_of_a_fresh_machine_are_listed(
    with_browser: bool, expected: list[str], tmp_path: Path
) -> None:
    assert listed(tmp_path, with_browser) == expected


def test_downloads_with_packages_and_livekit_present_are_not_listed(tmp_path: Path) -> None:
    add_python_packages(tmp_path)
    add_livekit()
    assert listed(tmp_path, with_browser=False) == []


def test_downloads_with_livekit_on_the_path_need_no_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert listed(tmp_path, with_browser=False) == [PIP]


def test_element_call_with_an_empty_cache_is_missing() -> None:
    assert not has_element_call()
