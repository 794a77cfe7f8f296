# SPDX-License-Identifier: Apache-2.0
"""Sets of servers that tests share. Each test creates its own users and rooms."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed.livekit import LiveKit
from testbed.matrix import User
from testbed.nginx import Nginx
from testbed.postgres import Postgres
from testbed.process import Process, stop_all
from testbed.redis import Redis
from testbed.service import PREFIX
from testbed.synapse import Synapse

_RATE_OFF = {"per_second": 10_000, "burst_count": 10_000}

_number = itertools.count()


def module_config(livekit: LiveKit, **more: Any) -> dict[str, Any]:
    """The module's configuration for a LiveKit, with an empty full-access list."""
    return {
        "livekit_url": livekit.url,
        "livekit_key": livekit.key,
        "livekit_secret": livekit.secret,
        "full_access_homeservers": [],
        "rc_token": _RATE_OFF,
        "rc_openid": _RATE_OFF,
        **more,
    }


@contextlib.contextmanager
def running(*servers: LiveKit | Synapse | Postgres | Redis | Nginx) -> Iterator[None]:
    """Start the servers, and stop them at the end."""
    processes: list[Process] = []
    for server in servers:
        processes += server.processes if isinstance(server, Synapse) else [server.process]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready()
        yield
    finally:
        stop_all(processes)


@contextlib.contextmanager
def one_homeserver(
    directory: Path, name: str, extra: dict[str, Any] | None = None, **more: Any
) -> Iterator[tuple[Synapse, LiveKit]]:
    """Run a homeserver and a LiveKit that sends its webhooks to it.

    Args:
        directory: for all files.
        name: of the homeserver.
        extra: added to homeserver.yaml.
        more: options of the module.

    Raises:
        MissingTool
    """
    livekit = LiveKit(directory)
    synapse = Synapse(name, directory, module_config(livekit, **more), extra)
    livekit.webhook_urls.append(synapse.client_url + PREFIX + "/sfu_webhook")
    with running(livekit, synapse):
        yield synapse, livekit


@dataclass(frozen=True)
class Homeservers:
    """Homeservers A and B, which federate. Each has the module and its own LiveKit."""

    a: Synapse
    livekit_a: LiveKit
    b: Synapse
    livekit_b: LiveKit

    def user_of_a(self, name: str = "alice", admin: bool = False) -> User:
        return self.a.register(f"{name}{next(_number)}", admin)

    def user_of_b(self, name: str = "rita") -> User:
        return self.b.register(f"{name}{next(_number)}")

    def room_of_both(self, alice: User, rita: User) -> str:
        """Create a room of a user of A, which a user of B joins."""
        room_id = alice.create_room(invite=[rita.user_id])
        rita.join(room_id, via=[self.a.server_name])
        return room_id


@contextlib.contextmanager
def two_homeservers(directory: Path) -> Iterator[Homeservers]:
    """Run two federating homeservers. A logs at level DEBUG.

    Raises:
        MissingTool
    """
    for name in ("livekit_a", "livekit_b"):
        (directory / name).mkdir()
    livekit_a, livekit_b = LiveKit(directory / "livekit_a"), LiveKit(directory / "livekit_b")
    a = Synapse("a", directory, module_config(livekit_a), log_level="DEBUG")
    b = Synapse("b", directory, module_config(livekit_b), host="localhost")
    with running(livekit_a, livekit_b, a, b):
        yield Homeservers(a, livekit_a, b, livekit_b)


@dataclass(frozen=True)
class Cluster:
    """A homeserver on PostgreSQL with several processes, which are connected by Redis.

    The processes are the main process, a generic worker, which gets LiveKit's webhooks, and a
    worker for background tasks.
    """

    synapse: Synapse
    livekit: LiveKit

    def user(self, name: str = "carol", admin: bool = False) -> User:
        return self.synapse.register(f"{name}{next(_number)}", admin)

    @property
    def urls(self) -> dict[str, str]:
        """The client URL of each process."""
        return {"main": self.synapse.client_url, "worker": self.synapse.worker_urls[0]}


@contextlib.contextmanager
def workers(directory: Path) -> Iterator[Cluster]:
    """Run a homeserver with workers.

    Raises:
        MissingTool
    """
    livekit, redis, postgres = LiveKit(directory), Redis(directory), Postgres(directory)
    with running(redis, postgres):
        synapse = Synapse(
            "c",
            directory,
            module_config(livekit),
            postgres=postgres,
            redis=redis,
            workers=1,
            background_worker=True,
        )
        livekit.webhook_urls.append(synapse.worker_urls[0] + PREFIX + "/sfu_webhook")
        with running(livekit, synapse):
            yield Cluster(synapse, livekit)
