# SPDX-License-Identifier: Apache-2.0
"""Users: the owner of a token, whether an account is active, and what Synapse allows it."""

from collections.abc import Collection, Mapping
from contextlib import closing
from typing import Any, Protocol

from synapse.module_api import ModuleApi, Requester
from synapse.storage.database import LoggingDatabaseConnection
from synapse.types import UserInfo, create_requester
from synapse.util.clock import Clock

from synapse_lk_jwt.auth.access import Standing
from synapse_lk_jwt.compat.app_services import AppServices
from synapse_lk_jwt.compat.database import Database
from synapse_lk_jwt.compat.self_test import Feature


class UserStore(Protocol):
    """The parts of Synapse's store that this file uses."""

    async def get_user_by_id(self, user_id: str) -> UserInfo | None: ...

    async def is_user_erased(self, user_id: str) -> bool: ...

    async def get_devices_by_user(self, user_id: str) -> Mapping[str, Any]: ...


class AccountValidityHandler(Protocol):
    """The parts of Synapse's handler that this file uses."""

    async def is_user_expired(self, user_id: str) -> bool: ...


class AuthBlocking(Protocol):
    """The parts of Synapse's handler that this file uses."""

    async def check_auth_blocking(self, *, requester: Requester) -> None: ...


class LimitsConfig(Protocol):
    """The parts of the section `server` that this file uses."""

    @property
    def hs_disabled(self) -> bool: ...

    @property
    def limit_usage_by_mau(self) -> bool: ...


class UsersConfig(Protocol):
    """The parts of Synapse's configuration that this file uses."""

    @property
    def server(self) -> LimitsConfig: ...


class UsersHomeServer(Protocol):
    """The parts of Synapse's `HomeServer` that this file uses."""

    @property
    def config(self) -> UsersConfig: ...

    def get_clock(self) -> Clock: ...

    def get_account_validity_handler(self) -> AccountValidityHandler: ...

    def get_auth_blocking(self) -> AuthBlocking: ...


class Users:
    """The users of this homeserver. Some methods also accept users of other servers.

    Attributes:
        get_user_by_req: Synapse's authentication of a client's request.
    """

    def __init__(
        self,
        api: ModuleApi,
        hs: UsersHomeServer,
        store: UserStore,
        database: Database,
        app_services: AppServices,
        off: Collection[Feature],
    ) -> None:
        self._is_mine = api.is_mine
        self._hs = hs
        self._store = store
        self._database = database
        self._app_services = app_services
        self._off = off
        self.get_user_by_req = api.get_user_by_req

    async def of_openid_token(self, token: str) -> str | None:
        """The local user whose unexpired OpenID token this is; one database read.

        A worker's store has no method for this, so each process reads the table.
        """

        def select(connection: LoggingDatabaseConnection) -> tuple[Any, ...] | None:
            with closing(connection.cursor(txn_name="synapse_lk_jwt_openid_token")) as txn:
                txn.execute(
                    "SELECT user_id, ts_valid_until_ms FROM open_id_tokens WHERE token = ?",
                    (token,),
                )
                return txn.fetchone()

        # One query needs no transaction, which would take a tenth of the time of the whole request.
        row = await self._database.pool.runWithConnection(select, db_autocommit=True)
        if row is None or row[1] < self._hs.get_clock().time_msec():
            return None
        return str(row[0])

    async def is_active(self, user_id: str) -> bool:
        """Whether a local user may use the homeserver.

        Deactivated, locked, suspended, erased and expired (account validity) users may not. Cached,
        unless another module decides on account validity. A change takes effect with the next
        request.
        """
        user = await self._store.get_user_by_id(user_id)
        if user is None:
            # Application services may act as their sender without registering it.
            return await self._app_services.of_user(user_id) is not None
        return not (
            user.is_deactivated
            or user.locked
            or user.suspended
            or (Feature.ERASED_USERS not in self._off and await self._store.is_user_erased(user_id))
            # Account validity does not apply to users of application services.
            or (
                user.appservice_id is None
                and Feature.EXPIRED_ACCOUNTS not in self._off
                and await self._hs.get_account_validity_handler().is_user_expired(user_id)
            )
        )

    async def select_inactive(self, user_ids: Collection[str]) -> set[str]:
        """The subset of local users who are deactivated, locked or suspended; a database read."""
        return await self._database.select_matching(
            "SELECT name FROM users WHERE (deactivated = 1 OR locked OR suspended) AND",
            "name",
            user_ids,
        )

    async def standing(self, user_id: str) -> Standing:
        """The standing of a user; NORMAL for users of other servers. Cached."""
        user = await self._store.get_user_by_id(user_id) if self._is_mine(user_id) else None
        if user is not None and user.is_shadow_banned:
            return Standing.SHADOW_BANNED
        if user is not None and user.is_guest:
            return Standing.GUEST
        return Standing.NORMAL

    async def check_auth_blocking(self, user_id: str) -> None:
        """Rejects a local user while Synapse serves no requests of that user.

        `hs_disabled` applies to all users, the limit of monthly active users to those beyond it.
        Without these options, this reads no database.

        Raises:
            synapse.api.errors.ResourceLimitError: 403, as Synapse itself answers.
        """
        if Feature.SERVER_LIMITS in self._off:
            return
        server = self._hs.config.server
        if server.hs_disabled or server.limit_usage_by_mau:
            service = await self._app_services.of_user(user_id)
            requester = create_requester(user_id, app_service=service)
            await self._hs.get_auth_blocking().check_auth_blocking(requester=requester)

    async def device_ids(self, user_id: str) -> Collection[str]:
        """The devices of a local user; none for users of other servers. A database read."""
        if Feature.DEVICES in self._off or not self._is_mine(user_id):
            return ()
        return (await self._store.get_devices_by_user(user_id)).keys()
