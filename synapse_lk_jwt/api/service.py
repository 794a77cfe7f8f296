# SPDX-License-Identifier: Apache-2.0
"""The service endpoints: what clients ask at `livekit_service_url`, with an OpenID token."""

import logging
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext

from synapse.api.errors import Codes, SynapseError, UnrecognizedRequestError
from synapse.http.site import SynapseRequest
from synapse.types import JsonDict

from synapse_lk_jwt import metrics
from synapse_lk_jwt.api.bodies import (
    GetTokenRequest,
    SfuGetRequest,
    bad_json,
    is_body_empty,
    read_json_object,
)
from synapse_lk_jwt.api.check import CheckResource
from synapse_lk_jwt.api.endpoint import Directory, Endpoint
from synapse_lk_jwt.api.errors import as_matrix_errors, counts_refusals, no_such_delayed_event
from synapse_lk_jwt.api.services import Services
from synapse_lk_jwt.api.webhook import SfuWebhookResource
from synapse_lk_jwt.auth import openid
from synapse_lk_jwt.auth.openid import InvalidToken, OpenIdToken
from synapse_lk_jwt.call_member import CallMember
from synapse_lk_jwt.livekit.naming import (
    MAX_IDENTITY_BYTES,
    device_identity,
    device_member_identity,
)
from synapse_lk_jwt.process_registry import ProcessRegistry
from synapse_lk_jwt.webhooks import WebhookHandler

logger = logging.getLogger(__name__)


class ServiceResource(Directory):
    """Everything below the path prefix."""

    def __init__(
        self,
        services: Services,
        webhooks: WebhookHandler,
        processes: ProcessRegistry,
        check: CheckResource,
    ) -> None:
        super().__init__()
        homeserver, issuer = services.homeserver, services.issuer
        sfu = Directory()
        sfu.putChild(b"get", SfuGetResource(services))
        self.putChild(b"sfu", sfu)
        self.putChild(b"get_token", GetTokenResource(services))
        if homeserver.delayed_events.are_enabled:
            # Clients take any answer but 404 as a promise.
            self.putChild(b"delegate_delayed_leave", DelegateDelayedLeaveResource(services))
        self.putChild(
            b"sfu_webhook",
            SfuWebhookResource(homeserver, issuer.signer, issuer.sealer, webhooks, processes),
        )
        self.putChild(b"check", check)
        self.putChild(b"healthz", HealthResource(homeserver))


class _TokenEndpoint(Endpoint):
    """Verifies OpenID tokens and hands out LiveKit tokens."""

    def __init__(self, services: Services) -> None:
        super().__init__(services.homeserver)
        self._services = services

    async def _verify(
        self, request: SynapseRequest, token: OpenIdToken, claimed_user_id: str | None = None
    ) -> str:
        """The user that a token proves; the client is not told what is wrong with a token."""
        is_local = self._homeserver.is_own_name(token.matrix_server_name)
        look_up: AbstractAsyncContextManager[None] = (
            nullcontext()
            if is_local
            else self._services.limits.look_up(request.get_client_ip_if_available())
        )
        try:
            async with look_up:
                user_id = await openid.verify(self._homeserver, token)
            if claimed_user_id not in (None, user_id):
                raise InvalidToken(
                    "other_user", f"it is of {user_id!r} and not of {claimed_user_id!r}"
                )
        except InvalidToken as e:
            where = "local" if is_local else "remote"
            metrics.openid_failures.labels(where, e.cause).inc()
            logger.info("Rejected an OpenID token of %r: %s", token.matrix_server_name, e)
            raise SynapseError(401, "The OpenID token is not valid", Codes.UNAUTHORIZED) from None
        return user_id

    def _check_may_delegate(self, token: OpenIdToken, delay_id: str | None) -> None:
        """Refuses users of other servers, ahead of the look-up: their delayed events are there."""
        if delay_id is not None and not self._homeserver.is_own_name(token.matrix_server_name):
            raise bad_json("delay_id", "is for users of this homeserver only")

    async def _check(self, user_id: str, room_id: str) -> None:
        await self._services.limits.ask_for_token(user_id, room_id)
        with as_matrix_errors():
            await self._services.issuer.check_membership(user_id, room_id)

    async def _delegate(
        self, user_id: str, room_id: str, slot_id: str, identities: Sequence[str], delay_id: str
    ) -> bool:
        member = CallMember(user_id, room_id, slot_id, tuple(identities))
        return await self._services.leaves.delegate(member, delay_id)

    async def _answer(
        self,
        user_id: str,
        room_id: str,
        slot_id: str,
        identity: str,
        delay_id: str | None,
        endpoint: metrics.Endpoint,
    ) -> tuple[int, JsonDict]:
        if self._homeserver.is_mine(user_id):
            await self._homeserver.users.check_auth_blocking(user_id)
        await self._check(user_id, room_id)
        if delay_id is not None and self._homeserver.delayed_events.are_enabled:
            # Ahead of what needs the SFU: a client does not ask a second time. One whose delayed
            # event is not there any more is served all the same.
            await self._delegate(user_id, room_id, slot_id, [identity], delay_id)
        with as_matrix_errors():
            member = CallMember(user_id, room_id, slot_id, (identity,))
            token = await self._services.issuer.issue(member, endpoint)
        return 200, {"url": self._services.livekit_url, "jwt": token}


class SfuGetResource(_TokenEndpoint):
    """A LiveKit access token for the one call of a room, for clients before `/get_token`.

    POST /_synapse/client/livekit/jwt/sfu/get HTTP/1.1

    {
        "room": "!room:example.org",
        "openid_token": {"access_token": "…", "matrix_server_name": "example.org"},
        "device_id": "ABCDEFG"
    }
    """

    @counts_refusals("sfu_get")
    async def _async_render_POST(self, request: SynapseRequest) -> tuple[int, JsonDict]:
        body = SfuGetRequest.from_json(read_json_object(request))
        self._check_may_delegate(body.openid_token, body.delay_id)
        user_id = await self._verify(request, body.openid_token)
        identity = device_identity(user_id, body.device_id)
        if len(identity.encode("utf-8")) > MAX_IDENTITY_BYTES:
            raise bad_json("device_id", "is too long")
        return await self._answer(
            user_id, body.room_id, body.slot_id, identity, body.delay_id, "sfu_get"
        )


class GetTokenResource(_TokenEndpoint):
    """A LiveKit access token for one slot of a room (MSC4195 before it moved into homeservers).

    POST /_synapse/client/livekit/jwt/get_token HTTP/1.1

    {
        "room_id": "!room:example.org",
        "slot_id": "m.call#ROOM",
        "openid_token": {"access_token": "…", "matrix_server_name": "example.org"},
        "member": {
            "id": "member",
            "claimed_user_id": "@user:example.org",
            "claimed_device_id": "ABCDEFG"
        }
    }
    """

    @counts_refusals("get_token")
    async def _async_render_POST(self, request: SynapseRequest) -> tuple[int, JsonDict]:
        body = GetTokenRequest.from_json(read_json_object(request))
        self._check_may_delegate(body.openid_token, body.delay_id)
        user_id = await self._verify(request, body.openid_token, body.claimed_user_id)
        identity = device_member_identity(user_id, body.claimed_device_id, body.member_id)
        return await self._answer(
            user_id, body.room_id, body.slot_id, identity, body.delay_id, "get_token"
        )


class DelegateDelayedLeaveResource(_TokenEndpoint):
    """Has the homeserver send a client's leave when the client is gone.

    POST /_synapse/client/livekit/jwt/delegate_delayed_leave HTTP/1.1

    As `/get_token`, with `delay_id` and `delay_timeout`. An empty body is answered as if the path
    did not exist.
    """

    async def _async_render_POST(self, request: SynapseRequest) -> tuple[int, JsonDict]:
        if is_body_empty(request):
            # A client probes whether it can delegate, without saying whose user it is. After any
            # other answer users of other servers, who cannot, would schedule their own leave an
            # hour ahead. Users of this homeserver learn it from MSC4195's endpoint.
            raise UnrecognizedRequestError(code=404)
        return await self._delegate_leave(request)

    @counts_refusals("delegate_delayed_leave")
    async def _delegate_leave(self, request: SynapseRequest) -> tuple[int, JsonDict]:
        body = GetTokenRequest.from_json(read_json_object(request), must_delegate=True)
        assert body.delay_id is not None
        # Ahead of the look-up: delayed events of other servers' users are there.
        if not self._homeserver.is_own_name(body.openid_token.matrix_server_name):
            raise SynapseError(403, "This is for users of this homeserver only", Codes.FORBIDDEN)
        user_id = await self._verify(request, body.openid_token, body.claimed_user_id)
        await self._check(user_id, body.room_id)
        device_id = body.claimed_device_id
        # The client may have joined with a token of either endpoint.
        identities = [
            device_member_identity(user_id, device_id, body.member_id),
            device_identity(user_id, device_id),
        ]
        if not await self._delegate(user_id, body.room_id, body.slot_id, identities, body.delay_id):
            raise no_such_delayed_event()
        return 200, {}


class HealthResource(Endpoint):
    """Whether the module serves. Says nothing of the SFU, without which restricted users do fine.

    GET /_synapse/client/livekit/jwt/healthz HTTP/1.1
    """

    METHODS = (b"GET", b"HEAD")

    def _async_render_GET(self, request: SynapseRequest) -> tuple[int, JsonDict]:
        return 200, {}
