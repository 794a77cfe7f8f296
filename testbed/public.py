# SPDX-License-Identifier: Apache-2.0
"""A homeserver and its LiveKit behind a reverse proxy with TLS, as in most real set-ups."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed.check import Checker
from testbed.livekit import LiveKit
from testbed.nginx import UPGRADE, Servers, proxy
from testbed.service import PREFIX
from testbed.sets import module_config, running
from testbed.synapse import Synapse


@dataclass(frozen=True)
class Public:
    """A homeserver that is set up correctly.

    nginx has one server for the homeserver, which also serves `.well-known/matrix/client`, and one
    for LiveKit.
    """

    synapse: Synapse
    livekit: LiveKit
    nginx: Servers
    check: Checker

    @property
    def service_url(self) -> str:
        return self.nginx.url("matrix") + PREFIX


def stage(directory: Path, name: str, livekit: LiveKit, **module: Any) -> Public:
    """Create a homeserver, and an nginx in front of it and of a LiveKit, without starting them.

    Args:
        directory: for files and logs.
        name: the name of the homeserver.
        livekit: the LiveKit. It will send its webhooks to the homeserver.
        module: options of the module.

    Raises:
        MissingTool
    """
    synapse = Synapse(name, directory)
    servers = {
        "matrix": proxy(synapse.client_url),
        "livekit": proxy(livekit.api_url, "/", *UPGRADE),
    }
    nginx = Servers(synapse.directory, servers, synapse.directory)
    synapse.module_config = module_config(
        livekit,
        livekit_url=nginx.url("livekit").replace("https:", "wss:"),
        livekit_internal_url=livekit.api_url,
        **module,
    )
    synapse.extra_config["public_baseurl"] = nginx.url("matrix")
    synapse.extra_config["experimental_features"] = {"msc4222_enabled": True}
    livekit.webhook_urls.append(f"{synapse.client_url}{PREFIX}/sfu_webhook")
    options = ["--connect-to", f"127.0.0.1:443:127.0.0.1:{nginx.port('matrix')}"]
    # The certificate is self-signed.
    env = {"SSL_CERT_FILE": str(synapse.directory / "tls.crt")}
    return Public(synapse, livekit, nginx, Checker(synapse, options, env))


@contextlib.contextmanager
def public_homeserver(directory: Path) -> Iterator[Public]:
    """Run a homeserver that is set up correctly.

    Raises:
        MissingTool
    """
    public = stage(directory, "p", LiveKit(directory))
    with running(public.livekit, public.synapse, public.nginx):
        yield public
