# SPDX-License-Identifier: Apache-2.0
"""What a running Synapse reports to the check command."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import attr
from synapse.api.errors import ResourceLimitError, UnrecognizedRequestError
from synapse.http.site import SynapseRequest
from synapse.types import JsonDict, get_domain_from_id

from synapse_lk_jwt.api import fields
from synapse_lk_jwt.api.endpoint import Endpoint, authorization
from synapse_lk_jwt.api.fields import MAX_BODY_BYTES, bad_json, optional, read_body
from synapse_lk_jwt.api.services import Services
from synapse_lk_jwt.auth import openid
from synapse_lk_jwt.auth.openid import InvalidToken
from synapse_lk_jwt.check.signature import is_signed
from synapse_lk_jwt.issuer import NotInRoom
from synapse_lk_jwt.livekit.tables import CallTable
from synapse_lk_jwt.process_registry import ProcessRegistry

# No homeserver issued this OpenID token. A homeserver that rejects it is reachable.
UNKNOWN = "synapse-lk-jwt-check"


@attr.s(auto_attribs=True, frozen=True, slots=True)
class CheckBody:
    """The body of `check`: nothing, or a user and a room."""

    user_id: str | None = optional(fields.user_id)
    room_id: str | None = optional(fields.room_id)


class CheckResource(Endpoint):
    """Reports this process, the other processes, and what decides about one user's calls.

    POST /_synapse/client/livekit/jwt/check HTTP/1.1
    Authorization: …

    {"user_id": "@user:example.org", "room_id": "!room:example.org"}

    Both fields may be left out. The signature is made with LiveKit's API secret. A request without
    it gets the answer of a path that does not exist.
    """

    def __init__(
        self,
        services: Services,
        processes: ProcessRegistry,
        calls: CallTable,
        not_served: str | None,
        settings: Mapping[str, Any],
    ) -> None:
        """
        Args:
            services: what all endpoints share.
            processes: the processes that have loaded the module.
            calls: the calls that were noted, with their LiveKit rooms.
            not_served: why MSC4195's endpoints are not served; None if they are.
            settings: the settings that this process was started with, see `check/start.py`.
        """
        super().__init__(services.homeserver)
        self._issuer = services.issuer
        self._livekit_proxy = services.livekit_proxy
        self._processes = processes
        self._calls = calls
        self._not_served = not_served
        self._settings = settings

    async def _async_render(self, request: SynapseRequest) -> tuple[int, JsonDict] | None:
        assert request.content is not None
        # The signature covers the whole body, so it does not match a body that is cut off here.
        body = request.content.read(MAX_BODY_BYTES)
        request.content.seek(0)
        now_ms = self._homeserver.clock.time_msec()
        if not is_signed(self._issuer.signer.secret, authorization(request), body, now_ms):
            # The same answer as for a path that does not exist.
            raise UnrecognizedRequestError(code=404)
        return await super()._async_render(request)

    async def _async_render_POST(self, request: SynapseRequest) -> tuple[int, JsonDict]:
        body = read_body(request, CheckBody)
        homeserver = self._homeserver
        answer: JsonDict = {
            "server_name": homeserver.server_name,
            "instance": homeserver.instance_name,
            "is_background": homeserver.runs_background_tasks,
            "versions": {name: version(name) for name in ("synapse-lk-jwt", "matrix-synapse")},
            "now_ts": homeserver.clock.time_msec(),
            "processes": [attr.asdict(p) for p in await self._processes.present()],
            "transports": homeserver.discovery.transports,
            "not_served": self._not_served,
            "livekit_proxy": self._livekit_proxy,
            **self._settings,
        }
        if body.user_id is not None:
            if body.room_id is None:
                raise bad_json("room_id", "is missing")
            answer["user"] = await self._user(body.user_id, body.room_id)
        return 200, answer

    async def _user(self, user_id: str, room_id: str) -> JsonDict:
        """What decides whether a user gets a token."""
        homeserver, server = self._homeserver, get_domain_from_id(user_id)
        is_mine = homeserver.is_mine(user_id)
        is_here = await homeserver.rooms.is_host_joined(homeserver.server_name, room_id)
        auth_blocked: str | None = None
        if is_mine:
            try:
                await homeserver.users.check_auth_blocking(user_id)
            except ResourceLimitError as e:
                auth_blocked = e.msg
        try:
            await self._issuer.check_membership(user_id, room_id)
            is_allowed = True
        except NotInRoom:
            is_allowed = False
        cannot_verify: str | None = None
        if not is_mine:
            try:
                await openid.user_of_remote_token(homeserver, server, UNKNOWN)
            except InvalidToken as e:
                # A homeserver must reject a token that it did not issue.
                cannot_verify = None if e.cause == "refused" else str(e)
        return {
            "is_mine": is_mine,
            "is_active": await homeserver.users.is_active(user_id) if is_mine else None,
            "auth_blocked": auth_blocked,
            "standing": (await homeserver.users.standing(user_id)).value,
            "cannot_verify": cannot_verify,
            "is_blocked": await homeserver.rooms.is_blocked(room_id),
            "is_here": is_here,
            "membership": await homeserver.rooms.membership(user_id, room_id) if is_here else None,
            "acl_allows": await homeserver.rooms.acl_allows(server, room_id) if is_here else None,
            "is_allowed": is_allowed,
            "livekit_rooms": (await self._calls.in_rooms([room_id])).get(room_id, []),
        }
