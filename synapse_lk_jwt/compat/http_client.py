# SPDX-License-Identifier: Apache-2.0
"""Requests to services that are not homeservers, through Synapse's HTTP client."""

from copy import copy
from typing import Any

from synapse.http.client import SimpleHttpClient
from twisted.internet.defer import Deferred
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IResponse
from zope.interface import implementer

from synapse_lk_jwt.compat.forward_proxy import ForwardProxy, ProxyConfig, forward_proxy


class HttpClient:
    """Sends requests."""

    def __init__(self, client: SimpleHttpClient, config: ProxyConfig) -> None:
        """
        Args:
            client: Synapse's client for requests that are not federation.
            config: Synapse's configuration.
        """
        self._client = client
        self._config = config

    def forward_proxy(self, url: str) -> ForwardProxy | None:
        """The proxy for requests to a URL; None if Synapse connects directly.

        Raises:
            ValueError: if Synapse cannot use the proxy either.
        """
        return forward_proxy(self._config, url)

    async def request(
        self, method: str, uri: str, body: bytes | None, headers: Headers
    ) -> IResponse:
        """Sends a request, and returns the response with the body unread.

        Cancelling closes the connection. Synapse's client does not close it: its own limit of 60 s
        shields the request from the cancellation. The request to a server that hangs stays open.
        """
        client = copy(self._client)
        client.agent = agent = _CancellableAgent(client.agent)
        try:
            return await client.request(method, uri, body, headers)
        except Exception:
            # Synapse's client raises different exceptions for a cancelled request.
            agent.cancel()
            raise


@implementer(IAgent)
class _CancellableAgent:
    """Forwards one request to another agent, and can cancel it."""

    def __init__(self, agent: IAgent) -> None:
        self._agent = agent
        self._request: Deferred[IResponse] | None = None

    def request(self, *args: Any, **more: Any) -> "Deferred[IResponse]":
        self._request = self._agent.request(*args, **more)
        return self._request

    def cancel(self) -> None:
        """Cancels the request, unless it is over."""
        if self._request is not None:
            self._request.cancel()
            # Synapse's client may have failed before it waited for the answer.
            self._request.addErrback(lambda _: None)
