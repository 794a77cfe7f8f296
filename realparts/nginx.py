# SPDX-License-Identifier: Apache-2.0
"""A throw-away nginx."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

from realparts.process import MissingTool, Process


class Nginx:
    """One nginx that serves what is configured in one file."""

    def __init__(self, directory: Path, config: str, port: int) -> None:
        """
        Args:
            directory: for its files and the log.
            config: what stands in its http block.
            port: one that it listens on then.

        Raises:
            MissingTool
        """
        program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
        if program is None:
            raise MissingTool("nginx is missing: apt-get install nginx-light")
        self._port = port
        temporary = "".join(
            f"{kind}_temp_path {directory}/nginx-{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        file = directory / "nginx.conf"
        file.write_text(
            f"daemon off;\npid {directory}/nginx.pid;\nerror_log stderr;\nevents {{}}\n"
            f"http {{\naccess_log off;\n{temporary}{config}}}\n"
        )
        self.process = Process(
            "nginx",
            [program, "-e", "stderr", "-p", directory, "-c", file],
            directory / "nginx.log",
        )

    def start(self) -> None:
        """Start it, without waiting."""
        self.process.start()

    def wait_ready(self) -> None:
        """Wait until it takes connections."""
        self.process.wait_until(self._answers, "nginx ready")

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self._port), 1.0).close()
        except OSError:
            return False
        return True
