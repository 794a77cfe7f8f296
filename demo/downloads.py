# SPDX-License-Identifier: Apache-2.0
"""Prints what `./run demo` is about to download, and how much: `python -m demo.downloads`.

This module needs only the standard library, because it runs before anything is installed. It prints
nothing if everything is there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from testbed.element_call import has_element_call
from testbed.livekit_program import VERSION, present_livekit

_ROOT = Path(__file__).resolve().parents[1]
# pip installs this project last, when all other packages are there.
_LAST_PACKAGE = ".tox/demo/lib/python*/site-packages/synapse_lk_jwt"


def downloads(root: Path, with_browser: bool) -> Iterator[tuple[str, int]]:
    """What is missing.

    Args:
        root: the checkout, with the environments of tox.
        with_browser: whether the demo serves Element Call.

    Returns:
        for each download, what it is, and its size in MB, measured in November 2026.
    """
    if not any(root.glob(_LAST_PACKAGE)):
        yield "Python packages with pip, into .venv and .tox", 85
    if present_livekit() is None:
        yield f"Go modules, to build LiveKit {VERSION}", 90
    if with_browser and not has_element_call():
        yield "Element Call with npm", 13


def main() -> None:
    """Print a line for each download."""
    missing = list(downloads(_ROOT, "--browser" in sys.argv))
    if not missing:
        return
    print("The demo downloads, the first time only:")
    for what, megabytes in missing:
        print(f"  about {megabytes} MB  {what}")
    print(flush=True)


if __name__ == "__main__":
    main()
