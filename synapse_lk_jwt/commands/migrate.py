# SPDX-License-Identifier: Apache-2.0
"""`python -m synapse_lk_jwt migrate`: the configuration that replaces lk-jwt-service.

It reads the environment of lk-jwt-service 0.3 to 0.10, with the variables of that service's README.
It prints what to add to `homeserver.yaml` and what to delete. It changes nothing, and prints no
secret.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import TextWrapper
from typing import Any
from urllib.parse import urlsplit

import yaml

from synapse_lk_jwt.commands.environment import (
    UnreadableSource,
    read_compose_file,
    read_env_file,
)
from synapse_lk_jwt.config import DEFAULT_PATH_PREFIX

SECRET_PATH = "/etc/matrix-synapse/livekit_secret"  # noqa: S105 - a path

DESCRIPTION = (
    "Reads the environment of lk-jwt-service and prints the block for homeserver.yaml that replaces"
    " it, and what to delete. Changes nothing, and prints no secret."
)

EPILOG = (
    "docs/migration.md explains every step. Exit status: 0 if a block was printed, 2 if the"
    " environment could not be read or is incomplete."
)

PRINTED, COULD_NOT_RUN = 0, 2

# Variables with an option that has the same text.
SAME_TEXT = {
    "LIVEKIT_KEY": "livekit_key",
    "LIVEKIT_KEY_FROM_FILE": "livekit_key_path",
    "LIVEKIT_SECRET_FROM_FILE": "livekit_secret_path",
    "LIVEKIT_KEY_FILE": "livekit_key_file",
}

SERVER_LISTS = {
    # The first of two for one option wins, as in lk-jwt-service.
    "LIVEKIT_FULL_ACCESS_HOMESERVERS": "full_access_homeservers",
    "LIVEKIT_LOCAL_HOMESERVERS": "full_access_homeservers",
    "LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS": "remote_can_publish",
}

BOOLEANS = {
    "LIVEKIT_REQUIRE_MEMBERSHIP": "require_room_membership",
    "LIVEKIT_CAN_UPDATE_OWN_METADATA": "can_update_own_metadata",
}

INTERVAL = "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS"

# Variables without an option, and what replaces them.
DROPPED = {
    "LIVEKIT_JWT_BIND": "Synapse's listeners serve the endpoints",
    "LIVEKIT_JWT_PORT": "Synapse's listeners serve the endpoints",
    "LIVEKIT_LOG_LEVEL": "Synapse's log_config sets the level of the logger `synapse_lk_jwt`",
    "LIVEKIT_CS_API_URL_OVERRIDES": "the module queries its own homeserver without HTTP",
    "LIVEKIT_INSECURE_SKIP_VERIFY_TLS": "the module verifies every certificate",
    "LIVEKIT_REDIS_URL": "Synapse's database stores the state",
    "LIVEKIT_REDIS_PASSWORD": "Synapse's database stores the state",
    "LIVEKIT_AS_TOKEN": "the module needs no application service",
    "LIVEKIT_HS_TOKEN": "the module needs no application service",
    "LIVEKIT_AS_REGISTRATION_FILE": "the module needs no application service",
    "LIVEKIT_HS_SERVER_NAME": "the module reads Synapse's server_name",
    "LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS": (
        "the module removes a participant at the event that ends the membership"
    ),
}

APPLICATION_SERVICE = ("LIVEKIT_AS_TOKEN", "LIVEKIT_HS_TOKEN", "LIVEKIT_AS_REGISTRATION_FILE")


# Options and URLs stay in one piece, so that they can be copied.
_BULLET = TextWrapper(
    width=100,
    initial_indent="   - ",
    subsequent_indent="     ",
    break_long_words=False,
    break_on_hyphens=False,
)


class IncompleteEnvironment(Exception):
    """The environment lacks what lk-jwt-service needs. The text names the variables."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this subcommand."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--env",
        type=Path,
        metavar="FILE",
        help="a file with lines NAME=value: docker --env-file, Compose's env_file, or systemd's"
        " EnvironmentFile",
    )
    source.add_argument(
        "--compose", type=Path, metavar="FILE", help="a Docker Compose file with lk-jwt-service"
    )
    parser.add_argument("--service", metavar="NAME", help="the service in the Compose file")
    parser.add_argument(
        "--secret-path",
        default=SECRET_PATH,
        metavar="PATH",
        help="where Synapse will find a secret that is now in a variable (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    try:
        if options.env is not None:
            source, environment = str(options.env), read_env_file(options.env)
        else:
            name, environment = read_compose_file(options.compose, options.service)
            source = f"service {name} in {options.compose}"
        print(report(environment, source, options.secret_path))
    except (UnreadableSource, IncompleteEnvironment) as e:
        print(f"{e}.", file=sys.stderr)
        return COULD_NOT_RUN
    return PRINTED


def report(environment: Mapping[str, str], source: str, secret_path: str = SECRET_PATH) -> str:
    """What to do, in the order that keeps calls working.

    Args:
        environment: the variables of lk-jwt-service.
        source: where they were read, for the text.
        secret_path: the file for a secret that is now in a variable.

    Raises:
        IncompleteEnvironment: if the URL, the key or the secret is missing.
    """
    # lk-jwt-service treats an empty variable as unset.
    given = {name: value.strip() for name, value in environment.items() if value.strip()}
    _check_complete(given, source)
    config = _options(given, secret_path)
    block = {"modules": [{"module": "synapse_lk_jwt.LiveKitJwtModule", "config": config}]}
    parts = [
        "1. ADD this to homeserver.yaml, and keep lk-jwt-service running. If the file has a"
        " `modules:` list\n   already, add the entry to that list.",
        yaml.safe_dump(block, sort_keys=False) + "max_event_delay_duration: 24h",
        *_secret_file(given, source, secret_path),
        "   Add a second URL to `webhook:` `urls:` in LiveKit's configuration, and restart LiveKit:"
        f"\n\n     http://SYNAPSE:8008{DEFAULT_PATH_PREFIX}/sfu_webhook",
        *_bullets("Compare:", _notes(given, config)),
        "2. CHECK. Restart Synapse, then run\n\n"
        "     python -m synapse_lk_jwt check -c homeserver.yaml\n\n"
        "   It reports that clients still use lk-jwt-service. Solve every other problem.",
        *_bullets("3. SWITCH. Keep a copy of each file for a roll-back:", _switches(given)),
        *_bullets("4. DELETE when clients have used the module for a day:", _deletions(given)),
    ]
    return "\n\n".join(parts)


def _check_complete(given: Mapping[str, str], source: str) -> None:
    missing = [] if "LIVEKIT_URL" in given else ["LIVEKIT_URL"]
    if "LIVEKIT_KEY_FILE" not in given:
        missing += [
            f"{name} or {name}_FROM_FILE"
            for name in ("LIVEKIT_KEY", "LIVEKIT_SECRET")
            if name not in given and f"{name}_FROM_FILE" not in given
        ]
    if missing:
        raise IncompleteEnvironment(f"{source} lacks {', '.join(missing)}")


def _options(given: Mapping[str, str], secret_path: str) -> dict[str, Any]:
    """The module's `config`."""
    url = given["LIVEKIT_URL"]
    # A password must be neither in a URL for clients nor in the output.
    config: dict[str, Any] = {"livekit_url": url if "@" not in url else "wss://sfu.example.com"}
    names = dict(SAME_TEXT)
    # Where lk-jwt-service has two sources for a value, it prefers the file.
    if "LIVEKIT_KEY_FILE" in given:
        names = {"LIVEKIT_KEY_FILE": "livekit_key_file"}
    elif "LIVEKIT_KEY_FROM_FILE" in given:
        del names["LIVEKIT_KEY"]
    config |= {option: given[name] for name, option in names.items() if name in given}
    if not config.keys() & {"livekit_key_file", "livekit_secret_path"}:
        config["livekit_secret_path"] = secret_path
    for name, option in SERVER_LISTS.items():
        servers = re.split(r"[,\s]+", given.get(name, "").strip(", \t"))
        if servers != [""] and option not in config:
            config[option] = "*" if "*" in servers else servers
    for name, option in BOOLEANS.items():
        if (value := _boolean(given.get(name, ""))) is not None:
            config[option] = value
    if re.fullmatch(r"\d+", given.get(INTERVAL, "")):
        seconds = int(given[INTERVAL])
        config["sanity_check_interval"] = f"{seconds}s" if seconds else 0
    return config


def _secret_file(given: Mapping[str, str], source: str, secret_path: str) -> Iterator[str]:
    if given.keys() & {"LIVEKIT_KEY_FILE", "LIVEKIT_SECRET_FROM_FILE"}:
        yield (
            "   Synapse's user must be able to read the files that the block names. In a container,"
            "\n   mount them, and write the paths as Synapse's container has them."
        )
    else:
        yield (
            f"   Copy the value of LIVEKIT_SECRET in {source} into a file for Synapse's user alone:"
            f"\n\n     install -m 600 -o matrix-synapse /dev/null {secret_path}"
            f"\n     editor {secret_path}"
        )


def _notes(given: Mapping[str, str], config: Mapping[str, Any]) -> Iterator[str]:
    """Differences between the module and lk-jwt-service with this environment."""
    url = given["LIVEKIT_URL"]
    if "@" in url:
        yield "livekit_url: LIVEKIT_URL contains a user name or password. Write the URL without it"
    elif not url.lower().startswith("wss://"):
        yield "livekit_url: browsers on HTTPS pages need wss://"
    host = urlsplit(url).hostname or ""
    if "." not in host and host != "localhost":
        yield (
            f"livekit_url: {host!r} is no public name. Clients connect to this URL. Write the name"
            " inside your network as livekit_internal_url"
        )
    if config.get("full_access_homeservers", "*") == "*":
        yield (
            "full_access_homeservers: users of every homeserver may start calls. Write [] to allow"
            " only your own users"
        )
    elif given.keys() & set(APPLICATION_SERVICE):
        yield (
            "full_access_homeservers: as an application service, lk-jwt-service ignored this list"
            " on MSC4195's endpoints. The module applies it to all endpoints"
        )
    if "remote_can_publish" not in config:
        yield (
            "remote_can_publish: users of other homeservers may publish by default. Some versions"
            " of lk-jwt-service let them only listen"
        )
    if "LIVEKIT_REQUIRE_MEMBERSHIP" not in given:
        yield (
            "require_room_membership: users must be joined to the Matrix room. lk-jwt-service"
            " checks that since 0.9"
        )
    if INTERVAL not in given:
        yield (
            "sanity_check_interval: the module polls LiveKit every 30 seconds. lk-jwt-service does"
            " not by default. Write 0 to switch polling off"
        )
    for name in [*BOOLEANS, INTERVAL]:
        option = BOOLEANS.get(name, "sanity_check_interval")
        if name in given and option not in config:
            yield f"{option}: the value of {name} is not valid, so the module's default applies"


def _switches(given: Mapping[str, str]) -> Iterator[str]:
    yield (
        "homeserver.yaml: remove the `livekit` entry below `matrix_rtc: transports:`. If it is the"
        " only entry, remove `matrix_rtc:` as a whole"
    )
    yield (
        "homeserver.yaml: remove `org.matrix.msc4143.rtc_foci` below"
        " `extra_well_known_client_content:`. If it is the only key, remove that option as a whole"
    )
    yield (
        "the file .well-known/matrix/client, if a web server and not Synapse serves it: write"
        f" https://YOUR-HOMESERVER{DEFAULT_PATH_PREFIX} as livekit_service_url"
    )
    if given.keys() & set(APPLICATION_SERVICE):
        yield (
            "homeserver.yaml: remove lk-jwt-service's registration file from"
            " app_service_config_files, and msc4502_enabled and msc4512_enabled from"
            " experimental_features"
        )
    yield "the proxy: send lk-jwt-service's URL to Synapse (docs/migration.md has the lines)"
    yield "restart Synapse and run `check` again: it must report no problem"


def _deletions(given: Mapping[str, str]) -> Iterator[str]:
    yield "the container, package or unit of lk-jwt-service, and its environment"
    yield "lk-jwt-service's URL in `webhook:` `urls:` of LiveKit's configuration"
    if "LIVEKIT_REDIS_URL" in given:
        yield "the Redis of lk-jwt-service, unless something else uses it"
    if "LIVEKIT_AS_REGISTRATION_FILE" in given:
        yield f"the registration file {given['LIVEKIT_AS_REGISTRATION_FILE']}"
    elif given.keys() & set(APPLICATION_SERVICE):
        yield "the registration file of the application service"
    for name, reason in DROPPED.items():
        if name in given:
            yield f"{name}: no option replaces it, because {reason}"
    known = {*SAME_TEXT, *SERVER_LISTS, *BOOLEANS, *DROPPED, INTERVAL, "LIVEKIT_URL"}
    for name in sorted(given.keys() - known - {"LIVEKIT_SECRET"}):
        if name.startswith("LIVEKIT_"):
            yield f"{name}: this command does not know it"


def _bullets(title: str, entries: Iterator[str]) -> Iterator[str]:
    """A list below a title; nothing if the list is empty."""
    lines = [_BULLET.fill(entry) for entry in entries]
    if lines:
        yield "\n".join([title if title[0].isdigit() else f"   {title}", *lines])


def _boolean(value: str) -> bool | None:
    return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
