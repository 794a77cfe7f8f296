# SPDX-License-Identifier: Apache-2.0
"""Child processes that end with their parent, and functions that wait for conditions."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_POLL_SECONDS = 0.02
_TAIL_CHARACTERS = 4000
# Below the range that Linux uses for outgoing connections, so that no connection gets the port of a
# server that is down for a moment.
_PORTS = range(20_000, 32_000)

_handed_out: set[int] = set()
_running: set[Process] = set()
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class MissingTool(Exception):
    """A program is not installed. The message is one line with the program to install."""


class ProcessDied(Exception):
    """A process ended although it was needed. The message ends with the end of its log."""


class TimedOut(Exception):
    """A condition did not become true in time. The message names it."""


def free_port() -> int:
    """A port that is free for TCP and UDP on 127.0.0.1. It returns each port only once."""
    while True:
        port = random.choice(_PORTS)
        if port in _handed_out:
            continue
        with (
            socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        ):
            try:
                tcp.bind(("127.0.0.1", port))
                udp.bind(("127.0.0.1", port))
            except OSError:
                continue
        _handed_out.add(port)
        return port


def wait_until(
    condition: Callable[[], bool],
    what: str,
    timeout: float = 30.0,
    processes: Sequence[Process] = (),
) -> None:
    """Poll `condition` until it is true.

    Args:
        condition: a cheap function, called many times a second.
        what: names the condition in the error message.
        timeout: seconds.
        processes: the condition needs these. If one of them ends, the function stops waiting.

    Raises:
        ProcessDied: if one of the processes ends.
        TimedOut: if the condition does not become true in time.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        for process in processes:
            if not process.running:
                raise ProcessDied(
                    f"{process.name} ended with {process.returncode} while waiting for {what}\n"
                    + process.log_tail()
                )
        if time.monotonic() > deadline:
            tails = "\n".join(process.log_tail() for process in processes)
            raise TimedOut(f"after {timeout:.0f} s still no {what}\n{tails}".rstrip())
        time.sleep(_POLL_SECONDS)


async def until(condition: Callable[[], bool], what: str, timeout: float = 20.0) -> None:
    """As `wait_until`, without blocking the event loop."""
    await asyncio.to_thread(wait_until, condition, what, timeout)


class Process:
    """A program in its own process group, with its output in a log file.

    `start()` returns at once, so that a test can start several and then wait for each. Start only
    from the main thread, because Linux kills the child when the thread that started it ends.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        log: Path,
        env: Mapping[str, str] | None = None,
        directory: Path | None = None,
        user: str | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        grace: float = 8.0,
    ) -> None:
        """
        Args:
            name: for error messages.
            command: the program and its arguments.
            log: the file to which its output is appended.
            env: the whole environment, by default that of this process.
            directory: the working directory, by default that of this process.
            user: the name of the user and group to run as. Only root can choose it.
            stop_signal: the signal that stops it.
            grace: seconds between that signal and SIGKILL.
        """
        self.name = name
        self.command = [str(part) for part in command]
        self.log = log
        self.env = env
        self.directory = directory
        self.user = user
        self._stop_signal = stop_signal
        self._grace = grace
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    @property
    def returncode(self) -> int | None:
        """The exit status, negative after a signal. None if it runs or was never started."""
        return None if self._child is None else self._child.poll()

    @property
    def pid(self) -> int:
        assert self._child is not None, f"{self.name} was never started"
        return self._child.pid

    def start(self) -> None:
        """Start the program, without waiting for it."""
        assert not self.running, f"{self.name} is running already"
        parent = os.getpid()

        def die_with_parent() -> None:
            # Runs in the child after the change of user, which would clear the setting.
            if _libc is not None:
                pr_set_pdeathsig = 1
                _libc.prctl(pr_set_pdeathsig, signal.SIGKILL)
                if os.getppid() != parent:
                    os._exit(1)

        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.env,
                cwd=self.directory,
                start_new_session=True,
                user=self.user,
                group=self.user,
                extra_groups=None if self.user is None else [],
                # Safe in a process with threads, because it takes no lock and calls only libc.
                preexec_fn=die_with_parent,
            )
        _running.add(self)

    def stop(self) -> None:
        """Send the stop signal, and kill the program if it does not end in time."""
        self.terminate()
        self.wait_for_end()

    def terminate(self) -> None:
        """Send the stop signal, without waiting for the end."""
        if self.running:
            self._signal(self._stop_signal)

    def wait_for_end(self) -> None:
        """Wait until the program has ended, and kill it after `grace` seconds."""
        if self._child is None or self not in _running:
            return
        try:
            self._child.wait(self._grace)
        except subprocess.TimeoutExpired:
            pass
        except BaseException:
            self.kill()
            raise
        self.kill()

    def kill(self) -> None:
        """Send SIGKILL to the whole process group."""
        if self._child is None or self not in _running:
            return
        self._signal(signal.SIGKILL)
        self._child.wait()
        _running.discard(self)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout: float = 30.0) -> None:
        """As the function of this name. It also fails when this process ends."""
        wait_until(condition, what, timeout, [self])

    def log_size(self) -> int:
        """The number of bytes in the log, as an argument for `log_text`."""
        return self.log.stat().st_size if self.log.exists() else 0

    def log_text(self, since: int = 0) -> str:
        """The log from byte `since` on."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as log:
            log.seek(since)
            return log.read().decode("utf-8", "replace")

    def log_tail(self) -> str:
        """The end of the log, with a heading, for error messages."""
        return f"--- end of {self.log}\n{self.log_text()[-_TAIL_CHARACTERS:]}"

    def memory(self) -> int:
        """The resident memory in bytes (Linux only)."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise ProcessDied(f"{self.name} is not running")

    def cpu_seconds(self) -> float:
        """The CPU seconds that all threads of the process have used so far (Linux only)."""
        return _cpu_seconds(self.pid)

    def cpu_seconds_of_all(self) -> float:
        """The same, with its child processes, including those that have ended."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        used = _cpu_seconds(self.pid, with_ended=True)
        for child in children:
            # The child may have ended since the list was read.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                used += _cpu_seconds(int(child))
        return used

    def _signal(self, number: signal.Signals) -> None:
        # The group no longer exists if all its processes have ended.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


def _cpu_seconds(pid: int, with_ended: bool = False) -> float:
    stat = Path(f"/proc/{pid}/stat").read_text()
    # The second field is the name of the program in parentheses, which can contain any character.
    fields = stat.rpartition(")")[2].split()
    ticks = sum(int(field) for field in fields[11 : 15 if with_ended else 13])
    return ticks / os.sysconf("SC_CLK_TCK")


def stop_all(processes: Sequence[Process]) -> None:
    """Stop several processes at the same time."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait_for_end()


@atexit.register
def _kill_all() -> None:
    """Kill what is still running, for systems without a parent-death signal."""
    for process in list(_running):
        process.kill()
