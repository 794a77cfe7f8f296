# SPDX-License-Identifier: Apache-2.0
"""Starts, orders and kills processes that run clients (`client.py`)."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

Report = Callable[[dict[str, Any]], None]


class Host:
    """A process with clients in it. It ends together with this process."""

    def __init__(self, log: Path, report: Report) -> None:
        """
        Args:
            log: the file for the clients' error output.
            report: called on another thread with each report of a client.
        """
        self._log = log
        self._report = report
        self._lock = threading.Lock()
        self._process = self._start()

    def order(self, who: str, do: str, **more: str) -> None:
        """Gives a client an order: `join`, `again` or `leave`."""
        line = json.dumps({"who": who, "do": do, **more}) + "\n"
        with self._lock:
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(line.encode("ascii"))
                self._process.stdin.flush()
            except OSError:
                # The process was killed, and `SimulatedUser.die` knows that already.
                return

    def kill(self) -> None:
        """Kills all clients of this process, and starts a process for new ones."""
        with self._lock:
            self.end()
            self._process = self._start()

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.client"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=Path(__file__).resolve().parents[2],
            )
        threading.Thread(target=self._read, args=[process], daemon=True).start()
        return process

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if process is self._process:
                self._report(json.loads(line))
