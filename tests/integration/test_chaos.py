# SPDX-License-Identifier: Apache-2.0
"""Synapse, LiveKit and clients are killed, and room and SFU agree all the same."""

from pathlib import Path

import pytest

from testbed.process import MissingTool
from testbed.skips import missing_tool
from tests.chaos.__main__ import run


def test_twenty_seconds_of_chaos(tmp_path: Path) -> None:
    try:
        # Native clients are heavy: more of them would test a small machine, and not the module.
        wrong = run(tmp_path, seconds=20, seed=1, participants=12)
    except MissingTool as e:
        missing_tool(e)
    if wrong:
        pytest.fail("\n".join([*wrong, f"The logs are in {tmp_path}"]), pytrace=False)
