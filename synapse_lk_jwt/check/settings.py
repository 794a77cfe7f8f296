# SPDX-License-Identifier: Apache-2.0
"""Checks that need only the configuration."""

import os
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

import yaml

from synapse_lk_jwt.check.livekit import is_loopback
from synapse_lk_jwt.check.report import Finding, ok, warning, wrong
from synapse_lk_jwt.check.setup import MODULE, Setup
from synapse_lk_jwt.compat.config import MAIN
from synapse_lk_jwt.compat.rate_limits import RatelimitSettings
from synapse_lk_jwt.compat.self_test import describe, missing_in_installed_synapse
from synapse_lk_jwt.discovery import FOCI, Advertise, destination, livekit_transports, transports
from synapse_lk_jwt.identifiers import is_server_name, path_prefixes_overlap
from synapse_lk_jwt.msc4195 import PATH_PREFIX

# Element Call's guide for homeservers recommends these: events per second, and burst.
RATES = {"rc_message": (0.5, 30), "rc_delayed_event_mgmt": (1, 20)}

# Element Call requests delays of up to this time for leaves that it delegates.
NEEDED_DELAY_MS = 3_600_000

# Examples in the documentation that an admin must replace by other values.
_PLACEHOLDER_KEY = re.compile(r"API[xX]+")
_PLACEHOLDER_HOST = re.compile(r"(.+\.)?example\.(com|org|net)")
_LIVEKIT_URLS = ("livekit_url", "livekit_internal_url")


def check(setup: Setup) -> Iterator[Finding]:
    """All findings about the configuration."""
    for text in setup.module.warnings:
        yield warning("module", text.rstrip("."))
    yield from _hooks()
    yield from _duplicates(setup)
    yield from _credentials(setup)
    yield from _delayed_events(setup)
    yield from _rates(setup)
    yield from _msc4222(setup)
    yield from _public_baseurl(setup)
    yield from _x_forwarded(setup)
    yield from _livekit_url(setup)
    yield from _transports(setup)
    yield from _foci(setup)
    yield from _routes(setup)
    yield from _full_access(setup)
    yield from _federation(setup)


def _hooks() -> Iterator[Finding]:
    missing = missing_in_installed_synapse()
    for feature, hooks in missing.items():
        yield wrong(
            "Synapse",
            describe(feature, hooks),
            "the environment that Synapse is installed in",
            "pip install --upgrade matrix-synapse synapse-lk-jwt",
        )
    if not missing:
        yield ok("Synapse", "provides everything that the module needs")


def _duplicates(setup: Setup) -> Iterator[Finding]:
    for file, options in setup.duplicate_options.items():
        for option in options:
            yield wrong(
                "options",
                f"{option} is set more than once, in one file or in different files. Synapse uses"
                " only the last one",
                file,
                f"# merge them into one '{option}:'",
            )


def _credentials(setup: Setup) -> Iterator[Finding]:
    """Examples from the documentation, and files that every user of the machine can read."""
    module = setup.module
    placeholders = []
    if _PLACEHOLDER_KEY.fullmatch(module.livekit_key):
        placeholders.append(f"livekit_key: {module.livekit_key}")
    hosts = {o: urlsplit(getattr(module, o)).hostname or "" for o in _LIVEKIT_URLS}
    # The module derives livekit_internal_url from livekit_url, with its host, unless it is set.
    if hosts["livekit_internal_url"] == hosts["livekit_url"]:
        del hosts["livekit_internal_url"]
    for option, host in hosts.items():
        if _PLACEHOLDER_HOST.fullmatch(host):
            placeholders.append(f"{option}: {getattr(module, option)}")
    if placeholders:
        verb, values = ("are", "values") if placeholders[1:] else ("is", "value")
        yield wrong(
            "placeholders",
            f"{' and '.join(placeholders)} {verb} from the examples in the documentation. Write"
            f" your own {values}",
            setup.block,
        )
    for name in setup.credentials.files:
        try:
            is_public = bool(os.stat(name).st_mode & 0o004)
        except OSError:
            continue
        if is_public:
            yield warning(
                "secret file",
                f"every user of this machine can read {name}, which holds LiveKit's credentials",
                "the command line",
                f"chmod o= {name}",
            )


def _delayed_events(setup: Setup) -> Iterator[Finding]:
    option = "max_event_delay_duration"
    line = f"{option}: 24h"
    delay_ms = setup.max_event_delay_ms
    if not setup.has_delayed_events:
        yield wrong(
            "delayed events",
            "are off. A participant who loses the connection stays listed in the call",
            setup.file(option),
            line,
        )
    elif delay_ms is not None and delay_ms < NEEDED_DELAY_MS:
        yield wrong(
            "delayed events",
            f"may be delayed by at most {delay_ms / 1000:g} seconds, but clients request up to an"
            f" hour. In {option}, a bare number counts milliseconds",
            setup.file(option),
            line,
        )
    else:
        yield ok("delayed events", "are on")


def _rates(setup: Setup) -> Iterator[Finding]:
    limits: dict[str, RatelimitSettings] = {
        "rc_message": setup.rc_message,
        "rc_delayed_event_mgmt": setup.rc_delayed_event_mgmt,
    }
    is_all_well = True
    for option, limit in limits.items():
        per_second, burst_count = RATES[option]
        if limit.per_second < per_second or limit.burst_count < burst_count:
            is_all_well = False
            yield warning(
                "rate limits",
                f"{option} of {limit.per_second:g}/s, burst {limit.burst_count:g}, is too low."
                " Clients will be rate-limited during calls",
                setup.file(option),
                f"{option}:",
                # A value that is high enough stays.
                f"  per_second: {max(per_second, limit.per_second):g}",
                f"  burst_count: {max(burst_count, limit.burst_count):g}",
            )
    if is_all_well:
        yield ok("rate limits", "are high enough for a call")


def _msc4222(setup: Setup) -> Iterator[Finding]:
    if setup.has_msc4222:
        yield ok("MSC4222", "is on")
        return
    option, line = "experimental_features", "  msc4222_enabled: true"
    text = "is off. Element Call uses it to see changes of the room's state reliably"
    if option in setup.file_of:
        yield warning("MSC4222", text, f"{setup.file(option)}, below '{option}:'", line)
    else:
        yield warning("MSC4222", text, setup.file(option), f"{option}:", line)


def _public_baseurl(setup: Setup) -> Iterator[Finding]:
    file = setup.file("public_baseurl")
    if setup.has_public_baseurl:
        yield ok("public_baseurl", f"is {setup.public_baseurl}/")
    elif setup.module.service_url is None:
        text = (
            f"is not set. Synapse derives {setup.service_url} from the server name, which may be"
            " wrong, and serves no .well-known"
        )
        yield wrong("public_baseurl", text, file, setup.public_baseurl_line)
    else:
        text = "is not set, so Synapse serves no .well-known. Clients use service_url"
        yield warning("public_baseurl", text, file, setup.public_baseurl_line)


def _x_forwarded(setup: Setup) -> Iterator[Finding]:
    """Whether Synapse sees the addresses of clients behind a proxy that terminates TLS."""
    if not setup.public_baseurl.startswith("https:"):
        return
    blind = [
        listener
        for listener in setup.listeners
        if "client" in listener.resources
        and listener.url.startswith("http:")
        and not listener.x_forwarded
    ]
    if blind:
        yield warning(
            "x_forwarded",
            f"is off for the listener at {blind[0].url}. Behind a reverse proxy all clients have"
            " its address, and share one rate limit",
            setup.file("listeners"),
            f"    x_forwarded: true    # in the listener at {blind[0].url}",
        )


def _livekit_url(setup: Setup) -> Iterator[Finding]:
    url = setup.module.livekit_url
    if not url.startswith("ws://"):
        return
    rest = url.removeprefix("ws://")
    line = f"livekit_url: wss://{rest}    # with TLS in front of LiveKit"
    if setup.service_url.startswith("https://"):
        text = f"is {url}. Browsers block it on a page that was loaded over https"
        yield wrong("livekit_url", text, setup.block, line)
    elif not is_loopback(url):
        yield warning("livekit_url", f"is {url}, without encryption", setup.block, line)


def _transports(setup: Setup) -> Iterator[Finding]:
    """Whether `rtc/transports` names this module."""
    ours = setup.service_url
    advertise, url = setup.module.advertise, setup.module.livekit_url
    announced = setup.announced()
    named = " and ".join(dict.fromkeys(map(destination, announced)))
    if not announced:
        yield wrong(
            "rtc/transports",
            "is empty: advertise is off, and matrix_rtc names no LiveKit. Clients say that calls"
            " are not supported",
            setup.block,
            "advertise: service",
        )
    elif not setup.is_among(announced):
        yield wrong(
            "rtc/transports",
            f"names {named}, which matrix_rtc in homeserver.yaml sets, and not this module"
            f" ({ours})",
            setup.file("matrix_rtc"),
            *_without_livekit(setup),
        )
    elif any("livekit_service_url" in e and "url" in e for e in announced):
        yield warning(
            "rtc/transports",
            "has an entry in homeserver.yaml with both url and livekit_service_url. Some clients"
            " use url and others livekit_service_url, and these do not see each other in a call",
            setup.file("matrix_rtc"),
            *_without_livekit(setup),
        )
    elif advertise.names_msc4195 and any(
        entry not in announced for entry in transports(advertise, url, ours)
    ):
        yield warning(
            "rtc/transports",
            f"names {named}, from homeserver.yaml, so advertise: {advertise.value} has no effect",
            setup.file("matrix_rtc"),
            *_without_livekit(setup),
        )
    else:
        yield ok("rtc/transports", f"names {named}")


def _without_livekit(setup: Setup) -> list[str]:
    """The option `matrix_rtc` without its LiveKits, so that the module adds its own entry."""
    livekits = livekit_transports(list(setup.transports))
    others = [entry for entry in setup.transports if entry not in livekits]
    text: str = yaml.safe_dump({"matrix_rtc": {"transports": others}}, sort_keys=False)
    return text.splitlines()


def _foci(setup: Setup) -> Iterator[Finding]:
    """Whether `.well-known/matrix/client` names this module, if homeserver.yaml sets it."""
    if setup.foci is None:
        return
    advertise, ours = setup.module.advertise, setup.service_url
    foci = [destination(e).rstrip("/") for e in livekit_transports(setup.foci)]
    # The module adds itself to a list that names no LiveKit, unless advertise is off.
    is_added_to = advertise is not Advertise.OFF and isinstance(setup.foci, list) and not foci
    if ours not in foci and not is_added_to:
        yield wrong(
            ".well-known",
            f"{FOCI} in homeserver.yaml names {' and '.join(foci) or 'no LiveKit'}, and not this"
            f" module ({ours})",
            f"{setup.file('extra_well_known_client_content')}, below"
            " 'extra_well_known_client_content:'",
            f"  {FOCI}:",
            "    - type: livekit",
            f"      livekit_service_url: {ours}",
        )


def _routes(setup: Setup) -> Iterator[Finding]:
    is_free = True
    for file, prefix in setup.claims.items():
        if path_prefixes_overlap(PATH_PREFIX, prefix):
            is_free = False
            yield wrong(
                "routes",
                f"an application service claims {prefix!r} (MSC4512), so the module cannot serve"
                " MSC4195's endpoints",
                file,
                f"# remove: io.element.msc4512.proxy_prefix: {prefix}",
            )
    if setup.times_loaded > 1:
        is_free = False
        yield wrong(
            "routes",
            f"the module is listed {setup.times_loaded} times. One copy serves requests, and all"
            " run background jobs",
            setup.file("modules"),
            f"# keep one of the {setup.times_loaded} blocks '- module: {MODULE}'",
        )
    if is_free:
        yield ok("routes", "are the module's own: no other part of the configuration claims them")


def _full_access(setup: Setup) -> Iterator[Finding]:
    servers = setup.module.full_access_homeservers
    strange = [
        entry
        for entry in servers.entries
        # A glob can match a valid name if that name has letters in place of `*` and `?`.
        if not servers.has_all and not is_server_name(entry.translate(_GLOB))
    ]
    if strange:
        yield warning(
            "full access",
            f"{' and '.join(map(repr, strange))} cannot be a server name, so the entry has no"
            " effect",
            setup.block,
            f"full_access_homeservers: {[e for e in servers.entries if e not in strange]}",
        )
    # This homeserver's own users always have full access, listed or not.
    others = [e for e in servers.entries if e.lower() != setup.server_name.lower()]
    if servers.has_all:
        text = "users of every homeserver may start calls"
    elif others:
        text = f"your users and those of {', '.join(others)} may start calls"
    else:
        text = "only your users may start calls"
    yield ok("full access", text)


_GLOB = str.maketrans("*?", "aa")


def _federation(setup: Setup) -> Iterator[Finding]:
    servers = setup.module.full_access_homeservers
    named = [entry for entry in servers.entries if entry.lower() != setup.server_name.lower()]
    if not named:
        return
    # Without an explicit server name, an admin may run calls without federation on purpose.
    finding = warning if servers.has_all else wrong
    problems = [
        finding("federation", text, *place)
        for text, *place in (*_whitelist(setup, named), *_federation_listener(setup, named))
    ]
    yield from problems or [ok("federation", "is on")]


def _whitelist(setup: Setup, named: list[str]) -> Iterator[tuple[str, ...]]:
    """Why listed servers are shut out: a text, the file and the lines."""
    if setup.whitelist is None:
        return
    shut_out = [
        entry
        for entry in named
        if not any(c in entry for c in "*?") and entry not in setup.whitelist
    ]
    if shut_out or not setup.whitelist - {setup.server_name}:
        yield (
            "federation_domain_whitelist excludes servers of full_access_homeservers:"
            f" {', '.join(shut_out or named)}. The module cannot verify their users",
            setup.file("federation_domain_whitelist"),
            "federation_domain_whitelist:",
            *(f"  - {name}" for name in [*sorted(setup.whitelist), *shut_out]),
            *([] if shut_out else ["  - example.org    # whose users may join your calls"]),
        )


def _federation_listener(setup: Setup, named: list[str]) -> Iterator[tuple[str, ...]]:
    """Why other servers cannot send requests to this one: a text, the file and the lines."""
    resources = {name for listener in setup.listeners for name in listener.resources}
    # A worker may have these resources, and needs no entry in `instance_map` for them.
    if "federation" in resources or setup.instance != MAIN or len(setup.workers) > 1:
        return
    missing = "federation" if "openid" in resources else "federation and openid"
    yield (
        f"no listener has {missing}, so {', '.join(named)} can neither request tokens nor verify"
        " your users",
        setup.file("listeners"),
        "listeners:    # add this one to the list",
        "  - port: 8448    # or the one that your reverse proxy forwards to",
        "    type: http",
        "    resources:",
        "      - names: [federation, openid]",
    )
