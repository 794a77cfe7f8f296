# SPDX-License-Identifier: Apache-2.0
"""Fetches tokens for the SFUs of other homeservers from these homeservers (MSC4195)."""

import re
from typing import Any

import attr
from synapse.types import JsonDict
from synapse.util.caches.ttlcache import TTLCache

from synapse_lk_jwt import metrics
from synapse_lk_jwt.compat.federation_http import is_unknown_endpoint
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.compat.http import NETWORK_ERRORS, read_body, within
from synapse_lk_jwt.msc4195 import GET_TOKEN, STABLE, UNSTABLE, federation_path
from synapse_lk_jwt.untrusted import bounded_repr, parse_json

TIMEOUT_SEC = 10
MAX_ANSWER_BYTES = 64 * 1024

# How long the request form that a server last accepted is tried first.
REMEMBER_FORM_SEC = 3600

JWT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")

# The errors that MSC4195 passes on to the client.
_PASSED_ON = ((403, "M_FORBIDDEN"), (400, "M_INVALID_PARAM"))


class RemoteRefusal(Exception):
    """The other homeserver rejected the request for this user.

    Attributes:
        status: its HTTP status.
        errcode: its Matrix error code.
    """

    def __init__(self, status: int, errcode: str) -> None:
        super().__init__(f"{status} {errcode}")
        self.status = status
        self.errcode = errcode


class RemoteFailure(Exception):
    """The other homeserver gave no valid answer. The text names the cause, for the log only."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class _Form:
    """The form of request that a server accepts.

    Attributes:
        is_unstable: whether the path is the unstable one.
        is_nested: whether the body has `member: {"id": …}` instead of `member_id`.
    """

    is_unstable: bool = False
    is_nested: bool = False


class RemoteSfus:
    """Fetches tokens for the SFUs of other homeservers."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._forms: TTLCache[str, _Form] = TTLCache(
            cache_name="synapse_lk_jwt_federation_forms",
            server_name=homeserver.server_name,
            timer=homeserver.clock.time,
        )

    async def get_token(self, server_name: str, content: JsonDict) -> str:
        """Requests a token from a homeserver.

        Args:
            server_name: the other homeserver.
            content: the body of MSC4195's federation request, with the authenticated user's ID.

        Returns:
            The token. It has the form of a JWT; only the other homeserver could verify it.

        Raises:
            RemoteRefusal: 403 `M_FORBIDDEN` and 400 `M_INVALID_PARAM`, which are for the client.
            RemoteFailure: if the module gets no token for another reason, or within ten seconds.
        """
        try:
            status, body = await within(
                TIMEOUT_SEC, self._homeserver.clock, lambda: self._request(server_name, content)
            )
        except NETWORK_ERRORS as e:
            text = f"the request to {server_name} failed ({bounded_repr(e)})"
            raise RemoteFailure(text) from e
        token = _token_in_answer(server_name, status, body)
        metrics.remote_tokens.inc()
        return token

    async def _request(self, server_name: str, content: JsonDict) -> tuple[int, bytes]:
        """Requests a token at the stable path, or at the unstable one if the server has no other.

        lk-jwt-service 0.7 accepts only the form of `member_id` from before the MSC's acceptance,
        and rejects unknown fields. So if a server rejects one form, the module sends the other.
        """
        form = self._forms.get(server_name, _Form())
        status, body = await self._request_in(form, server_name, content)
        if is_unknown_endpoint(status, body):
            form = attr.evolve(form, is_unstable=not form.is_unstable)
            status, body = await self._request_in(form, server_name, content)
        if status == 400 and _object(body).get("errcode") in ("M_BAD_JSON", "M_NOT_JSON"):
            form = attr.evolve(form, is_nested=not form.is_nested)
            status, body = await self._request_in(form, server_name, content)
        if status == 200 and form != _Form():
            self._forms.set(server_name, form, REMEMBER_FORM_SEC)
        else:
            self._forms.pop(server_name, None)
        return status, body

    async def _request_in(
        self, form: _Form, server_name: str, content: JsonDict
    ) -> tuple[int, bytes]:
        if form.is_nested:
            content = {**content, "member": {"id": content["member_id"]}}
            del content["member_id"]
        path = federation_path(GET_TOKEN, UNSTABLE if form.is_unstable else STABLE)
        response = await self._homeserver.federation.request(
            "POST", server_name, path, content=content
        )
        return response.code, await read_body(response, MAX_ANSWER_BYTES)


def _token_in_answer(server_name: str, status: int, body: bytes) -> str:
    answer = _object(body)
    if status == 200:
        token = answer.get("jwt")
        if not isinstance(token, str) or not JWT.fullmatch(token):
            raise RemoteFailure(f"{server_name} answered without a token")
        return token
    for passed_on in _PASSED_ON:
        if passed_on == (status, answer.get("errcode")):
            raise RemoteRefusal(*passed_on)
    errcode = bounded_repr(answer.get("errcode"))
    raise RemoteFailure(f"{server_name} answered {status} {errcode}")


def _object(body: bytes) -> JsonDict:
    """The JSON object in a body; an empty one if the body is anything else."""
    try:
        answer: Any = parse_json(body)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}
