# SPDX-License-Identifier: Apache-2.0
"""The Synapse module: reads its configuration and wires everything else together."""

import logging
from functools import partial
from typing import Any

from synapse.http.servlet import RestServlet
from synapse.module_api import ModuleApi

from synapse_lk_jwt import discovery
from synapse_lk_jwt.api.check import CheckResource
from synapse_lk_jwt.api.discovery import TransportsRestServlet
from synapse_lk_jwt.api.rate_limits import Limits
from synapse_lk_jwt.api.service import ServiceResource
from synapse_lk_jwt.api.services import Services
from synapse_lk_jwt.auth.access import Access
from synapse_lk_jwt.check.setup import from_synapse
from synapse_lk_jwt.check.start import StartChecks
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.compat.module_database import ModuleDatabase, unsupported_schema
from synapse_lk_jwt.compat.self_test import Feature, describe, missing_hooks
from synapse_lk_jwt.config import HOMESERVER_PREFIX, LiveKitJwtConfig, parse_config
from synapse_lk_jwt.delegation.service import DelegationService
from synapse_lk_jwt.delegation.tables import DelegationTable
from synapse_lk_jwt.discovery import Advertise
from synapse_lk_jwt.enforcement.room_changes import Membership
from synapse_lk_jwt.enforcement.tables import StreamPosition
from synapse_lk_jwt.issuer import Issuer
from synapse_lk_jwt.livekit.client import RoomService
from synapse_lk_jwt.livekit.ownership import OwnerSealer
from synapse_lk_jwt.livekit.tables import CallTable, OwnerTable
from synapse_lk_jwt.livekit.tokens import TokenSigner
from synapse_lk_jwt.monitor import Monitor
from synapse_lk_jwt.process_registry import ProcessRegistry, ProcessTable
from synapse_lk_jwt.remote_tokens import RemoteSfus

logger = logging.getLogger(__name__)


class LiveKitJwtModule:
    """Hands out LiveKit access tokens to Matrix users."""

    def __init__(self, config: LiveKitJwtConfig, api: ModuleApi) -> None:
        missing = missing_hooks(api)
        if Feature.TOKENS in missing:
            missing = {Feature.TOKENS: missing[Feature.TOKENS]}
        for feature, hooks in missing.items():
            logger.error(
                "synapse-lk-jwt does not support this version: %s. Upgrade synapse-lk-jwt, or"
                " return to an older Synapse",
                describe(feature, hooks),
            )
        if Feature.TOKENS in missing:
            return
        unsupported = unsupported_schema(api)
        if unsupported is not None:
            logger.error("%s", unsupported)
            return
        homeserver = Homeserver(api, missing.keys())
        service_url = config.service_url_at(api.public_baseurl)
        try:
            # Ahead of what the module itself adds.
            setup = from_synapse(homeserver.config, config)
        except Exception as e:
            # Nothing stands on it but these checks.
            setup = None
            logger.warning(
                "The checks at start are left out, as this Synapse's configuration has another form"
                " than they know (%s)",
                type(e).__name__,
            )
        signer = TokenSigner(
            config.livekit_key,
            config.livekit_secret,
            homeserver.clock.time_msec,
            config.other_livekit_pairs,
        )
        database = ModuleDatabase(homeserver)
        calls, owners = CallTable(database), OwnerTable(database)
        delegations = DelegationTable(database)
        sealer = OwnerSealer(config.livekit_secret, *config.other_livekit_pairs.values())
        rooms = RoomService(homeserver, config.livekit_internal_url, signer, sealer, calls.note)
        issuer = Issuer(
            homeserver=homeserver,
            access=Access(
                homeserver.server_name, config.full_access_homeservers, config.remote_can_publish
            ),
            rooms=rooms,
            owners=owners,
            signer=signer,
            sealer=sealer,
            require_room_membership=config.require_room_membership,
            believe_rooms_elsewhere=config.believe_rooms_elsewhere,
            token_lifetime_ms=config.token_lifetime_ms,
            can_update_own_metadata=config.can_update_own_metadata,
        )
        limits = Limits(homeserver, config.rc_token, config.rc_openid)
        leaves = DelegationService(homeserver, database, delegations, calls, rooms)
        leaves.start()
        processes = ProcessRegistry(homeserver, ProcessTable(database))
        processes.start()
        monitor = Monitor(
            homeserver,
            calls,
            owners,
            rooms,
            leaves,
            Membership(
                homeserver, calls, owners, StreamPosition(database), delegations, rooms, issuer
            ),
            processes,
            config.sanity_check_interval_ms,
            issuer.owners_kept_ms,
        )
        services = Services(homeserver, issuer, limits, leaves, config.livekit_url)
        if Feature.HOMESERVER_ENDPOINTS in missing:
            # That has been logged.
            not_served: str | None = "this Synapse lacks what they need"
        elif (not_served := _serve_homeserver_endpoints(services)) is not None:
            logger.error(
                "MSC4195's homeserver endpoints are not served: %s. %s",
                not_served,
                homeserver.check_command,
            )
        check = CheckResource(services, processes, calls, not_served)
        service = ServiceResource(services, monitor, processes, check, sealer)
        if not homeserver.servlets.register_web_resource(config.path_prefix, service):
            logger.error(
                "Another module serves %s, or this one is listed twice: it is of no use here. %s",
                config.path_prefix,
                homeserver.check_command,
            )
        _advertise(homeserver, config, service_url, has_msc4195=not_served is None)
        for warning in config.warnings:
            logger.warning("%s", warning)
        if setup is not None:
            StartChecks(homeserver, setup)
        logger.info("Serving LiveKit access tokens at %s", service_url)

    @staticmethod
    def parse_config(config: dict[str, Any]) -> LiveKitJwtConfig:
        """Called by Synapse before it makes the module.

        Raises:
            synapse.module_api.errors.ConfigError: naming all keys that are wrong.
        """
        return parse_config(config)


def _advertise(
    homeserver: Homeserver, config: LiveKitJwtConfig, service_url: str, *, has_msc4195: bool
) -> None:
    """Has Synapse announce what the configuration says, as far as it is served."""
    advertise = config.advertise.where_served(has_msc4195)
    if advertise is not config.advertise:
        logger.error(
            "advertise: %s cannot take effect without MSC4195's homeserver endpoints. Only the"
            " service at %s is announced. Write advertise: service, or remove the cause above",
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
            "Clients that look at the stable path of rtc/transports do not find LiveKit: %s. %s",
            not_served,
            homeserver.check_command,
        )


def _serve_homeserver_endpoints(services: Services) -> str | None:
    """Serves MSC4195's endpoints below `/_matrix`; returns None, or why that cannot be."""
    # These import internals of Synapse that the service endpoints do without.
    from synapse_lk_jwt.api.client_server import (
        DelegateDelayedLeaveRestServlet,
        GetTokenRestServlet,
    )
    from synapse_lk_jwt.api.federation import GetTokenFederationServlet

    homeserver = services.homeserver
    client: list[RestServlet] = [GetTokenRestServlet(services, RemoteSfus(homeserver))]
    if homeserver.delayed_events.are_enabled:
        # Clients take any answer but 404 as a promise.
        client.append(DelegateDelayedLeaveRestServlet(services))
    return homeserver.servlets.serve_below_matrix(
        client,
        partial(GetTokenFederationServlet, services=services),
        prefix=HOMESERVER_PREFIX,
    )
