# SPDX-License-Identifier: Apache-2.0
"""Recognises the answers of a proxy between Synapse and LiveKit."""

from synapse_lk_jwt.identifiers import is_printable_url

# A proxy answers with these while LiveKit does not answer it. Those above 504 are Cloudflare's.
_DOWN = frozenset((502, 503, 504, 521, 522, 523, 524))

_REDIRECTS = frozenset((301, 302, 303, 307, 308))


def is_down_behind_proxy(status: int, is_twirp: bool) -> bool:
    """Whether an answer comes from a proxy that cannot reach LiveKit.

    Args:
        status: the HTTP status.
        is_twirp: whether the body is an error of Twirp. LiveKit's own 503 has such a body.
    """
    return status in _DOWN and not is_twirp


def is_redirect(status: int) -> bool:
    """Whether an answer with this HTTP status redirects the client to another URL."""
    return status in _REDIRECTS


def redirected_url(location: str, path: str) -> str | None:
    """The URL that the configuration should have, for a request that was redirected.

    Args:
        location: the header of that name.
        path: the path of the request below the configured URL.

    Returns:
        None if the location has another path, as a login page has.
    """
    if not location.endswith(path):
        return None
    base = location[: -len(path)]
    return base if is_printable_url(base) else None
