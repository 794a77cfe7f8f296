# SPDX-License-Identifier: Apache-2.0
"""A temporary nginx."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from testbed.process import MissingTool, Process, free_port

# With these lines nginx forwards WebSockets.
UPGRADE = (
    "proxy_http_version 1.1;",
    "proxy_set_header Upgrade $http_upgrade;",
    'proxy_set_header Connection "upgrade";',
)


class Nginx:
    """An nginx with one configuration file."""

    def __init__(self, directory: Path, config: str, port: int) -> None:
        """
        Args:
            directory: for its files and the log.
            config: the contents of its `http` block.
            port: a port on which that configuration listens.

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
        """Start nginx, without waiting for it."""
        self.process.start()

    def wait_ready(self) -> None:
        """Wait until nginx accepts connections."""
        self.process.wait_until(self._answers, "nginx ready")

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self._port), 1.0).close()
        except OSError:
            return False
        return True


class Servers(Nginx):
    """An nginx with several servers. Each has TLS and its own port."""

    def __init__(self, directory: Path, servers: Mapping[str, str], certificate: Path) -> None:
        """
        Args:
            directory: for its files and the log.
            servers: the contents of the `server` blocks, by names that only the test uses.
            certificate: the directory with `tls.crt` and `tls.key`.

        Raises:
            MissingTool
        """
        self._ports = {name: free_port() for name in servers}
        lines = [
            f"ssl_certificate {certificate / 'tls.crt'};",
            f"ssl_certificate_key {certificate / 'tls.key'};",
        ]
        for name, block in servers.items():
            lines.append(f"server {{\nlisten 127.0.0.1:{self._ports[name]} ssl;\n{block}\n}}\n")
        super().__init__(directory, "\n".join(lines), next(iter(self._ports.values())))

    def url(self, server: str) -> str:
        """The URL of a server, without a slash at the end."""
        return f"https://127.0.0.1:{self._ports[server]}"

    def port(self, server: str) -> int:
        return self._ports[server]


def proxy(url: str, path: str = "/", *more: str) -> str:
    """A `location` block that forwards requests below a path to a server, with further lines."""
    return "\n".join(
        [
            f"location {path} {{",
            f"    proxy_pass {url};",
            "    proxy_set_header X-Forwarded-For $remote_addr;",
            "    proxy_set_header X-Forwarded-Proto $scheme;",
            "    proxy_set_header Host $host;",
            *(f"    {line}" for line in more),
            "}",
        ]
    )
