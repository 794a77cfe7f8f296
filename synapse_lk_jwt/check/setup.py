# SPDX-License-Identifier: Apache-2.0
"""What the checks need to know of Synapse's configuration: the only file that looks into it."""

import contextlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import attr
import yaml
from synapse.module_api.errors import ConfigError

from synapse_lk_jwt.check.report import Finding, wrong
from synapse_lk_jwt.compat.config import HomeServerConfig, find_config_files, read_config_files
from synapse_lk_jwt.compat.delayed_events import has_delayed_events
from synapse_lk_jwt.compat.forward_proxy import ForwardProxy, forward_proxy
from synapse_lk_jwt.compat.rate_limits import RatelimitSettings
from synapse_lk_jwt.config import LiveKitJwtConfig, parse_config
from synapse_lk_jwt.discovery import destination, livekit_transports, transports
from synapse_lk_jwt.identifiers import is_same_url

MODULE = "synapse_lk_jwt.LiveKitJwtModule"
FOCI = "org.matrix.msc4143.rtc_foci"
MAIN = "master"

PUBLIC_BASEURL = "public_baseurl: https://matrix.example.com/    # where clients reach Synapse"

_BLOCK = (
    "modules:",
    f"  - module: {MODULE}",
    "    config:",
    "      livekit_url: wss://sfu.example.com",
    "      livekit_key: APIxxxx",
    "      livekit_secret_path: /etc/matrix-synapse/livekit_secret",
)


class CannotRun(Exception):
    """There is nothing to check. The text says why."""


class NoModule(Exception):
    """The module is not in the configuration, or refuses its own.

    Attributes:
        finding: what to write.
    """

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.text)
        self.finding = finding


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Listener:
    """Where a process can be asked over HTTP.

    Attributes:
        url: its address from this machine.
        resources: what Synapse serves there.
    """

    url: str
    resources: tuple[str, ...]


@attr.s(auto_attribs=True, frozen=True, slots=True, kw_only=True)
class Setup:
    """A homeserver as its configuration has it.

    Attributes:
        module: the module's own configuration.
        files: Synapse's configuration files.
        file_of: the file that has a top-level key, of those that are in any.
        server_name: the homeserver's name.
        public_baseurl: where clients reach it, without a slash at the end.
        has_public_baseurl: whether that was set, or made up from the server name.
        has_delayed_events: whether users may schedule delayed events.
        rc_message: the rate limit of messages.
        rc_delayed_event_mgmt: the rate limit of restarting, sending and cancelling delayed events.
        transports: `rtc/transports` without what the module adds.
        foci: the same for `.well-known/matrix/client`; None if there is none.
        instance: the name of the process that this configuration is for.
        background: the name of the process that runs background tasks.
        listeners: of the process that this configuration is for.
        workers: where other processes listen for replication, by name.
        whitelist: servers that federation is restricted to, None if to none.
        claims: files of application services and the path prefixes (MSC4512) that they claim.
        times_loaded: how often the module is listed.
        livekit_proxy: the forward proxy on Synapse's way to LiveKit, None if there is none.
    """

    module: LiveKitJwtConfig
    files: tuple[str, ...]
    file_of: Mapping[str, str]
    server_name: str
    public_baseurl: str
    has_public_baseurl: bool
    has_delayed_events: bool
    rc_message: RatelimitSettings
    rc_delayed_event_mgmt: RatelimitSettings
    transports: Sequence[Any]
    foci: Any
    instance: str
    background: str
    listeners: tuple[Listener, ...]
    workers: Mapping[str, str]
    whitelist: frozenset[str] | None
    claims: Mapping[str, str]
    times_loaded: int
    livekit_proxy: ForwardProxy | None = None

    @property
    def service_url(self) -> str:
        """Where clients are told that the service endpoints are."""
        return self.module.service_url_at(self.public_baseurl)

    def announced(self, *, has_msc4195: bool = True) -> list[Mapping[str, Any]]:
        """The LiveKits that `rtc/transports` names: the admin's entries, else the module's.

        Args:
            has_msc4195: whether MSC4195's homeserver endpoints are served.
        """
        module = self.module
        advertise = module.advertise.where_served(has_msc4195)
        return livekit_transports(list(self.transports)) or [
            *transports(advertise, module.livekit_url, self.service_url)
        ]

    def is_among(self, entries: Iterable[Mapping[str, Any]]) -> bool:
        """Whether one of the entries sends clients to this module."""
        own = (self.service_url, self.module.livekit_url.rstrip("/"))
        places = [destination(entry).rstrip("/") for entry in entries]
        return any(is_same_url(place, url) for place in places for url in own)

    def file(self, key: str) -> str:
        """The file to write a top-level key to."""
        return self.file_of.get(key, self.files[0])

    @property
    def block(self) -> str:
        """Where to write a key of the module."""
        return f"{self.file('modules')}, below 'config:' of the module"


def read(paths: Sequence[str]) -> Setup:
    """Reads Synapse's configuration as Synapse does.

    Args:
        paths: files, and directories of `.yaml` files; later ones win.

    Raises:
        CannotRun: if Synapse could not start with it, for reasons of its own.
        NoModule: if the module is missing, or its configuration is wrong.
    """
    try:
        # Synapse prints which files it ignores, and that is no part of the report.
        with contextlib.redirect_stdout(sys.stderr):
            files = find_config_files(list(paths))
            file_of = {key: name for name in files for key in _keys(name)}
            raw = read_config_files(files)
            module = _read_module(raw, file_of.get("modules", files[0]))
            arguments = [part for name in files for part in ("-c", name)]
            config = HomeServerConfig.load_config("check", arguments)
            setup = from_synapse(config, module, raw, file_of)
    except (CannotRun, NoModule):
        raise
    except ConfigError as e:
        # The text can quote the value, and that may be a secret.
        if e.path:
            raise CannotRun(
                f"Synapse does not start with {'.'.join(map(str, e.path))}; what it prints when it"
                " is started says more"
            ) from None
        raise CannotRun(e.msg) from None
    except PermissionError as e:
        raise CannotRun(
            f"{e.filename!r} cannot be read: run this as the user that Synapse runs as"
        ) from None
    except OSError as e:
        raise CannotRun(f"{e.filename!r} cannot be read ({e.strerror})") from None
    except Exception as e:
        # Synapse looks at some values without expecting anything wrong. The error may quote one.
        raise CannotRun(
            f"Synapse does not start with this configuration ({type(e).__name__}); what it prints"
            " when it is started says more"
        ) from None
    # As they were named on the command line: Synapse makes their paths absolute.
    return attr.evolve(setup, files=tuple(files))


def from_synapse(
    config: Any,
    module: LiveKitJwtConfig,
    raw: Mapping[str, Any] | None = None,
    file_of: Mapping[str, str] | None = None,
) -> Setup:
    """What is in Synapse's own configuration object.

    Args:
        config: the `HomeServerConfig`.
        module: the module's part.
        raw: the files, as one mapping; not to be had in a running Synapse.
        file_of: the file that has a top-level key.
    """
    raw = raw or {}
    server, worker = config.server, config.worker
    listeners = worker.worker_listeners if worker.worker_app else server.listeners
    whitelist = config.federation.federation_domain_whitelist
    return Setup(
        module=module,
        files=tuple(config.config_files) or ("homeserver.yaml",),
        file_of=file_of or {},
        server_name=server.server_name,
        public_baseurl=server.public_baseurl.rstrip("/"),
        # Synapse serves `.well-known` if, and only if, it was told where it is.
        has_public_baseurl=server.serve_client_wellknown,
        has_delayed_events=has_delayed_events(config),
        rc_message=config.ratelimiting.rc_message,
        rc_delayed_event_mgmt=config.ratelimiting.rc_delayed_event_mgmt,
        transports=list(config.matrix_rtc.transports),
        foci=server.extra_well_known_client_content.get(FOCI),
        instance=worker.instance_name,
        background=raw.get("run_background_tasks_on") or MAIN,
        listeners=tuple(filter(None, map(_listener, listeners))),
        # Synapse gives the main process its name in workers only.
        workers={
            MAIN if name == "main" else name: _location(at)
            for name, at in worker.instance_map.items()
        },
        whitelist=None if whitelist is None else frozenset(whitelist),
        claims=_claims(config),
        times_loaded=len(_blocks(raw)),
        livekit_proxy=forward_proxy(config, module.livekit_internal_url),
    )


def _keys(name: str) -> list[str]:
    """The top-level keys of a file."""
    try:
        with open(name) as file:
            content = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        # The error can quote what is there, and that may be a secret.
        mark = getattr(e, "problem_mark", None)
        where = f": see line {mark.line + 1}" if mark else ""
        raise CannotRun(f"{name!r} is not YAML{where}") from None
    return list(content) if isinstance(content, dict) else []


def _blocks(raw: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    modules = raw.get("modules")
    return [
        block
        for block in (modules if isinstance(modules, list) else [])
        if isinstance(block, dict) and str(block.get("module", "")).startswith("synapse_lk_jwt.")
    ]


def _read_module(raw: Mapping[str, Any], file: str) -> LiveKitJwtConfig:
    blocks = _blocks(raw)
    if not blocks:
        text = "is not in the configuration, so that Synapse does not load it"
        raise NoModule(wrong("module", text, file, *_BLOCK))
    try:
        return parse_config(blocks[0].get("config") or {})
    except ConfigError as e:
        hint = "" if blocks[0].get("config") else " (the environment of this command counts)"
        text = f"Synapse does not start with this configuration{hint}: {e.msg}"
        raise NoModule(wrong("module", text, file)) from None


def _listener(listener: Any) -> Listener | None:
    if listener.type != "http" or listener.http_options is None:
        return None
    names = [name for resource in listener.http_options.resources for name in resource.names]
    if hasattr(listener, "path"):
        return Listener(_socket_url(listener.path), tuple(names))
    host = (listener.bind_addresses or ["127.0.0.1"])[0]
    host = {"::": "127.0.0.1", "0.0.0.0": "127.0.0.1"}.get(host, host)  # noqa: S104
    scheme = "https" if listener.tls else "http"
    return Listener(_url(scheme, host, listener.port), tuple(names))


def _location(at: Any) -> str:
    if hasattr(at, "path"):
        return _socket_url(at.path)
    return _url("https" if at.tls else "http", at.host, at.port)


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _socket_url(path: str) -> str:
    return f"http://{quote(path, safe='')}"


def _claims(config: Any) -> dict[str, str]:
    claims: dict[str, str] = {}
    # Older Synapses do not know it.
    if not getattr(config.experimental, "msc4512_enabled", False):
        return claims
    for name in config.appservice.app_service_config_files:
        with open(name) as file:
            prefix = yaml.safe_load(file).get("io.element.msc4512.proxy_prefix")
        if prefix:
            claims[name] = prefix
    return claims
