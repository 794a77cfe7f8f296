# SPDX-License-Identifier: Apache-2.0
"""What Synapse announces to clients: `rtc/transports` (MSC4143) and `.well-known/matrix/client`."""

import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, Protocol

from synapse.http.server import HttpServer
from synapse.http.servlet import RestServlet
from synapse.http.site import SynapseRequest
from synapse.types import JsonDict

from synapse_lk_jwt.compat.self_test import Feature
from synapse_lk_jwt.compat.servlets import register_client_servlets
from synapse_lk_jwt.discovery import FOCI, MSC4143, add_transports

# The first Synapse that names MSC4143 in `/versions` itself.
VERSIONS_NAME_MSC4143 = (1, 156)


class RtcConfig(Protocol):
    """The parts of the section `matrix_rtc` that this file uses."""

    transports: list[JsonDict]


class ExperimentalConfig(Protocol):
    """The parts of the section `experimental` that this file uses."""

    msc4143_enabled: bool


class ServerConfig(Protocol):
    """The parts of the section `server` that this file uses."""

    extra_well_known_client_content: dict[str, Any]


class DiscoveryConfig(Protocol):
    """The parts of Synapse's configuration that this file uses."""

    @property
    def matrix_rtc(self) -> RtcConfig: ...

    @property
    def experimental(self) -> ExperimentalConfig: ...

    @property
    def server(self) -> ServerConfig: ...


class DiscoveryHomeServer(Protocol):
    """The parts of Synapse's `HomeServer` that this file uses."""

    @property
    def config(self) -> DiscoveryConfig: ...


class Discovery:
    """Reads and changes what Synapse announces."""

    def __init__(self, hs: DiscoveryHomeServer, off: Collection[Feature]) -> None:
        self._hs = hs
        self._config = hs.config
        self._off = off

    @property
    def transports(self) -> list[JsonDict]:
        """The entries of `rtc/transports`; none if Synapse does not serve it."""
        config = self._config
        if Feature.TRANSPORTS in self._off or not config.experimental.msc4143_enabled:
            return []
        return config.matrix_rtc.transports

    def advertise(
        self,
        transports: Sequence[Mapping[str, str]],
        foci: Sequence[Mapping[str, str]],
        servlet: RestServlet,
    ) -> str | None:
        """Adds entries to `rtc/transports` and `.well-known/matrix/client`.

        The admin's entries stay, and a list that already names a LiveKit server is not changed.
        Must be called before the listeners start, because Synapse reads these settings then.

        Args:
            transports: the entries for `rtc/transports`.
            foci: the entries for `.well-known/matrix/client`.
            servlet: serves `rtc/transports` at the stable path, unless Synapse does.

        Returns:
            None if Synapse will serve the stable path, else the reason why not.
        """
        if Feature.TRANSPORTS not in self._off:
            rtc = self._config.matrix_rtc
            rtc.transports = add_transports("rtc/transports", rtc.transports, transports)
            self._config.experimental.msc4143_enabled = True
        if Feature.WELL_KNOWN not in self._off:
            self._add_foci(foci)
        try:
            register_client_servlets(self._hs, "transports", servlet.register, is_fallback=True)
            if synapse_version() < VERSIONS_NAME_MSC4143:
                register = partial(_register_versions, self._hs)
                register_client_servlets(self._hs, "versions", register)
        except ImportError:
            return "this Synapse has no registry of servlets"
        return None

    def _add_foci(self, foci: Sequence[Mapping[str, str]]) -> None:
        server = self._config.server
        well_known = dict(server.extra_well_known_client_content)
        own_foci = well_known.get(FOCI, [])
        if foci and isinstance(own_foci, list):
            well_known[FOCI] = add_transports(".well-known", own_foci, foci)
            server.extra_well_known_client_content = well_known


def synapse_version() -> tuple[int, ...]:
    """The major and minor version of the installed Synapse."""
    return tuple(map(int, re.findall(r"\d+", version("matrix-synapse"))[:2]))


def _register_versions(hs: Any, http_server: HttpServer) -> None:
    _VersionsServlet(hs).register(http_server)


class _VersionsServlet(RestServlet):
    """Synapse's `/versions`, which in addition names MSC4143.

    matrix-js-sdk 45 reads it before it requests `rtc/transports`.
    """

    # This pattern differs from Synapse's own: a servlet that is registered later with the same
    # pattern replaces this one.
    PATTERNS = (re.compile("^/_matrix/client/(?:versions)$"),)
    CATEGORY = "Client API requests"

    def __init__(self, hs: Any) -> None:
        from synapse.rest.client.versions import VersionsRestServlet

        super().__init__()
        self._own = VersionsRestServlet(hs)

    async def on_GET(self, request: SynapseRequest) -> tuple[int, JsonDict]:
        code, content = await self._own.on_GET(request)
        return code, {
            **content,
            "unstable_features": {**content["unstable_features"], MSC4143: True},
        }
