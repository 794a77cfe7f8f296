# SPDX-License-Identifier: Apache-2.0
"""Runs the set-up of `contrib/scaling` on this machine, from its own files.

Only addresses, ports, paths, secrets and the time between two polls are replaced. Settings for
tests are added: no rate limits, and no verification of certificates.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from livekit import api

from testbed.livekit import LiveKit
from testbed.matrix import User
from testbed.nginx import Nginx
from testbed.postgres import USER, Postgres
from testbed.process import free_port
from testbed.redis import Redis
from testbed.sets import running
from testbed.synapse import Synapse

FILES = Path(__file__).resolve().parent.parent / "contrib" / "scaling"

# The URL that the files announce to clients.
LIVEKIT_URL = "wss://sfu.example.com"
KEY = "APIxxxx"
SECRET = "not-a-secret-at-all-but-long-enough"

POLL_SEC = 3

_number = itertools.count()


@dataclass(frozen=True)
class Scaled:
    """The servers of the set-up.

    Attributes:
        synapse: with two generic workers and a background worker. `client_url` is the main process.
        postgres: its database.
        nodes: the two nodes of LiveKit.
        proxy_url: the URL of nginx, for clients.
        livekit_url: the URL of LiveKit behind nginx.
    """

    synapse: Synapse
    postgres: Postgres
    nodes: tuple[Node, Node]
    proxy_url: str
    livekit_url: str

    def user(self, name: str) -> User:
        return self.synapse.register(f"{name}{next(_number)}")

    @property
    def urls(self) -> dict[str, str]:
        """The URL at which each process serves the module, by the name of the process."""
        worker1, worker2 = self.synapse.worker_urls
        background = f"http://127.0.0.1:{self.synapse.worker_ports['background'][1]}"
        return {
            "main": self.synapse.client_url,
            "worker1": worker1,
            "worker2": worker2,
            "background": background,
        }


@contextlib.contextmanager
def scaled(directory: Path) -> Iterator[Scaled]:
    """Run the whole set-up.

    Raises:
        MissingTool
    """
    redis, postgres = Redis(directory), Postgres(directory)
    with running(redis, postgres):
        nodes = []
        for number in (1, 2):
            (directory / f"livekit{number}").mkdir()
            nodes.append(Node(directory / f"livekit{number}", f"livekit{number}.yaml"))
        synapse = _Synapse(directory, postgres, redis)
        https_port, livekit_port = free_port(), free_port()
        words = synapse.words()
        words |= {"10.0.0.1:7880": f"127.0.0.1:{livekit_port}"}
        words |= {f"10.0.0.{n + 2}:7880": f"127.0.0.1:{nodes[n].port}" for n in (0, 1)}
        synapse.all_words = words
        for node in nodes:
            node.words |= words
        words_of_nginx = {
            **words,
            "443 ssl": f"127.0.0.1:{https_port} ssl",
            "8448 ssl": f"{synapse.server_name} ssl",
            "/etc/nginx": str(synapse.directory),
        }
        nginx = Nginx(directory, _read("nginx.conf", words_of_nginx), https_port)
        with running(nginx, *nodes, synapse):
            yield Scaled(
                synapse,
                postgres,
                (nodes[0], nodes[1]),
                f"https://127.0.0.1:{https_port}",
                f"ws://127.0.0.1:{livekit_port}",
            )


def _read(name: str, words: Mapping[str, str]) -> str:
    """One of the files, with the words replaced. Longer words are replaced first."""
    either = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    text = re.sub(either, lambda word: words[word[0]], (FILES / name).read_text())
    settings = re.sub("^ *#.*$", "", text, flags=re.MULTILINE)
    left = re.search(r"10\.0\.0\.\d+|/(etc|var)/\S*", settings)
    assert left is None, f"{name}: no replacement for {left and left[0]}"
    return text


class Node(LiveKit):
    """One node of LiveKit."""

    def __init__(self, directory: Path, file: str) -> None:
        """
        Args:
            directory: for its files and the log.
            file: the name of its configuration file.

        Raises:
            MissingTool
        """
        super().__init__(directory, key=KEY, secret=SECRET)
        self._file = file
        keys = directory / "keys.yaml"
        keys.write_text(f"{KEY}: {SECRET}\n")
        keys.chmod(0o600)
        self.words = {
            "/etc/livekit": str(directory),
            "port: 7880": f"port: {self.port}",
            "7881": str(self.tcp_port),
            "7882": str(self._udp_port),
            "10.0.0.2": "127.0.0.1",
            "10.0.0.3": "127.0.0.1",
        }

    def create_room(self, livekit_room: str) -> None:
        """Create a LiveKit room on this node."""
        # The node has another ID after each start.
        node_id = re.findall(r'"nodeID": "(\w+)"', self.process.log_text())[-1]
        room = {"name": livekit_room, "node_id": node_id, "departure_timeout": 20}
        self.ask("CreateRoom", room, api.VideoGrants(room_create=True))

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = yaml.safe_load(_read(self._file, self.words))
        settings["rtc"] |= {
            "node_ip": "127.0.0.1",
            "use_external_ip": False,
            "enable_loopback_candidate": True,
        }
        return settings


class _Synapse(Synapse):
    def __init__(self, directory: Path, postgres: Postgres, redis: Redis) -> None:
        super().__init__(
            "scaled",
            directory,
            postgres=postgres,
            redis=redis,
            workers=2,
            background_worker=True,
        )
        # This worker has no listener for clients.
        _, replication_port = self.worker_ports["background"]
        self.worker_ports["background"] = (replication_port, replication_port)
        self._postgres_port, self._redis_port = postgres.port, redis.port
        for secret, content in (("replication_secret", "shh"), ("livekit_secret", SECRET)):
            (self.directory / secret).write_text(content)
        self.all_words: Mapping[str, str] = {}

    def words(self) -> dict[str, str]:
        """The words in the files that this homeserver replaces, and their replacements."""
        ports = self.worker_ports
        return {
            "server_name: example.com": f"server_name: {self.server_name}",
            "/etc/matrix-synapse": str(self.directory),
            "/var/lib/matrix-synapse": str(self.directory),
            "10.0.0.1": "127.0.0.1",
            "8008": self.client_url.rpartition(":")[2],
            "9093": str(self._replication_port),
            "8081": str(ports["worker1"][0]),
            "9081": str(ports["worker1"][1]),
            "8082": str(ports["worker2"][0]),
            "9082": str(ports["worker2"][1]),
            "9083": str(ports["background"][1]),
            "5432": str(self._postgres_port),
            "6379": str(self._redis_port),
            "dbname: synapse": f"dbname: {self.name}",
            "synapse_user": USER,
            "sanity_check_interval: 30s": f"sanity_check_interval: {POLL_SEC}s",
        }

    def _write_config(self) -> None:
        shared = yaml.safe_load(_read("homeserver.yaml", self.all_words))
        self._write_json("homeserver.json", {**self._base_config(), **shared})
        self._write_json("log.json", self._log_config())
        for worker in self.workers:
            settings = yaml.safe_load(_read(f"{worker}.yaml", self.all_words))
            self._write_json(f"{worker}.json", settings)
