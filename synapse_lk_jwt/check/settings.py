# SPDX-License-Identifier: Apache-2.0
"""What can be told from the configuration alone."""

from collections.abc import Iterator
from urllib.parse import urlsplit

from synapse_lk_jwt.check.report import Finding, ok, warning, wrong
from synapse_lk_jwt.check.setup import FOCI, MAIN, MODULE, PUBLIC_BASEURL, Setup
from synapse_lk_jwt.compat.rate_limits import RatelimitSettings
from synapse_lk_jwt.compat.self_test import describe, missing_in_installed_synapse
from synapse_lk_jwt.discovery import Advertise, destination, livekit_transports, transports
from synapse_lk_jwt.identifiers import is_server_name, path_prefixes_overlap
from synapse_lk_jwt.msc4195 import PATH_PREFIX

# Element Call's own guide for homeservers has these: events a second, and at once.
RATES = {"rc_message": (0.5, 30), "rc_delayed_event_mgmt": (1, 20)}


def check(setup: Setup) -> Iterator[Finding]:
    """All findings about the configuration."""
    for text in setup.module.warnings:
        yield warning("module", text.rstrip("."))
    yield from _hooks()
    yield from _delayed_events(setup)
    yield from _rates(setup)
    yield from _public_baseurl(setup)
    yield from _livekit_url(setup)
    yield from _discovery(setup)
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
        yield ok("Synapse", "has the classes and methods that the module uses")


def _delayed_events(setup: Setup) -> Iterator[Finding]:
    if setup.has_delayed_events:
        yield ok("delayed events", "are on")
    else:
        yield wrong(
            "delayed events",
            "are off: whoever loses the network stays in the call as a ghost",
            setup.file("max_event_delay_duration"),
            "max_event_delay_duration: 24h",
        )


def _rates(setup: Setup) -> Iterator[Finding]:
    limits: dict[str, RatelimitSettings] = {
        "rc_message": setup.rc_message,
        "rc_delayed_event_mgmt": setup.rc_delayed_event_mgmt,
    }
    is_all_well = True
    for key, limit in limits.items():
        per_second, burst_count = RATES[key]
        if limit.per_second < per_second or limit.burst_count < burst_count:
            is_all_well = False
            yield warning(
                "rate limits",
                f"{key} lets a client do {limit.per_second:g} a second and {limit.burst_count:g}"
                " at once, which a normal call goes beyond: it then hangs, or ends",
                setup.file(key),
                f"{key}:",
                f"  per_second: {per_second}",
                f"  burst_count: {burst_count}",
            )
    if is_all_well:
        yield ok("rate limits", "leave room for a call")


def _public_baseurl(setup: Setup) -> Iterator[Finding]:
    file = setup.file("public_baseurl")
    if setup.has_public_baseurl:
        yield ok("public_baseurl", f"is {setup.public_baseurl}/")
    elif setup.module.service_url is None:
        text = (
            f"is not set: clients are sent to {setup.service_url}, which is made up from the"
            " server name, and Synapse serves no .well-known"
        )
        yield wrong("public_baseurl", text, file, PUBLIC_BASEURL)
    else:
        text = "is not set, so that Synapse serves no .well-known; service_url is"
        yield warning("public_baseurl", text, file, PUBLIC_BASEURL)


def _livekit_url(setup: Setup) -> Iterator[Finding]:
    url = setup.module.livekit_url
    if not url.startswith("ws://"):
        return
    rest = url.removeprefix("ws://")
    line = f"livekit_url: wss://{rest}    # with TLS in front of LiveKit"
    if setup.service_url.startswith("https://"):
        yield wrong(
            "livekit_url",
            f"is {url}: a page that came over https may not connect to it",
            setup.block,
            line,
        )
    elif urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1"):
        yield warning("livekit_url", f"is {url}, without encryption", setup.block, line)


def _discovery(setup: Setup) -> Iterator[Finding]:
    ours = setup.service_url
    entry = [
        "- type: livekit",
        f"  livekit_service_url: {ours}",
    ]
    advertise, url = setup.module.advertise, setup.module.livekit_url
    announced = setup.announced()
    named = " and ".join(dict.fromkeys(map(destination, announced)))
    if not announced:
        yield wrong(
            "rtc/transports",
            "is empty: advertise is off, and matrix_rtc names nothing; clients say that calls are"
            " not supported",
            setup.block,
            "advertise: service",
        )
    elif not setup.is_among(announced):
        yield wrong(
            "rtc/transports",
            f"names {named}, which was set by hand, and not this module ({ours})",
            setup.file("matrix_rtc"),
            "matrix_rtc:",
            "  transports: []    # or without the key: the module adds itself",
        )
    elif any("livekit_service_url" in e and "url" in e for e in announced):
        yield warning(
            "rtc/transports",
            "has an entry in homeserver.yaml with url beside livekit_service_url. Some clients use"
            " the one and some the other, and these do not see each other in a call",
            setup.file("matrix_rtc"),
            "matrix_rtc:",
            "  transports: []    # or without the key: the module adds itself",
        )
    elif advertise.names_msc4195 and any(
        entry not in announced for entry in transports(advertise, url, ours)
    ):
        yield warning(
            "rtc/transports",
            f"names {named}, from homeserver.yaml, so that advertise: {advertise.value} has no"
            " effect",
            setup.file("matrix_rtc"),
            "matrix_rtc:",
            "  transports: []    # or without the key: the module adds itself",
        )
    else:
        yield ok("rtc/transports", f"names {named}")
    if setup.foci is not None:
        foci = [destination(e).rstrip("/") for e in livekit_transports(setup.foci)]
        # The module adds itself to a list that names no LiveKit, unless that is not wanted.
        is_added_to = advertise is not Advertise.OFF and isinstance(setup.foci, list) and not foci
        if ours not in foci and not is_added_to:
            yield wrong(
                ".well-known",
                f"{FOCI} names {' and '.join(foci) or 'no LiveKit'}, which was set by hand, and not"
                f" this module ({ours})",
                setup.file("extra_well_known_client_content"),
                "extra_well_known_client_content:",
                f"  {FOCI}:",
                *(f"    {line}" for line in entry),
            )


def _routes(setup: Setup) -> Iterator[Finding]:
    is_free = True
    for file, prefix in setup.claims.items():
        if path_prefixes_overlap(PATH_PREFIX, prefix):
            is_free = False
            yield wrong(
                "routes",
                f"an application service claims {prefix!r} (MSC4512), so that MSC4195's endpoints"
                " are not served by the module",
                file,
                f"# remove: io.element.msc4512.proxy_prefix: {prefix}",
            )
    if setup.times_loaded > 1:
        is_free = False
        yield wrong(
            "routes",
            f"the module is listed {setup.times_loaded} times: one of them answers, and all act",
            setup.file("modules"),
            f"# keep one of the {setup.times_loaded} blocks '- module: {MODULE}'",
        )
    if is_free:
        yield ok("routes", "nobody else claims them in the configuration")


def _full_access(setup: Setup) -> Iterator[Finding]:
    servers = setup.module.full_access_homeservers
    file = setup.block
    strange = [
        entry
        for entry in servers.entries
        # A glob can stand for something valid if a letter in its place does.
        if not servers.is_everyone and not is_server_name(entry.translate(_GLOB))
    ]
    if strange:
        yield warning(
            "full access",
            f"no server can be called {' or '.join(map(repr, strange))}: the entry is without"
            " effect",
            file,
            "full_access_homeservers: ['example.org', '*.example.com', 'example.net:8448']",
        )
    own = [e for e in servers.entries if e.lower() == setup.server_name.lower()]
    if own:
        others = [entry for entry in servers.entries if entry not in own]
        yield warning(
            "full access",
            f"{own[0]!r} is this homeserver, whose users have full access always",
            file,
            f"full_access_homeservers: {others}",
        )
    if servers.is_everyone:
        text = "users of every homeserver may start calls"
    elif servers.entries:
        text = f"your users and those of {', '.join(servers.entries)} may start calls"
    else:
        text = "your users alone may start calls"
    yield ok("full access", text)


_GLOB = str.maketrans("*?", "aa")


def _federation(setup: Setup) -> Iterator[Finding]:
    servers = setup.module.full_access_homeservers
    named = [entry for entry in servers.entries if entry.lower() != setup.server_name.lower()]
    if not named:
        return
    finding = warning if servers.is_everyone else wrong
    who = "others'" if servers.is_everyone else f"{', '.join(named)}'s"
    is_well = True
    if setup.whitelist is not None:
        shut_out = [
            entry
            for entry in named
            if not any(c in entry for c in "*?") and entry not in setup.whitelist
        ]
        if not setup.whitelist - {setup.server_name} or shut_out:
            is_well = False
            whose = f"{', '.join(shut_out)}'s" if shut_out else who
            yield finding(
                "federation",
                f"is restricted by federation_domain_whitelist: {whose} users are on the"
                " full-access list and cannot be verified",
                setup.file("federation_domain_whitelist"),
                "federation_domain_whitelist:",
                *(f"  - {name}" for name in [*sorted(setup.whitelist), *shut_out]),
                *([] if shut_out else ["  - example.org    # whose users may call yours"]),
            )
    resources = {name for listener in setup.listeners for name in listener.resources}
    # Workers, which may have them, need not be in `instance_map`.
    if "federation" not in resources and setup.instance == MAIN and len(setup.workers) < 2:
        is_well = False
        missing = "federation" if "openid" in resources else "federation and openid"
        yield finding(
            "federation",
            f"no listener has {missing}: {who} homeservers cannot ask for tokens, nor for who your"
            " users are",
            setup.file("listeners"),
            "listeners:",
            "  - port: 8448    # or the one that your reverse proxy forwards to",
            "    type: http",
            "    resources:",
            "      - names: [federation, openid]",
        )
    if is_well:
        yield ok("federation", "is on")
