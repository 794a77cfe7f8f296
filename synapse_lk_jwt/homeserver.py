# SPDX-License-Identifier: Apache-2.0
"""The homeserver as this package sees it: the only file that touches Synapse's internals.

Everything else goes through Synapse's public module API. What is used here is pinned by a test
against the oldest and the newest Synapse that is supported.
"""

import logging
from collections.abc import Mapping
from inspect import signature
from typing import Any
from urllib.parse import urlencode

from synapse.api.errors import FederationDeniedError
from synapse.http.client import SimpleHttpClient
from synapse.http.server import DirectServeJsonResource, UnrecognizedRequestResource
from synapse.logging.context import make_deferred_yieldable
from synapse.module_api import ModuleApi
from synapse.types import ISynapseReactor, get_domain_from_id
from synapse.util.caches.response_cache import ResponseCache
from twisted.web.iweb import IResponse

logger = logging.getLogger(__name__)

__all__ = ["DirectServeJsonResource", "Homeserver", "UnrecognizedRequestResource"]


class Homeserver:
    """One homeserver, main process or worker.

    Attributes:
        server_name: the name in its users' IDs.
        clock: Synapse's clock; the package has no other.
        reactor: Synapse's reactor, real or of a test harness.
        http_client: Synapse's client for requests that are no federation.
    """

    def __init__(self, api: ModuleApi) -> None:
        # Untyped: Synapse's caches confuse mypy without a plugin that Synapse does not publish.
        self._hs: Any = api._hs
        self._store: Any = self._hs.get_datastores().main
        self.server_name: str = api.server_name
        self.clock: Any = self._hs.get_clock()
        self.reactor: ISynapseReactor = self._hs.get_reactor()
        self.http_client: SimpleHttpClient = api.http_client

    def is_mine(self, user_id: str) -> bool:
        """Whether a user is one of this homeserver."""
        return get_domain_from_id(user_id) == self.server_name

    async def user_of_openid_token(self, token: str) -> str | None:
        """The local user whose unexpired OpenID token this is; one database read.

        The store of a worker has no method for this, so the table is read on every process.
        """
        row = await self._store.db_pool.simple_select_one(
            table="open_id_tokens",
            keyvalues={"token": token},
            retcols=("user_id", "ts_valid_until_ms"),
            allow_none=True,
            desc="synapse_lk_jwt_openid_token",
        )
        if row is None or row[1] < self.clock.time_msec():
            return None
        return str(row[0])

    async def is_active(self, user_id: str) -> bool:
        """Whether a local user may use the homeserver: not deactivated, locked, suspended, erased.

        Cached, and right from the very next request after a change on.
        """
        user = await self._store.get_user_by_id(user_id)
        if user is None:
            # Application services may act as their sender without ever registering it.
            return self._store.get_app_service_by_user_id(user_id) is not None
        return not (
            user.is_deactivated
            or user.locked
            or user.suspended
            or await self._store.is_user_erased(user_id)
        )

    async def is_joined(self, user_id: str, room_id: str) -> bool:
        """Whether a user, of any server, is joined to a room that this homeserver is in. Cached."""
        return room_id in await self._store.get_rooms_for_user(user_id)

    async def is_in_room(self, server_name: str, room_id: str) -> bool:
        """Whether a user of that server is joined to a room that this homeserver is in. Cached."""
        return bool(await self._store.is_host_joined(room_id, server_name))

    async def has_partial_state(self, room_id: str) -> bool:
        """Whether this homeserver does not know yet who is in a room that it has just joined."""
        return bool(await self._store.is_partial_state_room(room_id))

    async def acl_allows(self, server_name: str, room_id: str) -> bool:
        """Whether the room's `m.room.server_acl` lets the server take part. Cached."""
        state = self._hs.get_storage_controllers().state
        acl = await state.get_server_acl_for_room(room_id)
        return acl is None or acl.server_matches_acl_event(server_name)

    async def federation_get(
        self, server_name: str, path: str, query: Mapping[str, str]
    ) -> IResponse:
        """Asks another homeserver, unsigned, and returns its answer with the body unread.

        Takes the agent of Synapse's federation client, so that server discovery, TLS policy and IP
        block lists hold, but not the client: it would write the query into the log, and count an
        error against the server, after which Synapse does not talk to it at all for ten minutes.
        No redirect is followed; the time is for the caller to limit.

        Raises:
            FederationDeniedError: if `federation_domain_whitelist` does not hold the server.
        """
        whitelist = self._hs.config.federation
        if not whitelist.is_domain_allowed_according_to_federation_whitelist(server_name):
            raise FederationDeniedError(server_name)
        agent = self._hs.get_federation_http_client().agent
        uri = f"matrix-federation://{server_name}{path}?{urlencode(query)}"
        return await make_deferred_yieldable(agent.request(b"GET", uri.encode("ascii")))

    def response_cache(self, name: str, remember_ms: int) -> ResponseCache[str]:
        """A cache of Synapse's for requests in flight, and for what they gave for a while."""
        if "timeout" in signature(ResponseCache).parameters:
            from synapse.util.duration import Duration

            timeout: dict[str, Any] = {"timeout": Duration(milliseconds=remember_ms)}
        else:
            timeout = {"timeout_ms": remember_ms}
        return ResponseCache(
            clock=self.clock,
            name=name,
            server_name=self.server_name,
            enable_logging=False,
            **timeout,
        )

    def advertise(self, livekit_url: str | None, service_url: str) -> None:
        """Adds the service to `rtc/transports` (MSC4143) and `.well-known/matrix/client`.

        What the admin has set stays; nothing is added to a list that names a LiveKit already. Must
        be called before the listeners start: that is when Synapse reads these settings.

        Args:
            livekit_url: the SFU's URL, for clients that ask the homeserver endpoints of MSC4195 for
                their tokens; None where they are not served.
            service_url: where the service endpoints are.
        """
        transport = _livekit(service_url)
        if livekit_url is not None:
            transport["url"] = livekit_url
        config = self._hs.config
        matrix_rtc = getattr(config, "matrix_rtc", None)
        if matrix_rtc is None:
            logger.info(
                "This Synapse has no rtc/transports: clients find the service in .well-known"
            )
        else:
            matrix_rtc.transports = _with_livekit(matrix_rtc.transports, transport)
            config.experimental.msc4143_enabled = True

        key = "org.matrix.msc4143.rtc_foci"
        well_known = dict(config.server.extra_well_known_client_content)
        foci = well_known.get(key, [])
        if isinstance(foci, list):
            well_known[key] = _with_livekit(foci, _livekit(service_url))
            config.server.extra_well_known_client_content = well_known


def _livekit(service_url: str) -> dict[str, str]:
    return {"type": "livekit", "livekit_service_url": service_url}


def _with_livekit(entries: list[Any], ours: dict[str, str]) -> list[Any]:
    """The entries and, unless one of them is a LiveKit, ours behind them."""
    if any(isinstance(entry, Mapping) and entry.get("type") == "livekit" for entry in entries):
        return entries
    return [*entries, ours]
