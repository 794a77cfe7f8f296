# SPDX-License-Identifier: Apache-2.0
"""Synapse, LiveKit and clients are killed, and the room and LiveKit agree at the end."""

from pathlib import Path

import pytest

from tests.chaos.__main__ import run


def test_chaos_of_twenty_seconds_leaves_rooms_and_sfu_in_agreement(tmp_path: Path) -> None:
    # Native clients need much CPU time. With more of them, a small machine would be the bottleneck.
    wrong = run(tmp_path, seconds=20, seed=1, participants=12)
    if wrong:
        pytest.fail("\n".join([*wrong, f"The logs are in {tmp_path}"]), pytrace=False)
