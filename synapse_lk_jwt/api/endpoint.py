# SPDX-License-Identifier: Apache-2.0
"""What the HTTP resources and servlets of this module have in common."""

import json

from synapse.api.errors import UnrecognizedRequestError
from synapse.http.server import (
    DirectServeJsonResource,
    UnrecognizedRequestResource,
    respond_with_json_bytes,
)
from synapse.http.site import SynapseRequest
from synapse.types import JsonDict
from twisted.web.resource import Resource
from twisted.web.server import Request

from synapse_lk_jwt.compat.homeserver import Homeserver


def authorization(request: SynapseRequest) -> str:
    """The `Authorization` header, or an empty string. It can hold any bytes."""
    # With a name of type str, Twisted would decode the value as UTF-8.
    return (request.getHeader(b"Authorization") or b"").decode("latin-1")


def respond(request: SynapseRequest, code: int, content: JsonDict) -> None:
    """Answers on the main thread, with CORS headers, unless the client has disconnected.

    Synapse encodes the answers of its own endpoints on a thread, because some of them are huge. For
    an answer as small as a token, that takes longer than all other work of the request.

    Args:
        request: the request; its handler returns nothing to Synapse.
        code: the HTTP status.
        content: a small JSON object.
    """
    body = json.dumps(content, separators=(",", ":")).encode("ascii")
    respond_with_json_bytes(request, code, body, send_cors=True)


class Directory(UnrecognizedRequestResource):
    """A path with others below it. An unknown path is 404 `M_UNRECOGNIZED`, with CORS headers.

    Empty path segments are ignored: clients append `/sfu/get` to a service URL that may end with a
    slash, and some proxies double slashes.
    """

    def __init__(self) -> None:
        Resource.__init__(self)

    def getChild(self, path: bytes | str, request: Request) -> Resource:
        return UnrecognizedRequestResource() if path else self


class Endpoint(DirectServeJsonResource):
    """One path with one handler."""

    METHODS: tuple[bytes, ...] = (b"POST",)

    def __init__(self, homeserver: Homeserver) -> None:
        super().__init__(clock=homeserver.clock)
        self._homeserver = homeserver

    async def _async_render(self, request: SynapseRequest) -> tuple[int, JsonDict] | None:
        # Synapse reads an attribute named after the HTTP method, which can be any string.
        if request.method not in self.METHODS:
            raise UnrecognizedRequestError(code=405)
        return await super()._async_render(request)

    def _send_response(self, request: SynapseRequest, code: int, response_object: JsonDict) -> None:
        respond(request, code, response_object)

    def getChild(self, path: bytes, request: Request) -> Resource:
        return UnrecognizedRequestResource() if path else self
