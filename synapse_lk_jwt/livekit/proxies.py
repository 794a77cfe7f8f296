# SPDX-License-Identifier: Apache-2.0
"""What a proxy between Synapse and LiveKit answers instead of LiveKit."""

import re

# A proxy's answers while nothing answers behind it: those of HTTP, and those of a large CDN.
_DOWN = frozenset((502, 503, 504, 521, 522, 523, 524))

_REDIRECTS = frozenset((301, 302, 303, 307, 308))

_BASE = re.compile(r"https?://[A-Za-z0-9.:\[\]-]{1,255}(/[A-Za-z0-9._~/-]{0,255})?")


def is_down_behind_proxy(status: int, is_twirp: bool) -> bool:
    """Whether an answer is a proxy's, and says that LiveKit does not answer.

    Args:
        status: the HTTP status.
        is_twirp: whether the body is an error of Twirp, as that of LiveKit's own 503 is.
    """
    return status in _DOWN and not is_twirp


def is_redirect(status: int) -> bool:
    """Whether an answer of this HTTP status sends its reader to another URL."""
    return status in _REDIRECTS


def redirected_url(location: str, path: str) -> str | None:
    """The URL to write into the configuration, for a request that was redirected.

    Args:
        location: the header of that name.
        path: the path of the request below the URL that is configured.

    Returns:
        None if the location is no URL of the same path: a page to log in, perhaps.
    """
    if not location.endswith(path):
        return None
    base = location[: -len(path)]
    return base if _BASE.fullmatch(base) else None
