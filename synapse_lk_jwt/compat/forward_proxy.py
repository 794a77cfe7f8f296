# SPDX-License-Identifier: Apache-2.0
"""The forward proxy that Synapse's HTTP client uses."""

from collections.abc import Mapping
from typing import Protocol
from urllib.parse import urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

import attr
from synapse.http.proxyagent import parse_proxy


@attr.s(auto_attribs=True, frozen=True, slots=True)
class ForwardProxy:
    """A proxy that Synapse's HTTP client sends requests through.

    Attributes:
        host: its host.
        port: its port.
        is_tls: whether Synapse speaks TLS with the proxy itself.
        authorization: the header `Proxy-Authorization`, None for a proxy without password.
    """

    host: str
    port: int
    is_tls: bool
    authorization: str | None = attr.ib(repr=False)

    @property
    def url(self) -> str:
        """Its address, without user and password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.is_tls else 'http'}://{host}:{self.port}"


class ProxySettings(Protocol):
    """Synapse's settings for proxies, from `homeserver.yaml` and the environment."""

    @property
    def http_proxy(self) -> str | None: ...

    @property
    def https_proxy(self) -> str | None: ...

    def get_proxies_dictionary(self) -> Mapping[str, object]: ...


class ProxyServerConfig(Protocol):
    """The parts of the section `server` that this file uses."""

    @property
    def proxy_config(self) -> ProxySettings: ...


class ProxyConfig(Protocol):
    """The parts of Synapse's configuration that this file uses."""

    @property
    def server(self) -> ProxyServerConfig: ...


def forward_proxy(config: ProxyConfig, url: str) -> ForwardProxy | None:
    """The proxy that Synapse's HTTP client uses for a URL, None if it connects directly.

    Synapse reads `http_proxy`, `https_proxy` and `no_proxy_hosts`, then the environment variables.
    It also applies them to the HTTP client that it documents as one without proxies, and to
    addresses of this machine.

    Args:
        config: Synapse's configuration.
        url: the URL of the request.

    Raises:
        ValueError: if Synapse cannot use the proxy either.
    """
    proxies = config.server.proxy_config
    parts = urlsplit(url)
    proxy = proxies.https_proxy if parts.scheme == "https" else proxies.http_proxy
    if not proxy or proxy_bypass_environment(
        parts.hostname or "", proxies=proxies.get_proxies_dictionary()
    ):
        return None
    scheme, host, port, credentials = parse_proxy(proxy.encode())
    return ForwardProxy(
        host.decode(),
        port,
        scheme == b"https",
        credentials.as_proxy_authorization_value().decode() if credentials else None,
    )
