# SPDX-License-Identifier: Apache-2.0
"""What a call between two homeservers takes: two Synapses that federate, and a LiveKit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realparts.livekit import LiveKit
from realparts.process import stop_all
from realparts.synapse import Synapse


class Stage:
    """Homeservers A and B, both with the module, and a LiveKit for A.

    Everybody on B is restricted on A, and LiveKit makes no room by itself.
    """

    def __init__(self, directory: Path, config_of_a: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            directory: for files and logs.
            config_of_a: top-level keys for A's `homeserver.yaml`.

        Raises:
            MissingTool
        """
        self.livekit = LiveKit(directory)
        self.a = Synapse("a", directory, self.module_config(), config_of_a)
        # B's own LiveKit has no part in the play, and is not there.
        config_of_b = {**self.module_config(), "livekit_url": "wss://sfu-of-b.example.com"}
        self.b = Synapse("b", directory, config_of_b)

    def module_config(self) -> dict[str, Any]:
        """The configuration of the module on A."""
        return {
            "livekit_url": self.livekit.url,
            "livekit_key": self.livekit.key,
            "livekit_secret": self.livekit.secret,
            "full_access_homeservers": [],
        }

    def start(self) -> None:
        """Start all at the same time and wait until they answer."""
        servers = (self.livekit, self.a, self.b)
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready()

    def stop(self) -> None:
        stop_all([self.livekit.process, *self.a.processes, *self.b.processes])
