# SPDX-License-Identifier: Apache-2.0
"""Requests to other homeservers."""

from collections.abc import Collection, Mapping
from io import BytesIO
from typing import Any
from urllib.parse import urlencode

import attr
from canonicaljson import encode_canonical_json
from synapse.api.errors import FederationDeniedError, HttpResponseException, SynapseError
from synapse.crypto.context_factory import FederationPolicyForHTTPS
from synapse.http import QuieterFileBodyProducer
from synapse.http import client as http_client
from synapse.http.matrixfederationclient import MatrixFederationHttpClient
from synapse.logging.context import make_deferred_yieldable, run_in_background
from synapse.server import HomeServer
from synapse.types import ISynapseReactor, JsonDict
from twisted.internet.defer import Deferred
from twisted.internet.error import DNSLookupError
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from twisted.web.http_headers import Headers
from twisted.web.iweb import IResponse
from zope.interface import implementer

from synapse_lk_jwt.compat.self_test import Feature

# How long a connection to another homeserver may last. This is longer than a request may take.
CONNECTION_LIFETIME_SEC = 12

# How much may be received over it: TLS and HTTP headers, and a body, which has a narrower limit.
MAX_CONNECTION_BYTES = 256 * 1024


def is_unknown_endpoint(status: int, body: bytes) -> bool:
    """Whether a response states that the server does not serve the path."""
    return http_client.is_unknown_endpoint(HttpResponseException(status, "", body))


class FederationHttp:
    """Sends requests to other homeservers, signed where they have a body."""

    def __init__(self, hs: HomeServer, off: Collection[Feature]) -> None:
        self._hs = hs
        self._is_off = Feature.OTHER_SERVERS in off
        self._client: MatrixFederationHttpClient | None = None

    async def request(
        self,
        method: str,
        server_name: str,
        path: str,
        query: Mapping[str, str] | None = None,
        content: JsonDict | None = None,
    ) -> IResponse:
        """Sends a request to another homeserver, and returns its response with the body unread.

        Uses the agent of Synapse's federation client, so that server discovery, TLS policy and IP
        block lists apply. The client's own method would write the query into the log, and read a
        body of any size. It would also count an error against the server, to which Synapse then
        sends no request for ten minutes. No redirect is followed. The caller must limit the time.

        Args:
            method: the HTTP verb.
            server_name: the other homeserver.
            path: the path, in ASCII.
            query: query parameters, if any.
            content: a JSON body; a request that has one is signed.

        Raises:
            FederationDeniedError: if `federation_domain_whitelist` does not name the server, or
                this Synapse lacks what the request needs.
            synapse_lk_jwt.compat.http.NETWORK_ERRORS: if the request fails.
        """
        client = self._client_for(server_name)
        if query:
            path = f"{path}?{urlencode(query)}"
        headers, producer = Headers(), None
        if content is not None:
            _sign(client, headers, server_name, method, path, content)
            producer = QuieterFileBodyProducer(
                BytesIO(encode_canonical_json(content)), cooperator=client._cooperator
            )
        uri = f"matrix-federation://{server_name}{path}"
        # The agent follows Synapse's rules for log contexts: it resets the context of its caller.
        response: Deferred[IResponse] = run_in_background(
            client.agent.request, method.encode("ascii"), uri.encode("ascii"), headers, producer
        )
        try:
            return await make_deferred_yieldable(response)
        except ValueError as e:
            # Twisted cannot resolve such a name. The server may delegate to it.
            raise DNSLookupError(f"not a host name: {e}") from None
        except SynapseError as e:
            raise DNSLookupError(f"not allowed: {e.msg}") from None

    def _client_for(self, server_name: str) -> MatrixFederationHttpClient:
        """The client, if requests to that server are allowed."""
        if self._is_off:
            raise FederationDeniedError(server_name)
        whitelist = self._hs.config.federation
        if not whitelist.is_domain_allowed_according_to_federation_whitelist(server_name):
            raise FederationDeniedError(server_name)
        if self._client is None:
            self._client = bounded_client(self._hs)
        return self._client


def _sign(
    client: MatrixFederationHttpClient,
    headers: Headers,
    server_name: str,
    method: str,
    path: str,
    content: JsonDict,
) -> None:
    """Adds the headers of a signed request with a JSON body."""
    headers.addRawHeader("Content-Type", "application/json")
    for signature in client.build_auth_headers(
        server_name.encode("ascii"), method.encode("ascii"), path.encode("ascii"), content
    ):
        headers.addRawHeader("Authorization", signature)


def bounded_client(hs: HomeServer) -> MatrixFederationHttpClient:
    """A federation client like Synapse's own, which closes each connection after one response.

    Any client can make this homeserver send requests to any number of servers. Idle connections to
    these would use up its file descriptors.
    """
    client = MatrixFederationHttpClient(hs, BoundedTls(hs))
    # Below the agent that applies the IP block list; `.well-known` requests use this pool as well.
    pool = client.agent._agent._pool  # type: ignore[attr-defined]
    pool.persistent = False
    return client


class BoundedTls(FederationPolicyForHTTPS):
    """Synapse's TLS policy, with connections that are bounded in time and in size.

    In time, because an orderly end of TLS needs an answer of the other side: a hostile server would
    keep the connection open forever. In size, because Twisted's client reads headers without limit
    and keeps them: a hostile server made Synapse grow by 400 MiB within ten seconds.
    """

    def __init__(self, hs: HomeServer) -> None:
        super().__init__(hs.config)
        self._reactor = hs.get_reactor()

    def get_options(self, host: bytes) -> IOpenSSLClientConnectionCreator:
        return _BoundedConnectionCreator(super().get_options(host), self._reactor)


@implementer(IOpenSSLClientConnectionCreator)
@attr.s(auto_attribs=True, frozen=True, slots=True)
class _BoundedConnectionCreator:
    _creator: IOpenSSLClientConnectionCreator
    _reactor: ISynapseReactor

    def clientConnectionForTLS(self, tls_protocol: Any) -> Any:
        receive, received = tls_protocol.dataReceived, 0

        def abort() -> None:
            # This has no effect if the connection has ended.
            tls_protocol.transport.abortConnection()

        def receive_bounded(data: bytes) -> None:
            nonlocal received
            received += len(data)
            if received > MAX_CONNECTION_BYTES:
                abort()
            else:
                receive(data)

        tls_protocol.dataReceived = receive_bounded
        self._reactor.callLater(CONNECTION_LIFETIME_SEC, abort)
        return self._creator.clientConnectionForTLS(tls_protocol)
