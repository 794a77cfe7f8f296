# SPDX-License-Identifier: Apache-2.0
"""Synapse's rate limits."""

from synapse.api.ratelimiting import Ratelimiter
from synapse.config.ratelimiting import RatelimitSettings
from synapse.module_api import ModuleApi
from synapse.storage.databases.main import DataStore
from synapse.util.clock import Clock

from synapse_lk_jwt.compat.app_services import AppServices

__all__ = ["RateLimits", "RatelimitSettings", "Ratelimiter"]


class RateLimits:
    """Creates rate limiters, and names the users that they do not apply to."""

    def __init__(
        self, api: ModuleApi, store: DataStore, clock: Clock, app_services: AppServices
    ) -> None:
        self._is_mine = api.is_mine
        self._store = store
        self._clock = clock
        self._app_services = app_services

    def limiter(self, settings: RatelimitSettings) -> Ratelimiter:
        """A rate limiter with these settings."""
        return Ratelimiter(store=self._store, clock=self._clock, cfg=settings)

    async def is_exempt(self, user_id: str) -> bool:
        """Whether a user belongs to an application service with `rate_limited: false`. Cached."""
        if not self._app_services.all() or not self._is_mine(user_id):
            return False
        service = await self._app_services.of_user(user_id)
        return service is not None and not service.is_rate_limited()
