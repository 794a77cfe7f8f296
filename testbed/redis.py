# SPDX-License-Identifier: Apache-2.0
"""A temporary Redis server."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from testbed.process import MissingTool, Process, free_port


class Redis:
    """A Redis server that stores nothing on disk."""

    def __init__(self, directory: Path) -> None:
        """
        Args:
            directory: for the log.

        Raises:
            MissingTool
        """
        program = shutil.which("redis-server")
        if program is None:
            raise MissingTool("Redis is missing: apt-get install redis-server")
        if importlib.util.find_spec("txredisapi") is None:
            raise MissingTool(
                "Synapse's Redis driver is missing: pip install matrix-synapse[redis]"
            )
        self.port = free_port()
        self.process = Process(
            "Redis",
            [
                program,
                *("--port", str(self.port)),
                *("--bind", "127.0.0.1"),
                *("--save", ""),
                *("--appendonly", "no"),
                *("--dir", directory),
            ],
            directory / "redis.log",
        )

    def start(self) -> None:
        """Start Redis, without waiting for it."""
        self.process.start()

    def wait_ready(self) -> None:
        """Wait until Redis accepts connections."""
        self.process.wait_until(
            lambda: "Ready to accept connections" in self.process.log_text(), "Redis ready"
        )

    def stop(self) -> None:
        self.process.stop()
