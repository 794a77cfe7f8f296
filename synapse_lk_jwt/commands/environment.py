# SPDX-License-Identifier: Apache-2.0
"""Reads the environment variables of a service from an env file or a Docker Compose file."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"

# Compose's `${NAME}`, `${NAME:-default}` and `$NAME`. `$$` is a dollar sign.
_REFERENCE = re.compile(rf"\$(?:(\$)|({_NAME})|\{{({_NAME})(?:(:?[-?+])([^}}]*))?\}})")

IMAGE = "lk-jwt-service"


class UnreadableSource(Exception):
    """A file has no environment of lk-jwt-service. The text names the cause, but no value."""


def read_env_file(path: Path) -> dict[str, str]:
    """Reads lines `NAME=value`, as in systemd's EnvironmentFile, Compose's env_file and shells.

    Raises:
        UnreadableSource: if the file cannot be read.
    """
    found = {}
    for line in _read(path).splitlines():
        match = re.fullmatch(rf"\s*(?:export\s+)?({_NAME})\s*=(.*)", line)
        if match:
            found[match[1]] = _unquoted(match[2].strip())
    return found


def read_compose_file(path: Path, service: str | None = None) -> tuple[str, dict[str, str]]:
    """Reads what `environment` and `env_file` of a service in a Compose file set.

    References to variables are replaced from this process's environment and from `.env` next to
    the file, as `docker compose` does.

    Args:
        path: the Compose file.
        service: the name of the service; by default the only one that runs lk-jwt-service.

    Returns:
        The name of the service and its environment.

    Raises:
        UnreadableSource: if no service, or more than one, runs lk-jwt-service.
    """
    try:
        content = yaml.safe_load(_read(path))
    except yaml.YAMLError as e:
        # The text of the error quotes lines, and these may contain the secret.
        mark = getattr(e, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UnreadableSource(f"{path}{line}: this is not valid YAML") from None
    services = content.get("services") if isinstance(content, dict) else None
    if not isinstance(services, dict):
        raise UnreadableSource(f"{path} has no `services`, so it is not a Compose file")
    name = service or _only_service(path, services)
    settings = services.get(name)
    if not isinstance(settings, dict):
        raise UnreadableSource(f"{path} has no service {name!r}")
    dotenv = path.parent / ".env"
    outer = {**(read_env_file(dotenv) if dotenv.is_file() else {}), **os.environ}
    environment: dict[str, str] = {}
    for file in _env_files(settings.get("env_file")):
        environment |= read_env_file(path.parent / _resolved(file, outer))
    for variable, value in _pairs(settings.get("environment")):
        if value is None:
            # Compose passes on such a variable from its own environment.
            if variable in outer:
                environment[variable] = outer[variable]
        else:
            environment[variable] = _resolved(value, outer)
    return name, environment


def _only_service(path: Path, services: Mapping[str, Any]) -> str:
    found = [
        name
        for name, settings in services.items()
        if isinstance(settings, dict)
        and (
            IMAGE in str(settings.get("image", ""))
            or any(key == "LIVEKIT_JWT_BIND" for key, _ in _pairs(settings.get("environment")))
        )
    ]
    if len(found) == 1:
        return str(found[0])
    reason = f"{len(found)} services run" if found else "no service has an image named"
    raise UnreadableSource(f"{path}: {reason} {IMAGE}. Name the service with --service")


def _env_files(value: Any) -> Iterable[str]:
    """The paths in `env_file`: one, a list, or a list of mappings with `path`."""
    for entry in value if isinstance(value, list) else [value]:
        file = entry.get("path") if isinstance(entry, dict) else entry
        if isinstance(file, str):
            yield file


def _pairs(value: Any) -> Iterable[tuple[str, str | None]]:
    """The entries of `environment`, a mapping or a list of `NAME=value`."""
    if isinstance(value, dict):
        for name, setting in value.items():
            # YAML turns an unquoted `true` into a boolean, and Compose passes it on as "true".
            text = str(setting).lower() if isinstance(setting, bool) else setting
            yield str(name), None if text is None else str(text)
    elif isinstance(value, list):
        for entry in map(str, value):
            name, equals, text = entry.partition("=")
            yield name, text if equals else None


def _resolved(value: str, variables: Mapping[str, str]) -> str:
    def replace(match: re.Match[str]) -> str:
        dollar, bare, braced, operator, operand = match.groups()
        if dollar:
            return "$"
        setting = variables.get(bare or braced)
        if operator in ("-", ":-") and (setting is None or (operator == ":-" and not setting)):
            return str(operand)
        return setting or ""

    return _REFERENCE.sub(replace, value)


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    return re.sub(r"\s+#.*", "", value)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UnreadableSource(f"Cannot read {path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise UnreadableSource(f"Cannot read {path}: it is not UTF-8 text") from None
