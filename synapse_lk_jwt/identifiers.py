# SPDX-License-Identifier: Apache-2.0
"""Checks of Matrix identifiers and of URLs that clients and servers send."""

import re
from typing import Any, TypeGuard
from urllib.parse import urlsplit

from synapse.types import UserID, get_domain_from_id
from synapse.util.stringutils import parse_and_validate_server_name

MAX_USER_ID_BYTES = 255

_PRINTABLE_URL = re.compile(r"https?://[A-Za-z0-9.:\[\]-]{1,255}(/[A-Za-z0-9._~/-]{0,255})?")

_DEFAULT_PORTS = {"http": 80, "ws": 80, "https": 443, "wss": 443}

# Unicode's category Cc. In a log, these characters could forge or colour a line.
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")

# A label of a host name (RFC 1123, section 2.1). Twisted cannot resolve other names.
_LABEL = re.compile(r"[0-9A-Za-z](?:[0-9A-Za-z-]{0,61}[0-9A-Za-z])?")


def is_clean(text: str) -> bool:
    """Whether PostgreSQL can store the text, and UTF-8 can encode it.

    PostgreSQL rejects NUL. UTF-8 cannot encode lone surrogates, which JSON can contain.
    """
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
    # Synapse reads the port with int(), which accepts signs, blanks and digits of other scripts.
    return port is None or (0 < port < 65536 and name.endswith(f":{port}"))


def is_printable_url(url: str) -> bool:
    """Whether a URL that another server sent may be printed as a line of homeserver.yaml."""
    return _PRINTABLE_URL.fullmatch(url) is not None


def is_same_url(url: str, other: str) -> bool:
    """Whether two URLs are equivalent (RFC 3986, section 6.2.3).

    Scheme and host are compared without regard to case. The scheme's default port and the path `/`
    may be left out.
    """
    normal = _normal_url(url)
    return normal is not None and normal == _normal_url(other)


def _normal_url(url: str) -> tuple[object, ...] | None:
    """A value that equivalent URLs have in common; None if this is no URL."""
    # `urlsplit` would remove control characters, and spaces around the URL.
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
    """Whether this can be a room ID. In room version 12 it contains no server name."""
    return len(room_id) > 1 and room_id[0] == "!" and not _CONTROL_CHARACTER.search(room_id)


def is_user_id(user_id: Any, of_server: str | None = None) -> TypeGuard[str]:
    """Whether this is a valid user ID.

    Args:
        user_id: any value.
        of_server: the server that the user must belong to; None for any server.
    """
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
