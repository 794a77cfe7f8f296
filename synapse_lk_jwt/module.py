# SPDX-License-Identifier: Apache-2.0
"""The Synapse module: parses its configuration, constructs its parts, and starts them."""

import logging
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import attr
from synapse.http.servlet import RestServlet
from synapse.module_api import ModuleApi

from synapse_lk_jwt import discovery
from synapse_lk_jwt.api.check import CheckResource
from synapse_lk_jwt.api.discovery import TransportsRestServlet
from synapse_lk_jwt.api.rate_limits import Limits
from synapse_lk_jwt.api.service import ServiceResource
from synapse_lk_jwt.api.services import Services
from synapse_lk_jwt.auth.access import Access
from synapse_lk_jwt.auth.room_access import RoomAccessRule
from synapse_lk_jwt.check.start import StartChecks
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.compat.module_database import ModuleDatabase, unsupported_schema
from synapse_lk_jwt.compat.self_test import Feature, describe, missing_hooks
from synapse_lk_jwt.config import LiveKitJwtConfig, parse_config
from synapse_lk_jwt.delegation.service import DelegationService
from synapse_lk_jwt.delegation.tables import DelegationTable
from synapse_lk_jwt.discovery import Advertise
from synapse_lk_jwt.enforcement.owners import ParticipantOwners
from synapse_lk_jwt.enforcement.participants import ParticipantEnforcer
from synapse_lk_jwt.enforcement.recheck_list import RecheckList, tokens_usable_ms
from synapse_lk_jwt.enforcement.rechecks import Rechecker
from synapse_lk_jwt.enforcement.removals import RoomRemovals
from synapse_lk_jwt.enforcement.room_changes import RoomChanges
from synapse_lk_jwt.enforcement.tables import StreamPosition
from synapse_lk_jwt.issuer import Issuer
from synapse_lk_jwt.livekit.client import RoomService
from synapse_lk_jwt.livekit.ownership import OwnerSealer
from synapse_lk_jwt.livekit.room_cache import RoomCache
from synapse_lk_jwt.livekit.tables import CallTable, OwnerTable
from synapse_lk_jwt.livekit.tokens import TokenSigner
from synapse_lk_jwt.livekit.twirp import TwirpClient
from synapse_lk_jwt.monitor import Monitor
from synapse_lk_jwt.msc4195 import PATH_PREFIX
from synapse_lk_jwt.process_registry import ProcessRegistry, ProcessTable
from synapse_lk_jwt.remote_tokens import RemoteSfus
from synapse_lk_jwt.webhooks import WebhookHandler

logger = logging.getLogger(__name__)


class _Startable(Protocol):
    def start(self) -> None: ...


@attr.s(auto_attribs=True, frozen=True, slots=True, kw_only=True)
class _Parts:
    """The parts of the module that are served or started.

    Attributes:
        services: what the endpoints share.
        webhooks: applies LiveKit's webhooks.
        processes: the Synapse processes that have loaded the module.
        calls: the calls that were noted.
        startable: the parts with loops and callbacks, in the order in which they start.
    """

    services: Services
    webhooks: WebhookHandler
    processes: ProcessRegistry
    calls: CallTable
    startable: Iterable[_Startable]


class LiveKitJwtModule:
    """Issues LiveKit access tokens to Matrix users, and cleans up their calls."""

    def __init__(self, config: LiveKitJwtConfig, api: ModuleApi) -> None:
        missing = missing_hooks(api)
        _log_missing(missing)
        if Feature.TOKENS in missing:
            return
        unsupported = unsupported_schema(api)
        if unsupported is not None:
            logger.error("%s", unsupported)
            return
        homeserver = Homeserver(api, missing.keys())
        # `StartChecks` must read Synapse's configuration before the module adds entries to it.
        start_checks = StartChecks(homeserver, config)
        parts = _construct(homeserver, config)
        not_served = _serve_homeserver_endpoints(parts.services, missing.keys())
        _serve_service_endpoints(config, parts, not_served, start_checks.report)
        service_url = config.service_url_at(api.public_baseurl)
        _advertise(homeserver, config, service_url, has_msc4195=not_served is None)
        for warning in config.warnings:
            logger.warning("%s", warning)
        for part in (*parts.startable, start_checks):
            part.start()
        logger.info("Serving LiveKit access tokens at %s", service_url)

    @staticmethod
    def parse_config(config: dict[str, Any]) -> LiveKitJwtConfig:
        """Parses the module's block in homeserver.yaml. Synapse calls this first.

        Raises:
            synapse.module_api.errors.ConfigError: naming all invalid options.
        """
        return parse_config(config)


def _log_missing(missing: dict[Feature, list[str]]) -> None:
    """Logs the features that are off because this Synapse lacks what they need."""
    if Feature.TOKENS in missing:
        missing = {Feature.TOKENS: missing[Feature.TOKENS]}
    for feature, hooks in missing.items():
        logger.error(
            "synapse-lk-jwt does not support this version: %s. Upgrade synapse-lk-jwt, or"
            " return to an older Synapse",
            describe(feature, hooks),
        )


@attr.s(auto_attribs=True, frozen=True, slots=True, kw_only=True)
class _LiveKit:
    """The clients of one LiveKit, and its keys."""

    signer: TokenSigner
    sealer: OwnerSealer
    rooms: RoomService
    room_cache: RoomCache
    proxy_url: str | None


def _construct(homeserver: Homeserver, config: LiveKitJwtConfig) -> _Parts:
    """Constructs the parts. Nothing runs until they are started."""
    database = ModuleDatabase(homeserver)
    calls, delegation_table = CallTable(database), DelegationTable(database)
    livekit = _livekit(homeserver, config, calls)
    rooms, room_cache = livekit.rooms, livekit.room_cache
    usable_ms = tokens_usable_ms(config.token_lifetime_ms)
    owners = ParticipantOwners(
        OwnerTable(database), usable_ms, is_on=config.can_update_own_metadata
    )
    issuer = _issuer(homeserver, config, livekit, owners)
    access = issuer.room_access
    delegations = DelegationService(homeserver, database, delegation_table, calls, rooms)
    processes = ProcessRegistry(homeserver, ProcessTable(database))

    rechecks = RecheckList(homeserver, usable_ms)
    enforcer = ParticipantEnforcer(homeserver, rooms, access, owners, rechecks)
    removals = RoomRemovals(
        homeserver, calls, delegation_table, room_cache, access, enforcer, rechecks
    )
    room_changes = RoomChanges(homeserver, calls, StreamPosition(database), removals)
    rechecker = Rechecker(homeserver, calls, rechecks, enforcer, removals)
    monitor = Monitor(
        homeserver,
        calls,
        rooms,
        room_cache,
        delegations,
        enforcer,
        owners,
        processes,
        config.sanity_check_interval_ms,
    )
    limits = Limits(homeserver, config.rc_token, config.rc_openid)
    return _Parts(
        services=Services(
            homeserver, issuer, limits, delegations, config.livekit_url, livekit.proxy_url
        ),
        webhooks=WebhookHandler(homeserver, calls, room_cache, delegations, enforcer, owners),
        processes=processes,
        calls=calls,
        startable=(delegations, processes, removals, room_changes, rechecker, monitor),
    )


def _livekit(homeserver: Homeserver, config: LiveKitJwtConfig, calls: CallTable) -> _LiveKit:
    signer = TokenSigner(
        config.livekit_key,
        config.livekit_secret,
        homeserver.clock.time_msec,
        config.other_livekit_pairs,
    )
    sealer = OwnerSealer(config.livekit_secret, *config.other_livekit_pairs.values())
    proxy = homeserver.http.forward_proxy(config.livekit_internal_url)
    proxy_url = proxy.url if proxy else None
    twirp = TwirpClient(homeserver, config.livekit_internal_url, signer, proxy_url)
    rooms = RoomService(homeserver, twirp, sealer)
    return _LiveKit(
        signer=signer,
        sealer=sealer,
        rooms=rooms,
        room_cache=RoomCache(homeserver, rooms, calls.note),
        proxy_url=proxy_url,
    )


def _issuer(
    homeserver: Homeserver, config: LiveKitJwtConfig, livekit: _LiveKit, owners: ParticipantOwners
) -> Issuer:
    access = Access(
        homeserver.server_name, config.full_access_homeservers, config.remote_can_publish
    )
    return Issuer(
        homeserver=homeserver,
        access=access,
        room_access=RoomAccessRule(
            homeserver=homeserver,
            require_room_membership=config.require_room_membership,
            believe_rooms_elsewhere=config.believe_rooms_elsewhere,
        ),
        rooms=livekit.room_cache,
        owners=owners,
        signer=livekit.signer,
        sealer=livekit.sealer,
        token_lifetime_ms=config.token_lifetime_ms,
        can_update_own_metadata=config.can_update_own_metadata,
    )


def _serve_service_endpoints(
    config: LiveKitJwtConfig,
    parts: _Parts,
    not_served: str | None,
    settings: Mapping[str, Any],
) -> None:
    """Serves the endpoints below the path prefix, `/_synapse/client/livekit/jwt` by default."""
    homeserver = parts.services.homeserver
    check = CheckResource(parts.services, parts.processes, parts.calls, not_served, settings)
    service = ServiceResource(parts.services, parts.webhooks, parts.processes, check)
    if not homeserver.servlets.register_web_resource(config.path_prefix, service):
        logger.error(
            "Another module serves %s, or homeserver.yaml lists this module twice. Clients get no"
            " tokens from this module. %s",
            config.path_prefix,
            homeserver.check_command,
        )


def _serve_homeserver_endpoints(services: Services, missing: Collection[Feature]) -> str | None:
    """Serves MSC4195's endpoints below `/_matrix`; returns None, or why they are not served."""
    if Feature.HOMESERVER_ENDPOINTS in missing:
        # `_log_missing` has logged what is missing.
        return "this Synapse lacks what they need"
    # These modules import internals of Synapse that the service endpoints do not need.
    from synapse_lk_jwt.api.client_server import (
        DelegateDelayedLeaveRestServlet,
        GetTokenRestServlet,
    )
    from synapse_lk_jwt.api.federation import GetTokenFederationServlet

    homeserver = services.homeserver
    client: list[RestServlet] = [GetTokenRestServlet(services, RemoteSfus(homeserver))]
    if homeserver.delayed_events.are_enabled:
        # Clients rely on the endpoint unless the answer is 404.
        client.append(DelegateDelayedLeaveRestServlet(services))
    not_served = homeserver.servlets.serve_below_matrix(
        client,
        partial(GetTokenFederationServlet, services=services),
        prefix=PATH_PREFIX,
    )
    if not_served is not None:
        logger.error(
            "MSC4195's homeserver endpoints are not served: %s. %s",
            not_served,
            homeserver.check_command,
        )
    return not_served


def _advertise(
    homeserver: Homeserver, config: LiveKitJwtConfig, service_url: str, *, has_msc4195: bool
) -> None:
    """Adds the SFU to what Synapse announces to clients, with the endpoints that are served."""
    advertise = config.advertise.where_served(has_msc4195)
    if advertise is not config.advertise:
        logger.error(
            "advertise: %s has no effect, because MSC4195's homeserver endpoints are not served."
            " Synapse announces only the service at %s. Write advertise: service, or remove the"
            " cause that is logged above",
            config.advertise.value,
            service_url,
        )
    if advertise is Advertise.OFF:
        return
    not_served = homeserver.discovery.advertise(
        discovery.transports(advertise, config.livekit_url, service_url),
        discovery.foci(advertise, service_url),
        TransportsRestServlet(homeserver),
    )
    if not_served is not None:
        logger.error(
            "Clients that request the stable path of rtc/transports do not find LiveKit: %s. %s",
            not_served,
            homeserver.check_command,
        )
