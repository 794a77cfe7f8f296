# SPDX-License-Identifier: Apache-2.0
"""Tokens for the SFUs of other homeservers, which these hand out over federation (MSC4195)."""

import logging
import re

import attr
from synapse.types import JsonDict
from synapse.util.caches.ttlcache import TTLCache

from synapse_lk_jwt import metrics
from synapse_lk_jwt.compat.federation_http import is_unknown_endpoint
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.compat.http import NETWORK_ERRORS, read_body, within
from synapse_lk_jwt.untrusted import bounded_repr, parse_json

logger = logging.getLogger(__name__)

STABLE_PATH = "/_matrix/federation/v1/rtc/livekit/get_token"
UNSTABLE_PATH = "/_matrix/federation/unstable/io.element.msc4195/rtc/livekit/get_token"

TIMEOUT_SEC = 10
MAX_ANSWER_BYTES = 64 * 1024

# How long a server is first asked in the way that it understood last.
REMEMBER_WAY_SEC = 3600

JWT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")


class RemoteRefusal(Exception):
    """The other homeserver refuses the user.

    Attributes:
        status: its HTTP status.
        errcode: its Matrix error code.
    """

    def __init__(self, status: int, errcode: str) -> None:
        super().__init__(f"{status} {errcode}")
        self.status = status
        self.errcode = errcode


class RemoteFailure(Exception):
    """The other homeserver gave no proper answer. The text says why, for the log alone."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class _Way:
    """How a server wants to be asked.

    Attributes:
        is_unstable: at the unstable path.
        is_nested: with `member: {"id": …}` instead of `member_id`.
    """

    is_unstable: bool = False
    is_nested: bool = False


class RemoteSfus:
    """Asks other homeservers for tokens of their SFUs."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._ways: TTLCache[str, _Way] = TTLCache(
            cache_name="synapse_lk_jwt_federation_ways",
            server_name=homeserver.server_name,
            timer=homeserver.clock.time,
        )

    async def get_token(self, server_name: str, content: JsonDict) -> str:
        """Asks a homeserver for a token.

        Args:
            server_name: the other homeserver.
            content: the body of MSC4195's federation request, with the authenticated user's ID.

        Returns:
            The token, a JWT as far as one can tell without its key.

        Raises:
            RemoteRefusal: 403 `M_FORBIDDEN` and 400 `M_INVALID_PARAM`, which are for the client.
            RemoteFailure: if there is no token for any other reason, after ten seconds at most.
        """
        try:
            status, body = await within(
                TIMEOUT_SEC, self._homeserver.clock, lambda: self._ask(server_name, content)
            )
        except NETWORK_ERRORS as e:
            raise RemoteFailure(f"{server_name} could not be asked ({bounded_repr(e)})") from e
        try:
            answer = parse_json(body)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise RemoteFailure(f"{server_name} answered {status} without a JSON object")
        if status == 200:
            token = answer.get("jwt")
            if not isinstance(token, str) or not JWT.fullmatch(token):
                raise RemoteFailure(f"{server_name} answered without a token")
            metrics.remote_tokens.inc()
            return token
        for refusal in ((403, "M_FORBIDDEN"), (400, "M_INVALID_PARAM")):
            if refusal == (status, answer.get("errcode")):
                raise RemoteRefusal(*refusal)
        errcode = bounded_repr(answer.get("errcode"))
        raise RemoteFailure(f"{server_name} answered {status} {errcode}")

    async def _ask(self, server_name: str, content: JsonDict) -> tuple[int, bytes]:
        """The answer at the stable path, or at the unstable one where that is all there is.

        lk-jwt-service 0.7 knows `member_id` in the form of an earlier MSC only, and rejects a body
        with fields that it does not know. So a server that rejects one form is asked in the other.
        """
        way = self._ways.get(server_name, _Way())
        status, body = await self._ask_in(way, server_name, content)
        if is_unknown_endpoint(status, body):
            way = attr.evolve(way, is_unstable=not way.is_unstable)
            status, body = await self._ask_in(way, server_name, content)
        if status == 400 and _errcode(body) in ("M_BAD_JSON", "M_NOT_JSON"):
            way = attr.evolve(way, is_nested=not way.is_nested)
            status, body = await self._ask_in(way, server_name, content)
        if status == 200 and way != _Way():
            self._ways.set(server_name, way, REMEMBER_WAY_SEC)
        else:
            self._ways.pop(server_name, None)
        return status, body

    async def _ask_in(self, way: _Way, server_name: str, content: JsonDict) -> tuple[int, bytes]:
        if way.is_nested:
            content = {**content, "member": {"id": content["member_id"]}}
            del content["member_id"]
        response = await self._homeserver.federation.request(
            "POST",
            server_name,
            UNSTABLE_PATH if way.is_unstable else STABLE_PATH,
            content=content,
        )
        return response.code, await read_body(response, MAX_ANSWER_BYTES)


def _errcode(body: bytes) -> object:
    try:
        answer = parse_json(body)
    except ValueError:
        return None
    return answer.get("errcode") if isinstance(answer, dict) else None
