# SPDX-License-Identifier: Apache-2.0
"""What a test does when a program that it needs is not installed."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing_tool(message: object) -> NoReturn:
    """Skip the test, or fail it if REQUIRE_REAL_PARTS=1 demands that every program is installed.

    Args:
        message: names the program and says how to install it.
    """
    if os.environ.get("REQUIRE_REAL_PARTS") == "1":
        pytest.fail(str(message), pytrace=False)
    pytest.skip(str(message))
