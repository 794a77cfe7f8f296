# SPDX-License-Identifier: Apache-2.0
"""Which strings are Matrix identifiers, and which can be stored and hashed at all."""

import re
from typing import Any, TypeGuard
from urllib.parse import urlsplit

from synapse.types import UserID, get_domain_from_id
from synapse.util.stringutils import parse_and_validate_server_name

MAX_USER_ID_BYTES = 255

_DEFAULT_PORTS = {"http": 80, "ws": 80, "https": 443, "wss": 443}

# Unicode's category Cc. Identifiers end up in logs, where these could forge or colour a line.
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")

# A label of a host name (RFC 1123, section 2.1). Twisted cannot look up others.
_LABEL = re.compile(r"[0-9A-Za-z](?:[0-9A-Za-z-]{0,61}[0-9A-Za-z])?")


def is_clean(text: str) -> bool:
    """Whether the text is free of NUL, which PostgreSQL refuses, and can be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def is_server_name(name: str) -> bool:
    """Whether this is a valid server name (Matrix specification, appendices, 'Server name')."""
    try:
        host, port = parse_and_validate_server_name(name)
    except ValueError:
        return False
    if host[0] != "[" and not all(map(_LABEL.fullmatch, host.split("."))):
        return False
    # Synapse reads the port with int(), which also takes signs, blanks and other scripts' digits.
    return port is None or (0 < port < 65536 and name.endswith(f":{port}"))


def is_same_url(url: str, other: str) -> bool:
    """Whether two URLs name the same place (RFC 3986, section 6.2.3).

    Scheme and host are compared without regard to case. The scheme's default port and the path `/`
    may be left out.
    """
    normal = _normal_url(url)
    return normal is not None and normal == _normal_url(other)


def _normal_url(url: str) -> tuple[object, ...] | None:
    """What URLs of the same place have in common; None if this is no URL."""
    # `urlsplit` removes control characters, and spaces around the URL.
    if re.search(r"[\x00-\x20\x7f]", url):
        return None
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if port is None:
        port = _DEFAULT_PORTS.get(parts.scheme)
    user, _, _ = parts.netloc.rpartition("@")
    rest = (parts.path or "/", parts.query, parts.fragment)
    return (parts.scheme, user, parts.hostname, port, *rest)


def is_room_id(room_id: str) -> bool:
    """Whether this can be a room ID. Those of room version 12 have no server name in them."""
    return len(room_id) > 1 and room_id[0] == "!" and not _CONTROL_CHARACTER.search(room_id)


def is_user_id(user_id: Any, of_server: str | None = None) -> TypeGuard[str]:
    """Whether this is a valid user ID and, where a server is named, one of that very server."""
    return (
        isinstance(user_id, str)
        and is_clean(user_id)
        and not _CONTROL_CHARACTER.search(user_id)
        and len(user_id.encode("utf-8")) <= MAX_USER_ID_BYTES
        and UserID.is_valid(user_id)
        and is_server_name(get_domain_from_id(user_id))
        and of_server in (None, get_domain_from_id(user_id))
    )


def path_prefixes_overlap(prefix: str, other: str) -> bool:
    """Whether one of two path prefixes lies below the other."""
    return f"{prefix}/".startswith(f"{other}/"[: len(prefix) + 1])
