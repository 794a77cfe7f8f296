# SPDX-License-Identifier: Apache-2.0
"""Which LiveKit rooms a poll lists.

A listing costs Synapse's main thread a millisecond and more. So a poll lists the rooms in which
something may have changed, and a share of the quiet ones. Each quiet room is listed every five
minutes.
"""

from collections.abc import Iterable, Mapping, Set

import attr

# A quiet room is listed this often.
SWEEP_MS = 300_000

# Each poll lists at least this many quiet rooms. On a small server these are all rooms, so that the
# next poll notices a participant whose LiveKit node died.
MIN_SWEPT = 10


@attr.s(auto_attribs=True, frozen=True, slots=True)
class ListedRoom:
    """A LiveKit room as it was when it was listed.

    Attributes:
        listed_ts: when it was listed, in milliseconds since the epoch.
        participants: how many participants ListRooms counted.
        users: the users of this homeserver among its participants.
        is_ours: whether a participant needs this homeserver to recreate the room.
    """

    listed_ts: int
    participants: int
    users: frozenset[str]
    is_ours: bool


class PollSchedule:
    """Remembers what was listed, and chooses what the next poll lists."""

    def __init__(self, interval_ms: int) -> None:
        """
        Args:
            interval_ms: milliseconds between two polls.
        """
        self._interval_ms = interval_ms
        self._listed: dict[str, ListedRoom] = {}

    def keep(self, listed: Mapping[str, int]) -> None:
        """Forgets all rooms but those that ListRooms names.

        A room without participants is kept, so that the change to no participants is noticed. The
        number is out of date for ever if LiveKit's node died before it stored the number.
        """
        self._listed = {name: room for name, room in self._listed.items() if name in listed}

    def note(self, livekit_room: str, room: ListedRoom) -> None:
        """Notes that a room was listed, and all of it was checked."""
        self._listed[livekit_room] = room

    def forget(self, livekit_room: str) -> None:
        """Lists a room again at the next poll, because this one did not check all of it."""
        self._listed.pop(livekit_room, None)

    @property
    def users(self) -> set[str]:
        """The users of this homeserver in the rooms that were listed."""
        return {user_id for room in self._listed.values() for user_id in room.users}

    def listed(self) -> Iterable[str]:
        """The rooms that were listed."""
        return self._listed.keys()

    def is_ours(self, livekit_room: str) -> bool:
        """Whether a participant needs this homeserver to recreate a room; True if not known."""
        room = self._listed.get(livekit_room)
        return room is None or room.is_ours

    def changed(self, listed: Mapping[str, int], inactive: Set[str]) -> set[str]:
        """The rooms in which something has changed, and those that were not listed before.

        Args:
            listed: the rooms that ListRooms names, with the numbers of their participants.
            inactive: the members of `users` whose accounts are inactive.
        """
        changed = set()
        for name, number in listed.items():
            room = self._listed.get(name)
            if room is None:
                has_changed = number > 0
            else:
                has_changed = number != room.participants or not inactive.isdisjoint(room.users)
            if has_changed:
                changed.add(name)
        return changed

    def share_of_quiet(self, quiet: Set[str], began_ts: int, *, all_of_them: bool) -> set[str]:
        """The quiet rooms to list: those that were listed longest ago.

        Args:
            quiet: the LiveKit rooms that are otherwise not listed.
            began_ts: when the poll began, in milliseconds since the epoch.
            all_of_them: whether to list all of them.
        """
        oldest_first = sorted(
            (room.listed_ts, name) for name, room in self._listed.items() if name in quiet
        )
        number = max(MIN_SWEPT, len(oldest_first) * self._interval_ms // SWEEP_MS)
        if all_of_them:
            number = len(oldest_first)
        overdue_ts = began_ts + self._interval_ms - SWEEP_MS
        return {
            name
            for index, (listed_ts, name) in enumerate(oldest_first)
            if index < number or listed_ts <= overdue_ts
        }
