# SPDX-License-Identifier: Apache-2.0
"""Finds the program of a LiveKit server, or builds it once.

This module needs only the standard library: `./run demo` uses it before anything is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from testbed.cache import cache_directory
from testbed.process import MissingTool

VERSION = "1.13.5"
_GO_PACKAGE = f"github.com/livekit/livekit-server/cmd/server@v{VERSION}"
_GO_NEEDED = "1.26"


def find_livekit() -> Path:
    """The LiveKit server on the PATH, or in the cache, where it is built if it is missing.

    Raises:
        MissingTool
    """
    found = present_livekit()
    if found is None:
        found = _place()
        _build(found)
    return found


def present_livekit() -> Path | None:
    """The LiveKit server on the PATH or in the cache, or None if it has to be built."""
    installed = shutil.which("livekit-server")
    if installed is not None:
        return Path(installed)
    return _place() if _place().exists() else None


def _place() -> Path:
    return cache_directory() / f"livekit-server-{VERSION}" / "server"


def _build(binary: Path) -> None:
    go = shutil.which("go")
    if go is None:
        raise MissingTool(
            f"LiveKit is missing: put livekit-server on the PATH (https://github.com/livekit/livekit"
            f"/releases), or install Go >= {_GO_NEEDED} to build it from source"
        )
    print(
        f"Building LiveKit {VERSION} with Go. This happens once and takes about two minutes",
        flush=True,
    )
    binary.parent.mkdir(parents=True, exist_ok=True)
    # Built in a temporary directory and then renamed, so that an interrupted build leaves nothing.
    with tempfile.TemporaryDirectory(dir=binary.parent) as directory:
        built = subprocess.run(
            [go, "install", _GO_PACKAGE],
            env={**os.environ, "GOBIN": directory},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if built.returncode != 0:
            last_line = built.stdout.decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise MissingTool(
                f"LiveKit is missing and could not be built with Go (>= {_GO_NEEDED}): {last_line}"
            )
        os.replace(Path(directory) / "server", binary)
