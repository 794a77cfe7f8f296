# SPDX-License-Identifier: Apache-2.0
"""The homeserver as this package sees it: the only file that touches Synapse's internals.

Everything else goes through Synapse's public module API. What is used here is pinned by a test
against the oldest and the newest Synapse that is supported.
"""

import logging
import re
import sys
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from copy import copy
from importlib.metadata import version
from inspect import signature
from io import BytesIO
from shlex import quote
from typing import Any, Protocol
from urllib.parse import urlencode, urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

import attr
from canonicaljson import encode_canonical_json
from synapse.api.constants import EventTypes
from synapse.api.errors import FederationDeniedError, SynapseError
from synapse.api.ratelimiting import Ratelimiter
from synapse.appservice import ApplicationService
from synapse.config.ratelimiting import RatelimitSettings
from synapse.crypto.context_factory import FederationPolicyForHTTPS
from synapse.http import QuieterFileBodyProducer
from synapse.http.client import SimpleHttpClient
from synapse.http.matrixfederationclient import MatrixFederationHttpClient
from synapse.http.proxyagent import parse_proxy
from synapse.http.server import HttpServer
from synapse.http.servlet import RestServlet
from synapse.http.site import SynapseRequest
from synapse.logging.context import make_deferred_yieldable, run_in_background
from synapse.module_api import ModuleApi
from synapse.storage._base import db_to_json
from synapse.storage.database import (
    LoggingDatabaseConnection,
    LoggingTransaction,
    make_in_list_sql_clause,
)
from synapse.types import (
    ISynapseReactor,
    JsonDict,
    create_requester,
    get_domain_from_id,
    get_localpart_from_id,
)
from synapse.util.async_helpers import Linearizer
from synapse.util.caches.response_cache import ResponseCache
from synapse.util.iterutils import batch_iter
from synapse.util.stringutils import parse_server_name
from twisted.internet.defer import Deferred
from twisted.internet.error import DNSLookupError
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IResponse
from twisted.web.resource import Resource
from zope.interface import implementer

from synapse_lk_jwt.auth.access import Standing
from synapse_lk_jwt.compat.self_test import Feature
from synapse_lk_jwt.delegation.state_machine import ENCRYPTED_TYPE, MEMBERSHIP_TYPES, sticky_key

logger = logging.getLogger(__name__)

# The name of our group of servlets in Synapse's registries, and of the attribute of a homeserver
# that holds them.
_GROUP = "synapse_lk_jwt"
_SERVLETS = "_synapse_lk_jwt_servlets"

# The same for what clients discover us by.
_DISCOVERY = "_synapse_lk_jwt_discovery"

_NO_REGISTRY = "this Synapse has no registry of servlets"

# The feature in `/versions` that announces `rtc/transports`, and the Synapse that names it itself.
MSC4143 = "org.matrix.msc4143"
VERSIONS_NAME_MSC4143 = (1, 156)

# How long a connection to another homeserver may last. A little longer than its requests may take.
CONNECTION_LIFETIME_SEC = 12

# How much may be received over it: TLS and HTTP headers, and a body, which has a narrower limit.
MAX_CONNECTION_BYTES = 256 * 1024

# How many of a sender's newest events are compared with one that may have been sent already. A user
# within Synapse's default rate limit sends 70 between two attempts.
MAX_COMPARED_EVENTS = 100

# The names of the field that makes an event sticky: MSC4354's own, and the one that Synapses read
# until they adopt it.
STICKY_FIELDS = ("sticky", "msc4354_sticky")


@attr.s(auto_attribs=True, frozen=True, slots=True)
class DelayedEvent:
    """A delayed event (MSC4140) of a local user.

    Attributes:
        room_id: where it will be sent.
        type: its type.
        state_key: its state key, None for a message event.
        delay_ms: milliseconds between being started, or restarted, and being sent.
        event: what to send, as `Homeserver.send` takes it.
    """

    room_id: str
    type: str
    state_key: str | None
    delay_ms: int
    event: JsonDict


@attr.s(auto_attribs=True, frozen=True, slots=True)
class ForwardProxy:
    """A proxy that Synapse's HTTP client sends requests through.

    Attributes:
        host: its host.
        port: its port.
        is_tls: whether Synapse speaks TLS with the proxy itself.
        authorization: the header `Proxy-Authorization`, None for a proxy without password.
    """

    host: str
    port: int
    is_tls: bool
    authorization: str | None = attr.ib(repr=False)

    @property
    def url(self) -> str:
        """Its address, without user and password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.is_tls else 'http'}://{host}:{self.port}"


class Homeserver:
    """One homeserver, main process or worker.

    Attributes:
        server_name: the name in its users' IDs.
        instance_name: the name of this process of it.
        clock: Synapse's clock; the package has no other.
        reactor: Synapse's reactor, real or of a test harness.
        http_client: Synapse's client for requests that are no federation.
        get_user_by_req: Synapse's authentication of a client's request.
        sleep: waits for some seconds.
        run_db_interaction: runs a function in a transaction, which is tried again where PostgreSQL
            says that another one was in its way.
        database_error: the base class of what the database's driver raises.
        runs_background_tasks: whether this is the one process that does what must not be done by
            several.
        has_delayed_events: whether users may schedule delayed events (`max_event_delay_duration`),
            and the module may delegate them.
        has_state_changes: whether the stream of state changes can be followed.
        config: Synapse's configuration, for `check/setup.py`.
        check_command: a sentence that tells what to run to find out what is wrong.
    """

    def __init__(self, api: ModuleApi, off: Collection[Feature] = ()) -> None:
        """
        Args:
            api: Synapse's module API.
            off: the features that lack something of this Synapse.
        """
        self._api = api
        self._off = off
        # Untyped: Synapse's caches confuse mypy without a plugin that Synapse does not publish.
        self._hs: Any = api._hs
        self._store: Any = self._hs.get_datastores().main
        self.server_name: str = api.server_name
        self.instance_name: str = self._hs.get_instance_name()
        self.clock: Any = self._hs.get_clock()
        self.reactor: ISynapseReactor = self._hs.get_reactor()
        self.http_client: SimpleHttpClient = api.http_client
        self.get_user_by_req = api.get_user_by_req
        self.sleep = api.sleep
        self.run_db_interaction = api.run_db_interaction
        self.database_error: type[Exception] = self._store.database_engine.module.Error
        self.runs_background_tasks: bool = api.should_run_background_tasks()
        self.config: Any = self._hs.config
        self.has_delayed_events = Feature.DELEGATION not in off and has_delayed_events(self.config)
        self.has_state_changes = Feature.STATE_CHANGES not in off
        files = "".join(f" -c {quote(name)}" for name in self.config.config_files)
        self.check_command = f"Run '{sys.executable} -m synapse_lk_jwt check{files}'"
        self._federation_client: MatrixFederationHttpClient | None = None
        # Whether `delayed_events` keeps finalised events; None until that has been looked up.
        self._keeps_finalised: bool | None = None

    def is_own_name(self, server_name: str) -> bool:
        """Whether a server name is this homeserver's, in capitals or not: to DNS it is the same."""
        return server_name.lower() == self.server_name.lower()

    def is_mine(self, user_id: str) -> bool:
        """Whether a user is one of this homeserver."""
        return get_domain_from_id(user_id) == self.server_name

    async def user_of_openid_token(self, token: str) -> str | None:
        """The local user whose unexpired OpenID token this is; one database read.

        The store of a worker has no method for this, so the table is read on every process.
        """

        def select(connection: LoggingDatabaseConnection) -> tuple[Any, ...] | None:
            with closing(connection.cursor(txn_name="synapse_lk_jwt_openid_token")) as txn:
                txn.execute(
                    "SELECT user_id, ts_valid_until_ms FROM open_id_tokens WHERE token = ?",
                    (token,),
                )
                return txn.fetchone()

        # One query needs no transaction, which would cost a tenth of the whole request.
        row = await self._store.db_pool.runWithConnection(select, db_autocommit=True)
        if row is None or row[1] < self.clock.time_msec():
            return None
        return str(row[0])

    async def is_active(self, user_id: str) -> bool:
        """Whether a local user may use the homeserver.

        Deactivated, locked, suspended, erased and expired (account validity) users may not. Cached,
        unless a module that decides on account validity asks elsewhere. A change takes effect with
        the next request.
        """
        user = await self._store.get_user_by_id(user_id)
        if user is None:
            # Application services may act as their sender without ever registering it.
            return await self._app_service(user_id) is not None
        return not (
            user.is_deactivated
            or user.locked
            or user.suspended
            or (Feature.ERASED_USERS not in self._off and await self._store.is_user_erased(user_id))
            # Synapse does not ask this of users of application services.
            or (
                user.appservice_id is None
                and Feature.EXPIRED_ACCOUNTS not in self._off
                and await self._hs.get_account_validity_handler().is_user_expired(user_id)
            )
        )

    async def inactive_users(self, user_ids: Collection[str]) -> set[str]:
        """Those of many local users who are deactivated, locked or suspended."""
        return await self._select_of_many(
            "SELECT name FROM users WHERE (deactivated = 1 OR locked OR suspended) AND",
            "name",
            user_ids,
        )

    async def blocked_rooms(self, room_ids: Collection[str]) -> set[str]:
        """Those of many rooms that the admin has blocked."""
        return await self._select_of_many(
            "SELECT room_id FROM blocked_rooms WHERE", "room_id", room_ids
        )

    async def _select_of_many(self, sql: str, column: str, values: Collection[str]) -> set[str]:
        """The values that a table holds, of many.

        In the database, and not from Synapse's caches: thousands of look-ups there would hold up
        everything else.
        """

        def select(txn: LoggingTransaction) -> set[str]:
            found: set[str] = set()
            for batch in batch_iter(values, 1000):
                clause, args = make_in_list_sql_clause(txn.database_engine, column, batch)
                txn.execute(f"{sql} {clause}", args)
                found.update(value for (value,) in txn)
            return found

        if not values:
            return set()
        return await self.run_db_interaction(f"synapse_lk_jwt_{column}", select)

    async def standing(self, user_id: str) -> Standing:
        """The standing of a user; NORMAL for users of other servers. Cached."""
        user = await self._store.get_user_by_id(user_id) if self.is_mine(user_id) else None
        if user is not None and user.is_shadow_banned:
            return Standing.SHADOW_BANNED
        if user is not None and user.is_guest:
            return Standing.GUEST
        return Standing.NORMAL

    async def check_auth_blocking(self, user_id: str) -> None:
        """Refuses local users whom Synapse does not serve at the moment.

        These are all users while `hs_disabled` is set, and users beyond the limit of monthly active
        users. Without these options there is no database read.

        Raises:
            synapse.api.errors.ResourceLimitError: 403, as Synapse itself answers.
        """
        if Feature.SERVER_LIMITS in self._off:
            return
        server = self.config.server
        if server.hs_disabled or server.limit_usage_by_mau:
            requester = create_requester(user_id, app_service=await self._app_service(user_id))
            await self._hs.get_auth_blocking().check_auth_blocking(requester=requester)

    async def is_exempt_from_limits(self, user_id: str) -> bool:
        """Whether a user belongs to an application service with `rate_limited: false`. Cached."""
        if not self._app_services() or not self.is_mine(user_id):
            return False
        service = await self._app_service(user_id)
        return service is not None and not service.is_rate_limited()

    def _app_services(self) -> Sequence[ApplicationService]:
        if Feature.APPLICATION_SERVICES in self._off:
            return ()
        services: Sequence[ApplicationService] = self._store.get_app_services()
        return services

    async def _app_service(self, user_id: str) -> ApplicationService | None:
        """The application service that a local user belongs to, if any. Cached."""
        if Feature.APPLICATION_SERVICES in self._off:
            return None
        service: ApplicationService | None = self._store.get_app_service_by_user_id(user_id)
        if service is None:
            user = await self._store.get_user_by_id(user_id)
            if user is not None and user.appservice_id is not None:
                service = self._store.get_app_service_by_id(user.appservice_id)
        return service

    async def is_room_blocked(self, room_id: str) -> bool:
        """Whether the admin has blocked a room, or shut it down and blocked it. Cached."""
        return Feature.BLOCKED_ROOMS not in self._off and bool(
            await self._store.is_room_blocked(room_id)
        )

    async def device_ids(self, user_id: str) -> Collection[str]:
        """The devices of a local user; none of other servers' users. A database read."""
        if Feature.DEVICES in self._off or not self.is_mine(user_id):
            return ()
        devices: Mapping[str, Any] = await self._store.get_devices_by_user(user_id)
        return devices.keys()

    async def is_joined(self, user_id: str, room_id: str) -> bool:
        """Whether a user, of any server, is joined to a room that this homeserver is in. Cached."""
        return room_id in await self._store.get_rooms_for_user(user_id)

    async def membership(self, user_id: str, room_id: str) -> str | None:
        """A user's membership of a room that this homeserver is in; one database read."""
        membership = await self._store.db_pool.simple_select_one_onecol(
            table="current_state_events",
            keyvalues={"room_id": room_id, "type": EventTypes.Member, "state_key": user_id},
            retcol="membership",
            allow_none=True,
            desc="synapse_lk_jwt_membership",
        )
        return None if membership is None else str(membership)

    async def is_host_joined(self, server_name: str, room_id: str) -> bool:
        """Whether a user of that server is joined to a room that this homeserver is in. Cached."""
        return bool(await self._store.is_host_joined(room_id, server_name))

    async def host_in_room(self, server_name: str, room_id: str) -> str | None:
        """A server that takes part in a room, as the room spells its name; None if it does not.

        Synapse's `is_host_joined` raises on SQLite if the room has the name with other capitals.
        """
        hosts = await self._store.get_current_hosts_in_room(room_id)
        if server_name in hosts:
            return server_name
        return next((host for host in hosts if host.lower() == server_name.lower()), None)

    async def has_partial_state(self, room_id: str) -> bool:
        """Whether this homeserver does not know yet who is in a room that it has just joined."""
        return Feature.PARTIAL_STATE not in self._off and bool(
            await self._store.is_partial_state_room(room_id)
        )

    async def acl_allows(self, server_name: str, room_id: str) -> bool:
        """Whether the room's `m.room.server_acl` lets the server take part. Cached."""
        if Feature.SERVER_ACLS in self._off:
            return True
        state = self._hs.get_storage_controllers().state
        acl = await state.get_server_acl_for_room(room_id)
        # ACLs know no ports.
        host, _ = parse_server_name(server_name)
        return acl is None or acl.server_matches_acl_event(host)

    async def federation_request(
        self,
        method: str,
        server_name: str,
        path: str,
        query: Mapping[str, str] | None = None,
        content: JsonDict | None = None,
    ) -> IResponse:
        """Asks another homeserver and returns its answer with the body unread.

        Uses the agent of a federation client of Synapse's, so that server discovery, TLS policy and
        IP block lists hold. The client's own method would write the query into the log, count an
        error against the server, after which Synapse does not talk to it at all for ten minutes,
        and read a body of any size. No redirect is followed; the time is for the caller to limit.

        Args:
            method: the HTTP verb.
            server_name: the other homeserver.
            path: the path, in ASCII.
            query: query parameters, if any.
            content: a JSON body; a request that has one is signed.

        Raises:
            FederationDeniedError: if `federation_domain_whitelist` does not hold the server, or
                this Synapse lacks what the request needs.
            synapse_lk_jwt.compat.http.NETWORK_ERRORS: if the server cannot be asked.
        """
        if Feature.OTHER_SERVERS in self._off:
            raise FederationDeniedError(server_name)
        whitelist = self._hs.config.federation
        if not whitelist.is_domain_allowed_according_to_federation_whitelist(server_name):
            raise FederationDeniedError(server_name)
        if self._federation_client is None:
            self._federation_client = _federation_client(self._hs)
        client = self._federation_client
        if query:
            path = f"{path}?{urlencode(query)}"
        headers = Headers()
        producer = None
        if content is not None:
            headers.addRawHeader("Content-Type", "application/json")
            for signature in client.build_auth_headers(
                server_name.encode("ascii"), method.encode("ascii"), path.encode("ascii"), content
            ):
                headers.addRawHeader("Authorization", signature)
            producer = QuieterFileBodyProducer(
                BytesIO(encode_canonical_json(content)), cooperator=client._cooperator
            )
        uri = f"matrix-federation://{server_name}{path}"
        # The agent follows the rules for log contexts, and so leaves none behind.
        response: Deferred[IResponse] = run_in_background(
            client.agent.request, method.encode("ascii"), uri.encode("ascii"), headers, producer
        )
        try:
            return await make_deferred_yieldable(response)
        except ValueError as e:
            # Twisted cannot look up such a name. It may be one that the server delegates to.
            raise DNSLookupError(f"not a host name: {e}") from None
        except SynapseError as e:
            raise DNSLookupError(f"not allowed: {e.msg}") from None

    async def request(
        self, method: str, uri: str, body: bytes | None, headers: Headers
    ) -> IResponse:
        """Sends a request that is no federation, and returns the response with the body unread.

        Cancelling closes the connection. Synapse's client alone does not do that: its own limit of
        60 s keeps a cancellation from the request, which waits on for a server that hangs.
        """
        client = copy(self.http_client)
        client.agent = agent = _CancellableAgent(client.agent)
        try:
            return await client.request(method, uri, body, headers)
        except Exception:
            # What a cancelled request raises depends on how Synapse's client logs it.
            agent.cancel()
            raise

    def repeat(
        self,
        interval_ms: int,
        desc: str,
        func: Callable[[], Awaitable[None]],
        *,
        at_once: bool = False,
        everywhere: bool = False,
    ) -> None:
        """Calls a function again and again, on the process that runs background tasks.

        Args:
            interval_ms: milliseconds between two calls, and ahead of the first. A call that takes
                longer delays the next.
            desc: a name for Synapse's metrics and log.
            func: what to call.
            at_once: whether to call it for the first time as soon as Synapse is up.
            everywhere: whether to do so on all processes.
        """
        if not self.runs_background_tasks and not everywhere:
            return

        async def tidily() -> None:
            await self._tidily(desc, func)

        self._api.looping_background_call(
            tidily, interval_ms, desc=desc, run_on_all_instances=everywhere
        )
        if at_once:
            self._api.delayed_background_call(min(interval_ms, 1000), tidily, desc=desc)

    def run_in_background(
        self, desc: str, func: Callable[..., Awaitable[None]], *args: object
    ) -> None:
        """Runs an async function on its own, without anybody waiting for it."""
        self._api.run_as_background_process(desc, self._tidily, desc, func, *args)

    async def _tidily(self, desc: str, func: Callable[..., Awaitable[None]], *args: object) -> None:
        """Lets a database that is away for a while be a line in the log, and no traceback."""
        try:
            await func(*args)
        except self.database_error as e:
            logger.error("%s failed: %s: %s", desc, type(e).__name__, e)

    def on_new_data(self, callback: Callable[[], None]) -> None:
        """Has a function called whenever there may be new events. It must be quick."""
        self._hs.get_notifier().add_replication_callback(callback)

    def stream_position(self) -> int:
        """The position in the event stream that this process has caught up with."""
        return int(self._store.get_room_max_stream_ordering())

    def has_state_changed(self, since: int) -> bool:
        """Whether the state of any room may have changed since a stream position; no database."""
        return bool(self._store._curr_state_delta_stream_cache.has_any_entity_changed(since))

    async def state_changes(
        self, since: int, until: int
    ) -> tuple[int, Sequence[tuple[str, str, str]]]:
        """What has changed in the state of rooms, in order, up to a hundred changes or so.

        Returns:
            The stream position that they reach up to, and of each change the room, the type and
            the state key.
        """
        reached, deltas = await self._store.get_partial_current_state_deltas(since, until)
        return int(reached), [(d.room_id, d.event_type, d.state_key) for d in deltas]

    def delayed_event(
        self, txn: LoggingTransaction, delay_id: str, user_id: str
    ) -> DelayedEvent | None:
        """A delayed event of a local user, unless it has been sent, or is about to be.

        This and the next three work on Synapse's own table, because what is done to a delayed event
        and what is noted of it must happen together or not at all.
        """
        txn.execute(
            f"SELECT * FROM delayed_events WHERE {self._is_pending(txn)}",
            (delay_id, get_localpart_from_id(user_id)),
        )
        values = txn.fetchone()
        if values is None:
            return None
        assert txn.description is not None
        # Newer Synapses have more columns.
        row = dict(zip((column[0] for column in txn.description), values, strict=True))
        try:
            content = db_to_json(row["content"])
        except (ValueError, RecursionError):
            # Synapse cannot send it either.
            return None
        event: JsonDict = {
            "type": row["event_type"],
            "room_id": row["room_id"],
            "sender": user_id,
            "content": content,
        }
        if row["state_key"] is not None:
            event["state_key"] = row["state_key"]
        if row["origin_server_ts"] is not None:
            event["origin_server_ts"] = row["origin_server_ts"]
        if row.get("sticky_duration_ms") is not None:
            # Synapse takes one of these and ignores the other.
            sticky = {"duration_ms": row["sticky_duration_ms"]}
            event.update(dict.fromkeys(STICKY_FIELDS, sticky))
        return DelayedEvent(
            row["room_id"], row["event_type"], row["state_key"], row["delay"], event
        )

    def restart_delayed_event(self, txn: LoggingTransaction, delay_id: str, user_id: str) -> bool:
        """Has a delayed event wait for its whole delay again; returns whether it is still there.

        Synapse's timer on the main process goes off at the old time, finds nothing due, and is set
        anew.
        """
        txn.execute(
            f"UPDATE delayed_events SET send_ts = delay + ? WHERE {self._is_pending(txn)}",
            (self.clock.time_msec(), delay_id, get_localpart_from_id(user_id)),
        )
        return txn.rowcount > 0

    def cancel_delayed_event(self, txn: LoggingTransaction, delay_id: str, user_id: str) -> None:
        """Cancels a delayed event as Synapse does, which may keep it as finalised."""
        if not self._has_finalised(txn):
            self.remove_delayed_event(txn, delay_id, user_id)
            return
        txn.execute(
            f"UPDATE delayed_events SET finalised_ts = ? WHERE {self._is_pending(txn)}",
            (self.clock.time_msec(), delay_id, get_localpart_from_id(user_id)),
        )

    def remove_delayed_event(self, txn: LoggingTransaction, delay_id: str, user_id: str) -> bool:
        """Takes a delayed event away from Synapse, to send it; returns whether it was still there.

        Nothing of it is kept as finalised: without an event ID it would count as cancelled, and
        Synapse would answer a client that sends it as well with a conflict.
        """
        txn.execute(
            f"DELETE FROM delayed_events WHERE {self._is_pending(txn)}",
            (delay_id, get_localpart_from_id(user_id)),
        )
        return txn.rowcount > 0

    def _is_pending(self, txn: LoggingTransaction) -> str:
        """A condition on `delayed_events` with two gaps: the delay ID, the user's local part."""
        condition = "delay_id = ? AND user_localpart = ? AND NOT is_processed"
        return f"{condition} AND finalised_ts IS NULL" if self._has_finalised(txn) else condition

    def _has_finalised(self, txn: LoggingTransaction) -> bool:
        """Whether this Synapse keeps delayed events that were sent or cancelled.

        The column comes with https://github.com/element-hq/synapse/pull/19038.
        """
        if self._keeps_finalised is None:
            txn.execute("SELECT * FROM delayed_events LIMIT 0")
            assert txn.description is not None
            self._keeps_finalised = "finalised_ts" in {column[0] for column in txn.description}
        return self._keeps_finalised

    def newest_event(self, txn: LoggingTransaction) -> int:
        """The stream position of the newest event that there is."""
        txn.execute("SELECT COALESCE(MAX(stream_ordering), 0) FROM events")
        (position,) = txn.fetchone() or (0,)
        return int(position)

    def has_sent(self, txn: LoggingTransaction, event: JsonDict, since: int) -> bool:
        """Whether an event, or a newer one that takes its place, was sent to its room.

        State is recognised by its type and state key, a sticky membership by its type and sticky
        key, any other event by its type and content.

        Args:
            txn: the transaction.
            event: as `send` takes it.
            since: the stream position to look from.
        """
        which = (
            "stream_ordering > ? AND events.room_id = ? AND sender = ? AND type = ?"
            " AND rejection_reason IS NULL"
        )
        args = (since, event["room_id"], event["sender"], event["type"])
        if "state_key" in event:
            txn.execute(
                f"SELECT 1 FROM events WHERE {which} AND state_key = ? LIMIT 1",
                (*args, event["state_key"]),
            )
            return txn.fetchone() is not None
        txn.execute(
            f"SELECT json FROM events JOIN event_json USING (event_id) WHERE {which}"
            " AND state_key IS NULL ORDER BY stream_ordering DESC LIMIT ?",
            (*args, MAX_COMPARED_EVENTS),
        )
        content = event["content"]
        key = sticky_key(content) if event["type"] in MEMBERSHIP_TYPES else None
        sent = (db_to_json(row[0])["content"] for row in txn.fetchall())
        return any(other == content if key is None else sticky_key(other) == key for other in sent)

    async def send(self, event: JsonDict) -> None:
        """Sends an event of a local user, from any process.

        A leave is sent without any rate limit, and whatever has become of the user. An encrypted
        event may be anything, and is sent as Synapse sends a delayed event of the user.

        Raises:
            synapse.api.errors.SynapseError: if the room does not take it, or the user may not send
                it, or not now.
        """
        if event["type"] != ENCRYPTED_TYPE:
            await self._api.create_and_send_event_into_room(event)
            return
        user_id = event["sender"]
        requester = create_requester(user_id, is_guest=await self._store.is_guest(user_id))
        handler = self._hs.get_event_creation_handler()
        await handler.create_and_send_nonmember_event(requester, event)

    def linearizer(self, name: str) -> Linearizer:
        """Lets one at a time do something, for each of any number of keys."""
        return Linearizer(name, self.clock)

    def response_cache(self, name: str, remember_ms: int) -> ResponseCache[Any]:
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

    def ratelimiter(self, settings: RatelimitSettings) -> Ratelimiter:
        """A rate limiter of Synapse's."""
        return Ratelimiter(store=self._store, clock=self.clock, cfg=settings)

    def serve_below_matrix(
        self,
        client: Sequence[RestServlet],
        federation: "FederationServletFactory",
        prefix: str,
    ) -> str | None:
        """Has Synapse serve servlets below `/_matrix/client` and one below `/_matrix/federation`.

        Module resources cannot be mounted there, but both trees are built from registries that are
        read when the listeners start, after the modules are loaded. Registries are one for each
        Python process, homeservers are not: the entry finds what its homeserver's module wants.

        Args:
            client: the client-server servlets.
            federation: makes the server-server servlet, from what Synapse makes its own from.
            prefix: what application services must not claim (MSC4512) for this to work, such as
                `rtc/livekit`.

        Returns:
            None if it will be served, else why not.

        Raises:
            ImportError: if this Synapse has no registries. The caller checks that first.
        """
        experimental = getattr(self._hs.config, "experimental", None)
        if getattr(experimental, "msc4512_enabled", False):
            for service in self._app_services():
                claimed = getattr(service, "proxy_prefix", None)
                if claimed and path_prefixes_overlap(prefix, claimed):
                    return f"the application service {service.id!r} claims {claimed}"
        from synapse.federation.transport.server import SERVLET_GROUPS as FEDERATION_GROUPS
        from synapse.rest import SERVLET_GROUPS as CLIENT_GROUPS

        setattr(self._hs, _SERVLETS, (client, federation))
        _put_first(CLIENT_GROUPS, _register_client_servlets)
        _put_first(FEDERATION_GROUPS, _FederationServlet)
        return None

    def register_web_resource(self, path: str, resource: Resource) -> bool:
        """Has Synapse serve a resource; returns False if another module has taken its path."""
        self._api.register_web_resource(path, resource)
        if Feature.PATHS in self._off:
            return True
        return self._hs._module_web_resources.get(path) is resource

    @property
    def transports(self) -> list[JsonDict]:
        """What `rtc/transports` says; nothing if Synapse does not serve it."""
        config = self._hs.config
        if Feature.TRANSPORTS in self._off or not config.experimental.msc4143_enabled:
            return []
        transports: list[JsonDict] = config.matrix_rtc.transports
        return transports

    def advertise(
        self,
        transports: Sequence[Mapping[str, str]],
        foci: Sequence[Mapping[str, str]],
        servlet: RestServlet,
    ) -> str | None:
        """Adds entries to `rtc/transports` (MSC4143) and `.well-known/matrix/client`.

        What the admin has set stays; nothing is added to a list that names a LiveKit already. Must
        be called before the listeners start: that is when Synapse reads these settings.

        Args:
            transports: the entries for `rtc/transports`.
            foci: the entries for `.well-known/matrix/client`.
            servlet: serves `rtc/transports` at the stable path, unless Synapse does.

        Returns:
            None if the stable path will be served, else why not.
        """
        config = self._hs.config
        if Feature.TRANSPORTS not in self._off:
            config.matrix_rtc.transports = _with_livekit(
                "rtc/transports", config.matrix_rtc.transports, transports
            )
            config.experimental.msc4143_enabled = True

        if Feature.WELL_KNOWN not in self._off:
            key = "org.matrix.msc4143.rtc_foci"
            well_known = dict(config.server.extra_well_known_client_content)
            own_foci = well_known.get(key, [])
            if foci and isinstance(own_foci, list):
                well_known[key] = _with_livekit(".well-known", own_foci, foci)
                config.server.extra_well_known_client_content = well_known

        try:
            from synapse.rest import SERVLET_GROUPS
        except ImportError:
            return _NO_REGISTRY
        setattr(self._hs, _DISCOVERY, servlet)
        _put_first(SERVLET_GROUPS, _register_client_servlets)
        # Behind Synapse's own, so that a Synapse that serves the path goes on to do so.
        SERVLET_GROUPS.setdefault(_DISCOVERY, (_register_discovery,))
        return None


def path_prefixes_overlap(prefix: str, other: str) -> bool:
    """Whether one of two path prefixes lies below the other."""
    return f"{prefix}/".startswith(f"{other}/"[: len(prefix) + 1])


def has_delayed_events(config: Any) -> bool:
    """Whether users may schedule delayed events, by Synapse's configuration."""
    server = config.server
    # Synapse 1.140 has the second one only.
    if hasattr(server, "msc4140_enabled"):
        return bool(server.msc4140_enabled)
    return bool(getattr(server, "max_event_delay_ms", None))


def forward_proxy(config: Any, url: str) -> ForwardProxy | None:
    """The proxy that `http_client` goes through for a URL, None if it connects directly.

    Synapse reads `http_proxy`, `https_proxy` and `no_proxy_hosts`, then the environment variables.
    It also applies them to the HTTP client that it documents as one without proxies, and to
    addresses of this machine.

    Args:
        config: Synapse's configuration.
        url: the URL of the request.

    Raises:
        ValueError: if Synapse cannot use the proxy either.
    """
    proxies = config.server.proxy_config
    parts = urlsplit(url)
    proxy = proxies.https_proxy if parts.scheme == "https" else proxies.http_proxy
    if not proxy or proxy_bypass_environment(
        parts.hostname or "", proxies=proxies.get_proxies_dictionary()
    ):
        return None
    scheme, host, port, credentials = parse_proxy(proxy.encode())
    return ForwardProxy(
        host.decode(),
        port,
        scheme == b"https",
        credentials.as_proxy_authorization_value().decode() if credentials else None,
    )


def _federation_client(hs: Any) -> MatrixFederationHttpClient:
    """A federation client like Synapse's own, whose connections end with their answer.

    Anyone can have this homeserver ask any number of servers, so that idle connections to these
    would use up its file descriptors.
    """
    client = MatrixFederationHttpClient(hs, _BoundedTls(hs))
    # Below the agent that applies the IP block list; the pool serves `.well-known` as well.
    pool = client.agent._agent._pool  # type: ignore[attr-defined]
    pool.persistent = False
    return client


class _BoundedTls(FederationPolicyForHTTPS):
    """Synapse's TLS policy, with connections that are bounded in time and in size.

    In time, because an orderly end of TLS takes the other side's consent: a hostile server would
    keep the connection open for ever. In size, because Twisted's client reads headers without end
    and keeps them: a hostile server made Synapse grow by 400 MiB within ten seconds.
    """

    def __init__(self, hs: Any) -> None:
        super().__init__(hs.config)
        self._reactor: ISynapseReactor = hs.get_reactor()

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
            # Does nothing if the connection has ended.
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


@implementer(IAgent)
class _CancellableAgent:
    """Passes one request on to another agent, and keeps hold of it."""

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


class FederationServlet(Protocol):
    """What Synapse wants of a servlet."""

    def register(self, server: HttpServer) -> None: ...


class FederationServletFactory(Protocol):
    """Makes a servlet from the arguments that Synapse makes its own with."""

    def __call__(
        self, *, hs: Any, authenticator: Any, ratelimiter: Any, server_name: str
    ) -> "FederationServlet": ...


def _put_first(groups: dict[str, Any], servlet: Any) -> None:
    """Puts our group ahead of all others: Synapse tries hundreds of patterns in this order."""
    others = {name: servlets for name, servlets in groups.items() if name != _GROUP}
    groups.clear()
    groups.update({_GROUP: (servlet,), **others})


@contextmanager
def _log_exceptions() -> Iterator[None]:
    """Logs an exception of a servlet, which Synapse registers while it starts its listeners.

    These must start, even if a newer Synapse registers servlets in another way.
    """
    try:
        yield
    except Exception:
        logger.exception("Could not serve an endpoint of the module. Other endpoints still work")


def _register_client_servlets(hs: Any, http_server: HttpServer) -> None:
    for client, _ in filter(None, [getattr(hs, _SERVLETS, None)]):
        for servlet in client:
            with _log_exceptions():
                servlet.register(http_server)
    if hasattr(hs, _DISCOVERY) and _synapse_version() < VERSIONS_NAME_MSC4143:
        with _log_exceptions():
            _VersionsServlet(hs).register(http_server)


def _register_discovery(hs: Any, http_server: HttpServer) -> None:
    for servlet in filter(None, [getattr(hs, _DISCOVERY, None)]):
        with _log_exceptions():
            servlet.register(http_server)


def _synapse_version() -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version("matrix-synapse"))[:2]))


class _VersionsServlet(RestServlet):
    """Synapse's `/versions`, which in addition names MSC4143.

    matrix-js-sdk 45 looks there before it asks for `rtc/transports`.
    """

    # Not the letters of Synapse's own pattern: a servlet that is registered later with the same one
    # takes the place of this one.
    PATTERNS = (re.compile("^/_matrix/client/(?:versions)$"),)
    CATEGORY = "Client API requests"

    def __init__(self, hs: Any) -> None:
        from synapse.rest.client.versions import VersionsRestServlet

        super().__init__()
        self._own = VersionsRestServlet(hs)

    async def on_GET(self, request: SynapseRequest) -> tuple[int, JsonDict]:
        code, content = await self._own.on_GET(request)
        return code, {
            **content,
            "unstable_features": {**content["unstable_features"], MSC4143: True},
        }


class _FederationServlet:
    """Stands in Synapse's registry of federation servlets for the ones of each homeserver."""

    def __init__(self, hs: Any, **kwargs: Any) -> None:
        self._servlets: list[FederationServlet] = []
        for _, federation in filter(None, [getattr(hs, _SERVLETS, None)]):
            with _log_exceptions():
                self._servlets.append(federation(hs=hs, **kwargs))

    def register(self, server: HttpServer) -> None:
        for servlet in self._servlets:
            with _log_exceptions():
                servlet.register(server)


def livekit_transports(entries: Any) -> list[Mapping[str, Any]]:
    """The LiveKits in a list of transports or foci; none if it is no list.

    `m.livekit` is the type that MSC4195 has since it was accepted.
    """
    if not isinstance(entries, list):
        return []
    types = ("livekit", "m.livekit")
    return [e for e in entries if isinstance(e, Mapping) and e.get("type") in types]


def name_of(entry: Mapping[str, Any]) -> str:
    """Where an entry of a list of transports or foci sends clients, for messages."""
    return str(entry.get("livekit_service_url") or entry.get("url") or "no service")


def _with_livekit(where: str, entries: list[Any], ours: Sequence[Mapping[str, str]]) -> list[Any]:
    """The entries and, unless one of them is a LiveKit, ours behind them."""
    there = livekit_transports(entries)
    if not there:
        return [*entries, *ours]
    if any(entry not in there for entry in ours):
        logger.info("%s names a LiveKit in homeserver.yaml, and stays as it is", where)
    return entries
