# SPDX-License-Identifier: Apache-2.0
"""The Synapse module: reads its configuration and wires everything else together."""

import logging
from typing import Any

from synapse.module_api import ModuleApi

from synapse_lk_jwt.access import Access
from synapse_lk_jwt.config import LiveKitJwtConfig, parse_config
from synapse_lk_jwt.homeserver import Homeserver
from synapse_lk_jwt.issuer import Issuer
from synapse_lk_jwt.sfu.rooms import RoomService
from synapse_lk_jwt.sfu.tokens import TokenSigner
from synapse_lk_jwt.web.service import ServiceResource

logger = logging.getLogger(__name__)


class LiveKitJwtModule:
    """Hands out LiveKit access tokens to Matrix users."""

    def __init__(self, config: LiveKitJwtConfig, api: ModuleApi) -> None:
        homeserver = Homeserver(api)
        signer = TokenSigner(config.livekit_key, config.livekit_secret, homeserver.clock.time_msec)
        issuer = Issuer(
            homeserver=homeserver,
            access=Access(
                homeserver.server_name, config.full_access_homeservers, config.remote_can_publish
            ),
            rooms=RoomService(homeserver, config.livekit_internal_url, signer),
            signer=signer,
            require_room_membership=config.require_room_membership,
            token_lifetime_ms=config.token_lifetime_ms,
            can_update_own_metadata=config.can_update_own_metadata,
        )
        api.register_web_resource(
            config.path_prefix, ServiceResource(homeserver, issuer, config.livekit_url)
        )
        service_url = config.service_url or f"{api.public_baseurl.rstrip('/')}{config.path_prefix}"
        if config.advertise:
            homeserver.advertise(livekit_url=None, service_url=service_url)
        for warning in config.warnings:
            logger.warning("%s", warning)
        logger.info("Serving LiveKit access tokens at %s", service_url)

    @staticmethod
    def parse_config(config: dict[str, Any]) -> LiveKitJwtConfig:
        """Called by Synapse before it makes the module.

        Raises:
            synapse.module_api.errors.ConfigError: naming all keys that are wrong.
        """
        return parse_config(config)
