# SPDX-License-Identifier: Apache-2.0
"""Synapse's own configuration: how Synapse reads it, and the options that concern calls."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import attr
import yaml
from synapse.config._base import Config, find_config_files, read_config_files
from synapse.config.homeserver import HomeServerConfig
from synapse.config.ratelimiting import RatelimitSettings

from synapse_lk_jwt.compat.delayed_events import has_delayed_events, max_event_delay_ms
from synapse_lk_jwt.discovery import FOCI

__all__ = [
    "MAIN",
    "HomeServerConfig",
    "Listener",
    "SynapseConfig",
    "find_config_files",
    "load_config",
    "parse_duration",
    "read_config_files",
    "relevant_options",
]

# Synapse's name for the main process.
MAIN = "master"


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Listener:
    """Where a process answers HTTP requests.

    Attributes:
        url: its address from this machine.
        resources: what Synapse serves there.
        x_forwarded: whether Synapse reads the client's address from `X-Forwarded-For`.
    """

    url: str
    resources: tuple[str, ...]
    x_forwarded: bool = True


@attr.s(auto_attribs=True, frozen=True, slots=True, kw_only=True)
class SynapseConfig:
    """The options of Synapse that concern calls.

    Attributes:
        files: the configuration files.
        server_name: the homeserver's name.
        public_baseurl: where clients reach it, without a slash at the end.
        has_public_baseurl: whether it is set; otherwise Synapse derives it from the server name.
        has_delayed_events: whether users may schedule delayed events.
        max_event_delay_ms: the longest delay of a delayed event, in milliseconds; None if users may
            schedule none.
        has_msc4222: whether `state_after` in /sync (MSC4222) is on.
        rc_message: the rate limit of messages.
        rc_delayed_event_mgmt: the rate limit of restarting, sending and cancelling delayed events.
        transports: the entries of `rtc/transports`.
        foci: the list of services in `.well-known/matrix/client`; None if it is not set.
        instance: the name of the process that this configuration is for.
        listeners: of the process that this configuration is for.
        workers: where other processes listen for replication, by name.
        whitelist: servers that federation is restricted to, None if it is not restricted.
        claims: files of application services and the path prefixes (MSC4512) that they claim.
    """

    files: tuple[str, ...]
    server_name: str
    public_baseurl: str
    has_public_baseurl: bool
    has_delayed_events: bool
    max_event_delay_ms: int | None
    has_msc4222: bool
    rc_message: RatelimitSettings
    rc_delayed_event_mgmt: RatelimitSettings
    transports: Sequence[Any]
    foci: Any
    instance: str
    listeners: tuple[Listener, ...]
    workers: Mapping[str, str]
    whitelist: frozenset[str] | None
    claims: Mapping[str, str]


def parse_duration(value: str | int) -> int:
    """A duration in milliseconds, from a number or a text such as `10s`.

    Raises:
        TypeError, ValueError: if it is neither.
    """
    return Config.parse_duration(value)


def load_config(files: Sequence[str]) -> HomeServerConfig:
    """Reads configuration files as Synapse does.

    Raises:
        synapse.module_api.errors.ConfigError: if Synapse rejects an option.
        Exception: Synapse reads some values without checking their type.
    """
    return HomeServerConfig.load_config("check", [part for name in files for part in ("-c", name)])


def relevant_options(config: HomeServerConfig) -> SynapseConfig:
    """The options that concern calls.

    Raises:
        Exception: if this Synapse has other names for them.
    """
    server, worker = config.server, config.worker
    listeners = worker.worker_listeners if worker.worker_app else server.listeners
    whitelist = config.federation.federation_domain_whitelist
    return SynapseConfig(
        files=tuple(config.config_files) or ("homeserver.yaml",),
        server_name=server.server_name,
        public_baseurl=(server.public_baseurl or "").rstrip("/"),
        # Synapse serves `.well-known` if, and only if, public_baseurl is set.
        has_public_baseurl=server.serve_client_wellknown,
        has_delayed_events=has_delayed_events(config),
        max_event_delay_ms=max_event_delay_ms(config),
        has_msc4222=bool(getattr(config.experimental, "msc4222_enabled", True)),
        rc_message=config.ratelimiting.rc_message,
        rc_delayed_event_mgmt=config.ratelimiting.rc_delayed_event_mgmt,
        transports=list(config.matrix_rtc.transports),
        foci=_foci(server.extra_well_known_client_content),
        instance=worker.instance_name,
        listeners=tuple(filter(None, map(_listener, listeners))),
        # Synapse renames the main process in the configuration of workers only.
        workers={
            MAIN if name == "main" else name: _location(at)
            for name, at in worker.instance_map.items()
        },
        whitelist=None if whitelist is None else frozenset(whitelist),
        claims=_claims(config),
    )


def _foci(content: Mapping[str, Any]) -> Any:
    """The entries in homeserver.yaml; None if the option is not set.

    Synapse serves an empty option as null, which names no LiveKit.
    """
    entries = content.get(FOCI)
    return "" if entries is None and FOCI in content else entries


def _listener(listener: Any) -> Listener | None:
    if listener.type != "http" or listener.http_options is None:
        return None
    options = listener.http_options
    names = tuple(name for resource in options.resources for name in resource.names)
    if hasattr(listener, "path"):
        return Listener(_socket_url(listener.path), names, options.x_forwarded)
    host = (listener.bind_addresses or ["127.0.0.1"])[0]
    host = {"::": "127.0.0.1", "0.0.0.0": "127.0.0.1"}.get(host, host)  # noqa: S104
    scheme = "https" if listener.tls else "http"
    return Listener(_url(scheme, host, listener.port), names, options.x_forwarded)


def _location(at: Any) -> str:
    if hasattr(at, "path"):
        return _socket_url(at.path)
    return _url("https" if at.tls else "http", at.host, at.port)


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _socket_url(path: str) -> str:
    return f"http://{quote(path, safe='')}"


def _claims(config: HomeServerConfig) -> dict[str, str]:
    claims: dict[str, str] = {}
    # Older versions of Synapse do not have this option.
    if not getattr(config.experimental, "msc4512_enabled", False):
        return claims
    for name in config.appservice.app_service_config_files:
        with open(name) as file:
            prefix = yaml.safe_load(file).get("io.element.msc4512.proxy_prefix")
        if prefix:
            claims[name] = prefix
    return claims
