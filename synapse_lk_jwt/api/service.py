# SPDX-License-Identifier: Apache-2.0
"""The service endpoints, which clients call at `livekit_service_url` with an OpenID token."""

import logging
import re

import attr
from synapse.api.errors import Codes, SynapseError, UnrecognizedRequestError
from synapse.http.site import SynapseRequest
from synapse.types import JsonDict

from synapse_lk_jwt import metrics
from synapse_lk_jwt.api import fields
from synapse_lk_jwt.api.check import CheckResource
from synapse_lk_jwt.api.endpoint import Directory, Endpoint
from synapse_lk_jwt.api.errors import no_such_delayed_event, raises_matrix_errors
from synapse_lk_jwt.api.fields import bad_json, nested, optional, read_body, required
from synapse_lk_jwt.api.services import Services
from synapse_lk_jwt.api.webhook import SfuWebhookResource
from synapse_lk_jwt.auth import openid
from synapse_lk_jwt.auth.openid import InvalidToken
from synapse_lk_jwt.call_member import CallMember
from synapse_lk_jwt.livekit.naming import (
    DEFAULT_SLOT,
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
            # Clients rely on the endpoint unless the answer is 404.
            self.putChild(b"delegate_delayed_leave", DelegateDelayedLeaveResource(services))
        self.putChild(
            b"sfu_webhook",
            SfuWebhookResource(homeserver, issuer.signer, issuer.sealer, webhooks, processes),
        )
        self.putChild(b"check", check)
        self.putChild(b"healthz", HealthResource(homeserver))


@attr.s(auto_attribs=True, frozen=True, slots=True)
class OpenIdToken:
    """What a client received from its homeserver's `openid/request_token`."""

    access_token: str = required(fields.string, is_secret=True)
    matrix_server_name: str = required(fields.server_name)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class _Body:
    """The fields that all bodies have: the user's OpenID token, and a delayed event to delegate."""

    openid_token: OpenIdToken = required(nested(OpenIdToken))
    delay_id: str | None = optional(fields.string)
    delay_timeout: int | None = optional(fields.positive_integer, zero=0)

    def __attrs_post_init__(self) -> None:
        if (self.delay_id is None) != (self.delay_timeout is None):
            missing = "delay_id" if self.delay_id is None else "delay_timeout"
            raise bad_json(missing, "is missing")


class _OpenIdEndpoint(Endpoint):
    """Verifies OpenID tokens, and issues LiveKit access tokens."""

    def __init__(self, services: Services) -> None:
        super().__init__(services.homeserver)
        self._services = services

    async def _verify(
        self, request: SynapseRequest, body: _Body, claimed_user_id: str | None = None
    ) -> str:
        """Returns the user that the OpenID token belongs to.

        Raises:
            SynapseError: 400 `M_BAD_JSON`, if a user of another homeserver delegates a leave. That
                homeserver has the delayed event, so the token is not looked up.
            SynapseError: 401 `M_UNAUTHORIZED`, if the token is not valid. The client does not learn
                why.
            LimitExceededError: 429, if the client's address has caused too many look-ups.
        """
        server, token = body.openid_token.matrix_server_name, body.openid_token.access_token
        is_local = self._homeserver.is_own_name(server)
        if body.delay_id is not None and not is_local:
            raise self._delegation_by_remote_user()
        try:
            if is_local:
                user_id = await openid.user_of_local_token(self._homeserver, token)
            else:
                async with self._services.limits.look_up(request.get_client_ip_if_available()):
                    user_id = await openid.user_of_remote_token(self._homeserver, server, token)
            if claimed_user_id not in (None, user_id):
                text = f"the user is {user_id!r} and not {claimed_user_id!r}"
                raise InvalidToken("other_user", text)
        except InvalidToken as e:
            metrics.openid_failures.labels("local" if is_local else "remote", e.cause).inc()
            logger.info("Rejected an OpenID token of %r: %s", server, e)
            raise SynapseError(401, "The OpenID token is not valid", Codes.UNAUTHORIZED) from None
        return user_id

    def _delegation_by_remote_user(self) -> SynapseError:
        return bad_json("delay_id", "only users of this homeserver can delegate a leave")

    async def _issue(
        self, member: CallMember, delay_id: str | None, endpoint: metrics.Endpoint
    ) -> tuple[int, JsonDict]:
        """Answers a verified user with a token."""
        if self._homeserver.is_mine(member.user_id):
            await self._homeserver.users.check_auth_blocking(member.user_id)
        await self._services.admit(member)
        if delay_id is not None and self._homeserver.delayed_events.are_enabled:
            # The module accepts the delegation before it needs LiveKit, because clients do not
            # repeat a delegation. The client gets its token even if the delayed event is over.
            await self._services.leaves.delegate(member, delay_id)
        token = await self._services.issuer.issue(member, endpoint)
        return 200, {"url": self._services.livekit_url, "jwt": token}


def _device_id(name: str, value: object) -> str:
    device_id = fields.string(name, value)
    if re.match(r"[0-9]+:", device_id):
        # '@a:host' with device '8448:X' would be the same participant as '@a:host:8448' with X.
        raise bad_json(name, "must not begin with digits and a colon")
    return device_id


@attr.s(auto_attribs=True, frozen=True, slots=True)
class SfuGetBody(_Body):
    """The body of `/sfu/get`. Some clients do not send `device_id`."""

    room: str = required(fields.room_id)
    device_id: str | None = optional(_device_id)


class SfuGetResource(_OpenIdEndpoint):
    """Issues a token for the default slot of a room, to clients that are older than `/get_token`.

    POST /_synapse/client/livekit/jwt/sfu/get HTTP/1.1

    {
        "room": "!room:example.org",
        "openid_token": {"access_token": "…", "matrix_server_name": "example.org"},
        "device_id": "ABCDEFG"
    }
    """

    @raises_matrix_errors("sfu_get")
    async def _async_render_POST(self, request: SynapseRequest) -> tuple[int, JsonDict]:
        body = read_body(request, SfuGetBody)
        user_id = await self._verify(request, body)
        identity = device_identity(user_id, body.device_id or "")
        if len(identity.encode("utf-8")) > MAX_IDENTITY_BYTES:
            raise bad_json("device_id", "is too long")
        member = CallMember(user_id, body.room, DEFAULT_SLOT, (identity,))
        return await self._issue(member, body.delay_id, "sfu_get")


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Member:
    """A MatrixRTC member, as the client describes itself."""

    id: str = required(fields.string)
    claimed_user_id: str = required(fields.user_id)
    claimed_device_id: str = required(fields.string)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class GetTokenBody(_Body):
    """The body of `/get_token`."""

    room_id: str = required(fields.room_id)
    slot_id: str = required(fields.string)
    member: Member = required(nested(Member))


class GetTokenResource(_OpenIdEndpoint):
    """Issues a token for one slot of a room (MSC4195 before it moved to homeserver endpoints).

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

    @raises_matrix_errors("get_token")
    async def _async_render_POST(self, request: SynapseRequest) -> tuple[int, JsonDict]:
        body = read_body(request, GetTokenBody)
        user_id = await self._verify(request, body, body.member.claimed_user_id)
        identity = device_member_identity(user_id, body.member.claimed_device_id, body.member.id)
        member = CallMember(user_id, body.room_id, body.slot_id, (identity,))
        return await self._issue(member, body.delay_id, "get_token")


@attr.s(auto_attribs=True, frozen=True, slots=True)
class DelegateDelayedLeaveBody(GetTokenBody):
    """The body of `/delegate_delayed_leave`, which must name a delayed event."""

    delay_id: str = required(fields.string)
    delay_timeout: int = required(fields.positive_integer)


class DelegateDelayedLeaveResource(_OpenIdEndpoint):
    """Accepts a client's delayed leave. The module sends it when the participant has left.

    POST /_synapse/client/livekit/jwt/delegate_delayed_leave HTTP/1.1

    {
        "room_id": "!room:example.org",
        "slot_id": "m.call#ROOM",
        "openid_token": {"access_token": "…", "matrix_server_name": "example.org"},
        "member": {
            "id": "member",
            "claimed_user_id": "@user:example.org",
            "claimed_device_id": "ABCDEFG"
        },
        "delay_id": "syd_…",
        "delay_timeout": 3600000
    }
    """

    @raises_matrix_errors("delegate_delayed_leave")
    async def _async_render_POST(self, request: SynapseRequest) -> tuple[int, JsonDict]:
        if _is_empty(request):
            # With an empty body a client probes whether it can delegate, without naming its user.
            # After any other answer, clients of other homeservers, which cannot delegate, would
            # schedule their leaves an hour ahead. Clients of this homeserver probe MSC4195's
            # endpoint.
            raise UnrecognizedRequestError(code=404)
        body = read_body(request, DelegateDelayedLeaveBody)
        user_id = await self._verify(request, body, body.member.claimed_user_id)
        device_id = body.member.claimed_device_id
        # The client may have joined with a token of either endpoint.
        identities = (
            device_member_identity(user_id, device_id, body.member.id),
            device_identity(user_id, device_id),
        )
        member = CallMember(user_id, body.room_id, body.slot_id, identities)
        await self._services.admit(member)
        if not await self._services.leaves.delegate(member, body.delay_id):
            raise no_such_delayed_event()
        return 200, {}

    def _delegation_by_remote_user(self) -> SynapseError:
        text = "Only users of this homeserver can delegate a leave"
        return SynapseError(403, text, Codes.FORBIDDEN)


def _is_empty(request: SynapseRequest) -> bool:
    """Whether a request has no body."""
    assert request.content is not None
    is_empty = not request.content.read(1)
    request.content.seek(0)
    return is_empty


class HealthResource(Endpoint):
    """Answers 200 while the module serves requests.

    LiveKit's state does not matter here, because restricted users get tokens without LiveKit.

    GET /_synapse/client/livekit/jwt/healthz HTTP/1.1
    """

    METHODS = (b"GET", b"HEAD")

    def _async_render_GET(self, request: SynapseRequest) -> tuple[int, JsonDict]:
        return 200, {}
