# SPDX-License-Identifier: Apache-2.0
"""What all paths of the service have in common."""

from synapse.api.errors import UnrecognizedRequestError
from synapse.http.server import DirectServeJsonResource, UnrecognizedRequestResource
from synapse.http.site import SynapseRequest
from synapse.types import JsonDict
from twisted.web.resource import Resource
from twisted.web.server import Request

from synapse_lk_jwt.api.answers import respond
from synapse_lk_jwt.compat.homeserver import Homeserver


def authorization(request: SynapseRequest) -> str:
    """The header of that name, or an empty string. Any bytes may stand there."""
    # By a name in bytes, because by one in letters Twisted decodes it as UTF-8.
    return (request.getHeader(b"Authorization") or b"").decode("latin-1")


class Directory(UnrecognizedRequestResource):
    """A path with others below it; what is not there is 404 `M_UNRECOGNIZED`, with CORS.

    Empty path segments are ignored: clients append `/sfu/get` to a service URL that may end with a
    slash, and some proxies double slashes.
    """

    def __init__(self) -> None:
        Resource.__init__(self)

    def getChild(self, path: bytes | str, request: Request) -> Resource:
        return UnrecognizedRequestResource() if path else self


class Endpoint(DirectServeJsonResource):
    """One path with one verb."""

    METHODS: tuple[bytes, ...] = (b"POST",)

    def __init__(self, homeserver: Homeserver) -> None:
        super().__init__(clock=homeserver.clock)
        self._homeserver = homeserver

    async def _async_render(self, request: SynapseRequest) -> tuple[int, JsonDict] | None:
        # Synapse finds the handler by the verb's name, and any string can be a verb.
        if request.method not in self.METHODS:
            raise UnrecognizedRequestError(code=405)
        return await super()._async_render(request)

    def _send_response(self, request: SynapseRequest, code: int, response_object: JsonDict) -> None:
        respond(request, code, response_object)

    def getChild(self, path: bytes, request: Request) -> Resource:
        return UnrecognizedRequestResource() if path else self
