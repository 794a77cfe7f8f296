# SPDX-License-Identifier: Apache-2.0
"""A machine of a new admin: Synapse in a virtual environment, LiveKit, and nginx with TLS.

Nothing of this project is installed in that environment, and no file knows this module.
"""

from __future__ import annotations

import configparser
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from testbed import matrix
from testbed.livekit import LiveKit
from testbed.nginx import Servers, proxy
from testbed.process import MissingTool, Process, free_port
from testbed.sets import running
from testbed.synapse import is_healthy, write_certificate

ROOT = Path(__file__).resolve().parent.parent
SERVER_NAME = "newcomer.test"
MATRIX, SFU = f"matrix.{SERVER_NAME}", f"sfu.{SERVER_NAME}"
# nginx has one server for each.
PUBLIC_NAMES = (MATRIX, SFU, SERVER_NAME)


class FreshInstall:
    """Synapse, LiveKit and nginx below one directory.

    Attributes:
        directory: everything is below it.
        venv: the virtual environment of Synapse.
        etc: the directory of `homeserver.yaml`.
        checkout: a copy of this repository, without what builds and tests left there.
        port: the port of Synapse's listener.
        livekit: LiveKit with its default settings.
        nginx: the servers `PUBLIC_NAMES`.
        synapse: the process of Synapse.
    """

    def __init__(self, directory: Path, livekit_locations: str) -> None:
        """Install Synapse and write all configuration files.

        Args:
            directory: an empty directory.
            livekit_locations: the `location` blocks of nginx in front of LiveKit. `LIVEKIT` stands
                for LiveKit's address and port.

        Raises:
            MissingTool: if a program is missing, or pip cannot reach its package index.
        """
        self.directory = directory
        self.venv, self.etc = directory / "venv", directory / "etc"
        self.checkout = directory / "checkout"
        self._data = directory / "data"
        self._data.mkdir()
        write_certificate(directory, PUBLIC_NAMES)
        self.port = free_port()
        # LiveKit's own default is true.
        self.livekit = LiveKit(directory, auto_create=True, key="APInewcomer")
        self.nginx = self._nginx(livekit_locations)
        if shutil.which("curl") is None:
            raise MissingTool("curl is missing: apt-get install curl")
        self._install_synapse()
        _copy_checkout(self.checkout)
        self.synapse = Process(
            "Synapse",
            self._synapse_command(),
            directory / "synapse-output.log",
            env=self.environment(),
            directory=self._data,
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run all servers."""
        with running(self.livekit, self.nginx):
            try:
                self.start_synapse()
                yield
            finally:
                self.synapse.stop()

    def start_synapse(self) -> None:
        """Start Synapse and wait until it answers."""
        self.synapse.start()
        url = f"http://127.0.0.1:{self.port}"
        self.synapse.wait_until(lambda: is_healthy(url), "Synapse ready")

    def homeserver_yaml(self) -> dict[str, Any]:
        """The contents of `homeserver.yaml`."""
        content = yaml.safe_load((self.etc / "homeserver.yaml").read_text())
        assert isinstance(content, dict)
        return content

    def synapse_log(self) -> str:
        """The log of Synapse. Synapse writes it every five seconds."""
        return (self._data / "homeserver.log").read_text()

    def register(self, name: str) -> matrix.User:
        """Create an account and log in to it."""
        secret = self.homeserver_yaml()["registration_shared_secret"]
        return matrix.register(f"http://127.0.0.1:{self.port}", secret, name)

    def packages(self) -> set[str]:
        """What `pip list` prints for the virtual environment of Synapse."""
        command = [str(self.venv / "bin/pip"), "list", "--format=freeze"]
        listed = subprocess.run(
            command, env=self.environment(), stdout=subprocess.PIPE, text=True, check=True
        )
        return set(listed.stdout.splitlines())

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Environment variables without those that change what a new admin would see.

        They make OpenSSL trust the certificate of nginx. curl finds a `.curlrc` that connects the
        public names to nginx.
        """
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("LIVEKIT_", "PYTHON")) and not name.lower().endswith("_proxy")
        }
        certificate = str(self.directory / "tls.crt")
        own = {"SSL_CERT_FILE": certificate, "CURL_HOME": str(self.directory)}
        return {**kept, **own, **(more or {})}

    def shell(self, commands: str, env: Mapping[str, str] | None = None) -> str:
        """Run commands of a page in the checkout, and return what they print.

        Args:
            commands: the commands. The first one that fails ends the script.
            env: the whole environment, by default that of `environment`.
        """
        done = subprocess.run(
            ["sh", "-eu", "-c", commands],
            cwd=self.checkout,
            env=self.environment() if env is None else env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout}"
        return done.stdout

    def pip_environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """Environment variables for pip, which may need a proxy and its own certificates."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        # The Python of the tests has pip.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**kept, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PATH": path, **more}

    def connections(self) -> list[str]:
        """Arguments for `--connect-to`, as curl and the check have it."""
        return [f"{name}:443:127.0.0.1:{self.nginx.port(name)}" for name in PUBLIC_NAMES]

    def _nginx(self, livekit_locations: str) -> Servers:
        synapse = f"http://127.0.0.1:{self.port}"
        servers = {
            # The paths of Synapse's documentation about reverse proxies.
            MATRIX: proxy(synapse, "~ ^(/_matrix|/_synapse/client)"),
            SFU: livekit_locations.replace("LIVEKIT", self.livekit.api_url.removeprefix("http://")),
            SERVER_NAME: proxy(synapse, "/.well-known/matrix/client"),
        }
        nginx = Servers(self.directory, servers, self.directory)
        (self.directory / ".curlrc").write_text(
            f'silent\nshow-error\nnoproxy = "*"\ncacert = "{self.directory}/tls.crt"\n'
            + "".join(
                f'connect-to = "{name}:443:127.0.0.1:{nginx.port(name)}"\n' for name in PUBLIC_NAMES
            )
        )
        return nginx

    def _install_synapse(self) -> None:
        """Install the oldest supported Synapse, so that an upgrade of Synapse is visible."""
        subprocess.run([sys.executable, "-m", "venv", self.venv], check=True)
        tox = configparser.ConfigParser()
        tox.read(ROOT / "tox.ini")
        requirements = tox["testenv:oldest"]["deps"].split("\n")
        installed = subprocess.run(
            # Python compiles the few modules that Synapse imports when Synapse starts.
            [
                self.venv / "bin/pip",
                "install",
                "--quiet",
                "--no-compile",
                *filter(None, requirements),
            ],
            env=self.pip_environment({}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if installed.returncode != 0:
            last_line = installed.stdout.strip().rpartition("\n")[2]
            raise MissingTool(f"PyPI is missing: pip could not install Synapse: {last_line}")
        subprocess.run(
            [
                *self._synapse_command(),
                *("--generate-config", "--report-stats", "no", "--server-name", SERVER_NAME),
            ],
            cwd=self._data,
            env=self.environment(),
            stdout=subprocess.DEVNULL,
            check=True,
        )
        homeserver = self.homeserver_yaml()
        homeserver["listeners"][0].update(port=self.port, bind_addresses=["127.0.0.1"])
        (self.etc / "homeserver.yaml").write_text(yaml.safe_dump(homeserver))

    def _synapse_command(self) -> list[str]:
        python, config = self.venv / "bin/python", self.etc / "homeserver.yaml"
        return [str(python), "-m", "synapse.app.homeserver", "-c", str(config)]


def _copy_checkout(target: Path) -> None:
    """Copy this repository with its uncommitted changes, so that a build leaves no file in it."""
    if (ROOT / ".git").exists():
        clone = ["git", "clone", "--quiet", "--no-checkout", str(ROOT), str(target)]
        subprocess.run(clone, check=True)
    left = shutil.ignore_patterns(
        *(".git", ".tox", ".venv", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info"),
        *("build", "dist"),
    )
    shutil.copytree(ROOT, target, symlinks=True, ignore=left, dirs_exist_ok=True)
