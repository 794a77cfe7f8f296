# SPDX-License-Identifier: Apache-2.0
"""Runs `synapse-lk-jwt check` on homeserver A of the demo."""

from __future__ import annotations

import shlex
import subprocess

from testbed.check import Checker
from testbed.synapse import Synapse


class SelfCheck:
    """The command that checks homeserver A, and its report."""

    def __init__(self, homeserver: Synapse) -> None:
        # The homeserver listens on no port below 1024, and its certificate is self-signed.
        address = f"127.0.0.1:443:{homeserver.server_name}"
        env = {"SSL_CERT_FILE": "tls.crt"}
        self._checker = Checker(homeserver, ["--connect-to", address], env)
        self._env = env

    def run(self) -> tuple[bool, str]:
        """Run the command.

        Returns:
            whether it found no problem, and its report.
        """
        done = subprocess.run(
            self._checker.command(),
            cwd=self._checker.directory,
            env=self._checker.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            # Ctrl-C must not end the check, whose missing report would look like a problem.
            start_new_session=True,
        )
        return done.returncode == 0, (done.stdout + done.stderr).rstrip()

    def command_line(self) -> str:
        """A line for a shell that runs the same command."""
        variables = " ".join(f"{name}={value}" for name, value in self._env.items())
        command = shlex.join(self._checker.command())
        return f"cd {shlex.quote(str(self._checker.directory))} && {variables} {command}"
