# SPDX-License-Identifier: Apache-2.0
"""The servers of a call between two homeservers: two federating Synapses and a LiveKit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from testbed import service
from testbed.livekit import LiveKit
from testbed.matrix import User
from testbed.process import stop_all
from testbed.synapse import Synapse

# Features that Element Call needs. Its mode `matrix_2_0` needs sticky events, MSC4354.
_FOR_ELEMENT_CALL = {"msc4222_enabled": True, "msc4354_enabled": True}


class Stage:
    """Homeservers A and B, both with the module, and a LiveKit for A.

    All users of B are restricted on A, and LiveKit has `auto_create: false`.
    """

    def __init__(
        self, directory: Path, config_of_a: Mapping[str, Any] | None = None, **module: Any
    ) -> None:
        """
        Args:
            directory: for files and logs.
            config_of_a: top-level keys of A's `homeserver.yaml`.
            module: options of the module on A.

        Raises:
            MissingTool
        """
        self.livekit = LiveKit(directory)
        config_of_a = {"experimental_features": {"msc4222_enabled": True}, **(config_of_a or {})}
        self.a = Synapse("a", directory, {**self.module_config(), **module}, config_of_a)
        # `check` reads .well-known/matrix/client at an https URL.
        self.a.tls_resources.append("client")
        self.service_url = self.a.client_url + service.PREFIX
        self.livekit.webhook_urls = [f"{self.service_url}/sfu_webhook"]
        # B's own LiveKit does not exist, because no call uses it.
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
        """Start all servers at the same time, and wait until they answer."""
        servers = (self.livekit, self.a, self.b)
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready()

    def stop(self) -> None:
        stop_all([self.livekit.process, *self.a.processes, *self.b.processes])


class BrowserStage(Stage):
    """The same for calls in Element Call. B has no module and announces A's LiveKit.

    Element Call publishes on the SFU that the user's own homeserver announces.
    """

    def __init__(self, directory: Path, **module: Any) -> None:
        """
        Args:
            directory: for files and logs.
            module: options of the module on A.

        Raises:
            MissingTool
        """
        super().__init__(directory, {"experimental_features": _FOR_ELEMENT_CALL}, **module)
        self.b.module_config = None
        self.b.extra_config = {
            "experimental_features": {**_FOR_ELEMENT_CALL, "msc4143_enabled": True},
            "matrix_rtc": {
                "transports": [{"type": "livekit", "livekit_service_url": self.service_url}]
            },
        }

    def room(self, host: User, *guests: User) -> str:
        """Create a room of `host`, a user of A, in which the guests and all may be in a call."""
        power_levels = {"events": {"org.matrix.msc3401.call.member": 0}}
        room_id = host.create_room(preset="public_chat", power_levels=power_levels)
        host.send_state(room_id, "m.room.name", {"name": "A call"})
        for guest in guests:
            guest.join(room_id, via=[self.a.server_name])
        return room_id
