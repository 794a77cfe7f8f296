# SPDX-License-Identifier: Apache-2.0
"""Which private names of Synapse the package uses, and which feature needs each of them.

At start the module logs the names that this Synapse lacks, and turns off the features that need
them. Columns of Synapse's tables are not in this list, because a check of them needs the database.
"""

from collections.abc import Iterable, Mapping
from enum import Enum, unique
from importlib import import_module
from inspect import getattr_static, isclass
from typing import Any

from synapse.module_api import ModuleApi
from synapse.server import HomeServer
from synapse.storage.databases.main import DataStore


@unique
class Feature(Enum):
    """A part of the module that can be off. The value states what that means for an admin."""

    TOKENS = "The module is off"
    DELEGATION = "Clients cannot delegate delayed leaves"
    STATE_CHANGES = (
        "Participants who leave the Matrix room are removed at the next poll, not at once"
    )
    HOMESERVER_ENDPOINTS = "MSC4195's homeserver endpoints are not served"
    OTHER_SERVERS = (
        "The module cannot send requests to other homeservers. Their users get no tokens from the"
        " service endpoints, and users of this homeserver get none for the SFUs of others"
    )
    TRANSPORTS = "rtc/transports does not name the SFU"
    WELL_KNOWN = ".well-known/matrix/client does not name the SFU"
    EXPIRED_ACCOUNTS = "Users with expired accounts are not rejected"
    ERASED_USERS = "Erased users are not rejected"
    BLOCKED_ROOMS = "Token requests for blocked rooms are not rejected"
    SERVER_LIMITS = "hs_disabled and the limit of monthly active users do not apply to tokens"
    SERVER_ACLS = "Users of servers that m.room.server_acl excludes are not rejected"
    PARTIAL_STATE = (
        "Users of other servers get no tokens for a room while this homeserver completes its join"
    )
    APPLICATION_SERVICES = (
        "Users of application services are not exempt from rate limits, and senders who never"
        " registered get no tokens"
    )
    DEVICES = "A call that is too large to be listed ends when a participant leaves the room"
    PATHS = "The module cannot find out whether another module serves its path"


# The hooks that each feature needs. A hook is a root, a colon, and a path of attributes, in which
# `()` is a call. The root is `hs`, `store` or `config` of the homeserver, or a module. `or`
# separates alternatives.
HOOKS: Mapping[Feature, tuple[str, ...]] = {
    Feature.TOKENS: (
        "config:config_files",
        "config:database.databases",
        "config:server.proxy_config.get_proxies_dictionary",
        "config:server.proxy_config.http_proxy",
        "config:server.proxy_config.https_proxy",
        "hs:config",
        "hs:get_clock",
        "hs:get_datastores",
        "hs:get_instance_name",
        "hs:get_reactor",
        "hs:get_simple_http_client().agent",
        "store:database_engine.module.Error",
        "store:db_pool.runWithConnection",
        "store:db_pool.simple_select_one_onecol",
        "store:get_rooms_for_user",
        "store:get_user_by_id",
        "store:is_host_joined",
        "synapse.storage.database:make_conn",
        "synapse.types:UserInfo.appservice_id",
        "synapse.types:UserInfo.is_deactivated",
        "synapse.types:UserInfo.is_guest",
        "synapse.types:UserInfo.is_shadow_banned",
        "synapse.types:UserInfo.locked",
        "synapse.types:UserInfo.suspended",
    ),
    Feature.DELEGATION: (
        # Synapse 1.140 has `max_event_delay_ms` only.
        "config:server.msc4140_enabled or config:server.max_event_delay_ms",
        "hs:get_event_creation_handler",
        "hs:register_async_shutdown_handler",
        "store:is_guest",
        "synapse.handlers.message:EventCreationHandler.create_and_send_nonmember_event",
        "synapse.rest.client.delayed_events:register_servlets",
        "synapse.storage.databases.main.delayed_events:DelayedEventsStore",
    ),
    Feature.STATE_CHANGES: (
        "hs:get_notifier",
        "store:_curr_state_delta_stream_cache.has_any_entity_changed",
        "store:get_partial_current_state_deltas",
        "store:get_room_max_stream_ordering",
        "synapse.storage.databases.main.state_deltas:StateDelta.event_type",
        "synapse.storage.databases.main.state_deltas:StateDelta.room_id",
        "synapse.storage.databases.main.state_deltas:StateDelta.state_key",
        "synapse.notifier:Notifier.add_replication_callback",
    ),
    Feature.HOMESERVER_ENDPOINTS: (
        "store:get_current_hosts_in_room",
        "synapse.federation.transport.server._base:BaseFederationServlet",
        "synapse.federation.transport.server:SERVLET_GROUPS",
        "synapse.rest:SERVLET_GROUPS",
    ),
    Feature.OTHER_SERVERS: (
        "config:federation.is_domain_allowed_according_to_federation_whitelist",
        "hs:get_federation_http_client()._cooperator",
        "hs:get_federation_http_client().agent._agent._pool",
        "hs:get_federation_http_client().build_auth_headers",
    ),
    Feature.TRANSPORTS: (
        "config:experimental.msc4143_enabled",
        "config:matrix_rtc.transports",
    ),
    Feature.WELL_KNOWN: ("config:server.extra_well_known_client_content",),
    Feature.EXPIRED_ACCOUNTS: (
        "hs:get_account_validity_handler",
        "synapse.handlers.account_validity:AccountValidityHandler.is_user_expired",
    ),
    Feature.ERASED_USERS: ("store:is_user_erased",),
    Feature.BLOCKED_ROOMS: ("store:is_room_blocked",),
    Feature.SERVER_LIMITS: (
        "config:server.hs_disabled",
        "config:server.limit_usage_by_mau",
        "hs:get_auth_blocking",
        "synapse.api.auth_blocking:AuthBlocking.check_auth_blocking",
    ),
    Feature.SERVER_ACLS: (
        "hs:get_storage_controllers().state.get_server_acl_for_room",
        "synapse.synapse_rust.acl:ServerAclEvaluator.server_matches_acl_event",
    ),
    Feature.PARTIAL_STATE: ("store:is_partial_state_room",),
    Feature.APPLICATION_SERVICES: (
        "store:get_app_service_by_id",
        "store:get_app_service_by_user_id",
        "store:get_app_services",
        "synapse.appservice:ApplicationService.is_rate_limited",
    ),
    Feature.DEVICES: ("store:get_devices_by_user",),
    Feature.PATHS: ("hs:_module_web_resources",),
}

# Attributes of objects that their classes do not have.
_INSTANCE_ONLY = (
    "config:",
    "hs:_module_web_resources",
    "hs:config",
    "store:_curr_state_delta_stream_cache",
    "store:database_engine",
    "store:db_pool",
)


def missing_hooks(api: ModuleApi) -> dict[Feature, list[str]]:
    """The features that are off in this running Synapse, and the hooks that each of them lacks.

    Args:
        api: Synapse's module API.
    """
    return _missing(HOOKS, lambda root: _root_of(api._hs, root))


def missing_in_installed_synapse() -> dict[Feature, list[str]]:
    """As `missing_hooks`, without a running homeserver: only the hooks that classes show."""
    classes = {"hs": HomeServer, "store": DataStore}
    hooks = {
        feature: [name for name in names if not name.startswith(_INSTANCE_ONLY)]
        for feature, names in HOOKS.items()
    }
    return _missing(hooks, lambda root: classes.get(root) or import_module(root))


def describe(feature: Feature, hooks: Iterable[str]) -> str:
    """Two sentences for the log: what a feature lacks, and what that means for the admin."""
    names = ", ".join(hook.replace(":", ".") for hook in hooks)
    return f"this Synapse lacks {names}. {feature.value}"


def _root_of(hs: Any, root: str) -> Any:
    if root == "hs":
        return hs
    if root == "config":
        return hs.config
    return hs.get_datastores().main if root == "store" else import_module(root)


def _missing(hooks: Mapping[Feature, Iterable[str]], root_of: Any) -> dict[Feature, list[str]]:
    found = {
        feature: [hook for hook in names if not any(_has(h, root_of) for h in hook.split(" or "))]
        for feature, names in hooks.items()
    }
    return {feature: missing for feature, missing in found.items() if missing}


def _has(hook: str, root_of: Any) -> bool:
    root, _, path = hook.partition(":")
    try:
        found = root_of(root)
        for part in path.split("."):
            name = part.removesuffix("()")
            if isclass(found):
                # Synapse's cached methods raise when `getattr` reads them from their class.
                found = getattr_static(found, name)
                if name != part:
                    # The rest of the path belongs to a result, which only an object returns.
                    return True
            else:
                found = getattr(found, name)
                if name != part:
                    found = found()
    except (AttributeError, ImportError):
        return False
    return True
