# SPDX-License-Identifier: Apache-2.0
"""The Matrix rooms whose calls a removed user may still hold a token for."""

from collections.abc import Collection

from synapse_lk_jwt.compat.homeserver import Homeserver

# LiveKit sends its own tokens to a connected client. They are usable for this long.
REFRESHED_TOKEN_MS = 600_000


def tokens_usable_ms(token_lifetime_ms: int) -> int:
    """How long a participant that was removed may hold a token, in milliseconds.

    LiveKit sends a new token with every connection, even with one that it ends immediately.

    Args:
        token_lifetime_ms: the lifetime of the module's own tokens, in milliseconds.
    """
    return max(token_lifetime_ms, REFRESHED_TOKEN_MS)


class RecheckList:
    """Remembers, on the process that runs background tasks, which rooms to recheck.

    Other processes remove participants as well. They remember nothing: the poll of the background
    process finds what a removed user does afterwards.
    """

    def __init__(self, homeserver: Homeserver, usable_ms: int) -> None:
        """
        Args:
            homeserver: the clock, and whether this process runs background tasks.
            usable_ms: how long to recheck a room, in milliseconds; see `tokens_usable_ms`.
        """
        self._homeserver = homeserver
        self._usable_ms = usable_ms
        self._until_ms: dict[str, int] = {}

    def add(self, room_id: str) -> None:
        """Adds a Matrix room, or restarts its time."""
        if self._homeserver.runs_background_tasks:
            self._until_ms[room_id] = self._homeserver.clock.time_msec() + self._usable_ms

    def current(self) -> Collection[str]:
        """The Matrix rooms to recheck now."""
        now_ms = self._homeserver.clock.time_msec()
        self._until_ms = {
            room_id: until_ms for room_id, until_ms in self._until_ms.items() if until_ms > now_ms
        }
        return self._until_ms.keys()
