# SPDX-License-Identifier: Apache-2.0
"""Endpoints below `/_matrix` and elsewhere, which Synapse serves for the module.

A module cannot mount resources below `/_matrix`. But Synapse builds the client and the federation
tree from registries, which it reads when the listeners start, after the modules were loaded. A
Python process has one registry for each tree, and a test can have many homeservers in one process.
So our entries in the registries look up what was registered for the homeserver that is being built.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import attr
from synapse.http.server import HttpServer
from synapse.http.servlet import RestServlet
from synapse.module_api import ModuleApi
from twisted.web.resource import Resource

from synapse_lk_jwt.compat.app_services import AppServices
from synapse_lk_jwt.compat.self_test import Feature
from synapse_lk_jwt.identifiers import path_prefixes_overlap

logger = logging.getLogger(__name__)

# The names of our groups in Synapse's registries.
GROUP = "synapse_lk_jwt"
FALLBACK_GROUP = "_synapse_lk_jwt_discovery"

# The attribute of a homeserver that holds what was registered for it.
_ATTRIBUTE = "_synapse_lk_jwt_servlets"

Register = Callable[[HttpServer], None]


class FederationServlet(Protocol):
    """The method of a servlet that Synapse calls."""

    def register(self, server: HttpServer) -> None: ...


class FederationServletFactory(Protocol):
    """Creates a servlet from the arguments that Synapse passes to its own servlets."""

    def __call__(
        self, *, hs: Any, authenticator: Any, ratelimiter: Any, server_name: str
    ) -> FederationServlet: ...


class ServletsConfig(Protocol):
    """The parts of Synapse's configuration that this file uses."""

    @property
    def experimental(self) -> object: ...


class ServletsHomeServer(Protocol):
    """The parts of Synapse's `HomeServer` that this file uses."""

    @property
    def config(self) -> ServletsConfig: ...

    @property
    def _module_web_resources(self) -> dict[str, Resource]: ...


@attr.s(auto_attribs=True, slots=True)
class _Registered:
    """What was registered for one homeserver.

    Attributes:
        client: registers servlets below `/_matrix/client` before Synapse's own, by name.
        fallback: the same, after Synapse's own.
        federation: creates the servlet below `/_matrix/federation`.
    """

    client: dict[str, Register] = attr.Factory(dict)
    fallback: dict[str, Register] = attr.Factory(dict)
    federation: FederationServletFactory | None = None

    @staticmethod
    def of(hs: Any) -> "_Registered":
        """What was registered for a homeserver, to be added to."""
        if not hasattr(hs, _ATTRIBUTE):
            setattr(hs, _ATTRIBUTE, _Registered())
        registered: _Registered = getattr(hs, _ATTRIBUTE)
        return registered


class Servlets:
    """Registers endpoints with Synapse."""

    def __init__(
        self,
        api: ModuleApi,
        hs: ServletsHomeServer,
        app_services: AppServices,
        off: Collection[Feature],
    ) -> None:
        self._api = api
        self._hs = hs
        self._app_services = app_services
        self._has_web_resources = Feature.PATHS not in off

    def register_web_resource(self, path: str, resource: Resource) -> bool:
        """Serves a resource; returns False if another module serves its path."""
        self._api.register_web_resource(path, resource)
        if not self._has_web_resources:
            return True
        return self._hs._module_web_resources.get(path) is resource

    def serve_below_matrix(
        self,
        client: Sequence[RestServlet],
        federation: FederationServletFactory,
        prefix: str,
    ) -> str | None:
        """Serves servlets below `/_matrix/client`, and one below `/_matrix/federation`.

        Args:
            client: the client-server servlets.
            federation: creates the server-server servlet.
            prefix: the path prefix of these servlets, such as `rtc/livekit`. They are not served if
                an application service claims it (MSC4512).

        Returns:
            None if Synapse will serve them, else the reason why not.

        Raises:
            ImportError: if this Synapse has no registries. The caller checks that first.
        """
        claim = self._claim_of(prefix)
        if claim is not None:
            return claim
        from synapse.federation.transport.server import SERVLET_GROUPS

        def register(server: HttpServer) -> None:
            for servlet in client:
                with log_exceptions():
                    servlet.register(server)

        register_client_servlets(self._hs, "endpoints", register)
        _Registered.of(self._hs).federation = federation
        _put_first(SERVLET_GROUPS, _FederationServlet)
        return None

    def _claim_of(self, prefix: str) -> str | None:
        """The application service that claims a path prefix, as a sentence without a full stop."""
        experimental = getattr(self._hs.config, "experimental", None)
        if not getattr(experimental, "msc4512_enabled", False):
            return None
        for service in self._app_services.all():
            claimed = getattr(service, "proxy_prefix", None)
            if claimed and path_prefixes_overlap(prefix, claimed):
                return f"the application service {service.id!r} claims {claimed}"
        return None


def register_client_servlets(
    hs: Any, name: str, register: Register, *, is_fallback: bool = False
) -> None:
    """Registers servlets below `/_matrix/client` of one homeserver.

    Args:
        hs: the homeserver.
        name: names them; they replace what was registered by this name.
        register: registers them, when Synapse starts a listener.
        is_fallback: whether a servlet of Synapse's own for the same path is used instead.

    Raises:
        ImportError: if this Synapse has no registry.
    """
    from synapse.rest import SERVLET_GROUPS

    registered = _Registered.of(hs)
    if is_fallback:
        registered.fallback[name] = register
        # Synapse uses the first servlet that matches a path.
        SERVLET_GROUPS.setdefault(FALLBACK_GROUP, (_register_fallback,))
    else:
        registered.client[name] = register
        _put_first(SERVLET_GROUPS, _register_client)


def _put_first(groups: dict[str, Any], servlet: Any) -> None:
    """Registers our group first, because Synapse tries hundreds of patterns in this order."""
    others = {name: servlets for name, servlets in groups.items() if name != GROUP}
    groups.clear()
    groups.update({GROUP: (servlet,), **others})


@contextmanager
def log_exceptions() -> Iterator[None]:
    """Logs an exception of a servlet, which Synapse registers while it starts its listeners.

    The listeners must start, even if a newer Synapse registers servlets in another way.
    """
    try:
        yield
    except Exception:
        logger.exception(
            "Synapse could not register an endpoint of the module. That endpoint is not served"
        )


def _register_client(hs: Any, http_server: HttpServer) -> None:
    for register in _Registered.of(hs).client.values():
        with log_exceptions():
            register(http_server)


def _register_fallback(hs: Any, http_server: HttpServer) -> None:
    for register in _Registered.of(hs).fallback.values():
        with log_exceptions():
            register(http_server)


class _FederationServlet:
    """Our entry in Synapse's registry of federation servlets; creates the homeserver's servlet."""

    def __init__(self, hs: Any, **kwargs: Any) -> None:
        self._servlet: FederationServlet | None = None
        federation = _Registered.of(hs).federation
        if federation is not None:
            with log_exceptions():
                self._servlet = federation(hs=hs, **kwargs)

    def register(self, server: HttpServer) -> None:
        if self._servlet is not None:
            with log_exceptions():
                self._servlet.register(server)
