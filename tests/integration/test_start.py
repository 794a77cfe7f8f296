# SPDX-License-Identifier: Apache-2.0
"""What Synapse prints and logs when it starts with the module."""

from pathlib import Path

import pytest

from testbed.process import ProcessDied
from testbed.synapse import Synapse


def test_start_with_wrong_options_reports_all_of_them_without_traceback(tmp_path: Path) -> None:
    config = {
        "livekit_url": "ftp://sfu.example.com",
        "livekit_key": "APIkey",
        "livekit_secret_path": "/does/not/exist",
        "full_acess_homeservers": [],
    }
    synapse = Synapse("a", tmp_path, config)
    synapse.start()
    with pytest.raises(ProcessDied):
        synapse.wait_ready()
    log = synapse.log_text()
    assert "Error in configuration at 'modules.<item 0>.config'" in log
    assert "livekit_url: must start with wss://" in log
    assert "livekit_secret_path: cannot read '/does/not/exist' (No such file or directory)" in log
    assert "full_acess_homeservers: is not an option of this module. Did you mean" in log
    assert "Traceback" not in log


def test_start_with_only_the_environment_of_lk_jwt_service_succeeds(tmp_path: Path) -> None:
    environment = {
        "LIVEKIT_URL": "ws://127.0.0.1:1",
        "LIVEKIT_KEY": "APIkey",
        "LIVEKIT_SECRET": "s" * 32,
        "LIVEKIT_LOCAL_HOMESERVERS": "example.org",
    }
    synapse = Synapse("a", tmp_path, {}, env=environment)
    try:
        synapse.start()
        synapse.wait_ready()
        assert "LIVEKIT_LOCAL_HOMESERVERS is deprecated" in synapse.log_text()
    finally:
        synapse.stop()
