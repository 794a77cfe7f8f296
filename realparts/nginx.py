# SPDX-License-Identifier: Apache-2.0
"""A real nginx that stands in front of the other servers, as reverse proxies do."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from realparts.process import MissingTool, Process, free_port

# What nginx would write elsewhere, outside of its own directory.
_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


class Nginx:
    """One nginx with a number of servers, each with TLS on a port of its own."""

    def __init__(self, directory: Path, servers: Mapping[str, str], certificate: Path) -> None:
        """
        Args:
            directory: for its files and the log.
            servers: what is in the `server` block of each, by a name for the test alone.
            certificate: the directory with `tls.crt` and `tls.key`.

        Raises:
            MissingTool
        """
        # Debian has it where only root looks.
        program = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
        if program is None:
            raise MissingTool("nginx is missing: apt-get install nginx-light")
        self._ports = {name: free_port() for name in servers}
        self._servers = servers
        self._certificate = certificate
        self._directory = directory
        self._config = directory / "nginx.conf"
        self.process = Process(
            "nginx", [program, "-c", self._config, "-e", "stderr"], directory / "nginx.log"
        )

    def url(self, server: str) -> str:
        """Where a server is reached, without a slash at the end."""
        return f"https://127.0.0.1:{self._ports[server]}"

    def port(self, server: str) -> int:
        return self._ports[server]

    def start(self) -> None:
        """Start it, without waiting."""
        places = [f"    {name}_temp_path {self._directory / name};" for name in _TEMPORARY]
        servers = [
            f"    server {{\n        listen 127.0.0.1:{self._ports[name]} ssl;\n{block}\n    }}"
            for name, block in self._servers.items()
        ]
        lines = [
            # One process, which runs as whoever starts it.
            "daemon off;",
            "master_process off;",
            f"pid {self._directory / 'nginx.pid'};",
            "events {}",
            "http {",
            "    access_log off;",
            *places,
            f"    ssl_certificate {self._certificate / 'tls.crt'};",
            f"    ssl_certificate_key {self._certificate / 'tls.key'};",
            *servers,
            "}",
        ]
        self._config.write_text("\n".join(lines))
        self.process.start()

    def wait_ready(self) -> None:
        """Wait until it takes connections."""
        self.process.wait_until(self._takes_connections, "nginx ready")

    def stop(self) -> None:
        self.process.stop()

    def _takes_connections(self) -> bool:
        try:
            for port in self._ports.values():
                socket.create_connection(("127.0.0.1", port), timeout=5.0).close()
        except OSError:
            return False
        return True


def proxy(url: str, path: str = "/", *more: str) -> str:
    """A `location` that passes on to a server what is below a path, with further lines."""
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


UPGRADE = (
    "proxy_http_version 1.1;",
    "proxy_set_header Upgrade $http_upgrade;",
    'proxy_set_header Connection "upgrade";',
)
