# SPDX-License-Identifier: Apache-2.0
"""A participant in its own process, so that a test can kill it like a crash or a dead battery."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from testbed.call import Participant


class LoneClient:
    """LiveKit's own client in another process, connected to one call."""

    def __init__(self, url: str, jwt: str) -> None:
        """Starts the process, without waiting for its connection.

        Args:
            url: the URL of the LiveKit server, `ws://…`.
            jwt: a LiveKit access token.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-m", "testbed.lone_client", url, jwt],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parent.parent,
        )

    def wait_connected(self) -> None:
        """Waits until the client is in the call."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"connected\n"

    def kill(self) -> None:
        """Kills the client with SIGKILL, so that it sends no disconnect."""
        self._process.kill()
        self._process.wait()


async def _stay(url: str, jwt: str) -> None:
    participant = await Participant.join(url, jwt)
    await participant.publish_tone()
    print("connected", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_stay(*sys.argv[1:]))
