# SPDX-License-Identifier: Apache-2.0
"""What tests do where a program is missing."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing_tool(message: object) -> NoReturn:
    """Skip for want of a program, or fail where all of them have to be there."""
    if os.environ.get("REQUIRE_REAL_PARTS") == "1":
        pytest.fail(str(message), pytrace=False)
    pytest.skip(str(message))
