# SPDX-License-Identifier: Apache-2.0
"""The homeserver's application services, and the users that belong to them."""

from collections.abc import Collection, Sequence
from typing import Protocol

from synapse.appservice import ApplicationService
from synapse.types import UserInfo

from synapse_lk_jwt.compat.self_test import Feature


class AppServiceStore(Protocol):
    """The parts of Synapse's store that this file uses."""

    def get_app_services(self) -> Sequence[ApplicationService]: ...

    def get_app_service_by_user_id(self, user_id: str) -> ApplicationService | None: ...

    def get_app_service_by_id(self, as_id: str) -> ApplicationService | None: ...

    async def get_user_by_id(self, user_id: str) -> UserInfo | None: ...


class AppServices:
    """The application services of the homeserver; none if this Synapse lacks a hook for them."""

    def __init__(self, store: AppServiceStore, off: Collection[Feature]) -> None:
        self._store = store
        self._is_off = Feature.APPLICATION_SERVICES in off

    def all(self) -> Sequence[ApplicationService]:
        """All application services."""
        return () if self._is_off else self._store.get_app_services()

    async def of_user(self, user_id: str) -> ApplicationService | None:
        """The application service that a local user belongs to, if any. Cached."""
        if self._is_off:
            return None
        service = self._store.get_app_service_by_user_id(user_id)
        if service is None:
            user = await self._store.get_user_by_id(user_id)
            if user is not None and user.appservice_id is not None:
                # Synapse declares the ID of an application service as an `int`, but it is a `str`.
                service = self._store.get_app_service_by_id(str(user.appservice_id))
        return service
