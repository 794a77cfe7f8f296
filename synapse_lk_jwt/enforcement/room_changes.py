# SPDX-License-Identifier: Apache-2.0
"""Follows the stream of state changes, and finds the changes that concern calls.

The stream is followed from a stored position on, so that no change is missed while the homeserver
is down.
"""

import logging
from collections.abc import Iterable

from synapse.api.constants import EventTypes

from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.enforcement.removals import ALL_USERS, Change, RoomRemovals
from synapse_lk_jwt.enforcement.tables import StreamPosition
from synapse_lk_jwt.livekit.tables import CallTable

logger = logging.getLogger(__name__)

# How often to store the position in the stream.
STORE_MS = 5_000


class RoomChanges:
    """Passes changes of memberships and ACLs, in rooms that have calls, to `RoomRemovals`.

    Attributes, all private:
        _position: up to where the stream has been read; None until the stored position is read.
        _stored: the position that is stored.
        _is_following: whether the stream is being read.
    """

    def __init__(
        self,
        homeserver: Homeserver,
        calls: CallTable,
        stored_position: StreamPosition,
        removals: RoomRemovals,
    ) -> None:
        """
        Args:
            homeserver: the stream.
            calls: the calls of Matrix rooms.
            stored_position: the position to start from after a restart.
            removals: processes the changes.
        """
        self._homeserver = homeserver
        self._calls = calls
        self._stored_position = stored_position
        self._removals = removals
        self._position: int | None = None
        self._stored: int | None = None
        self._is_following = False

    def start(self) -> None:
        """Starts to follow the stream, on the process that runs background tasks."""
        homeserver = self._homeserver
        if homeserver.runs_background_tasks and homeserver.state_changes.are_available:
            homeserver.state_changes.on_new_data(self._on_new_data)
            # This reads the changes that happened while this process was down.
            homeserver.background.run("synapse_lk_jwt_follow", self._follow)
            homeserver.background.repeat(STORE_MS, "synapse_lk_jwt_follow", self._follow_and_store)

    def _on_new_data(self) -> None:
        # Synapse calls this for every event. For most of them it must do nothing.
        if self._is_following or self._position is None:
            return
        try:
            newest = self._homeserver.state_changes.position()
            if self._homeserver.state_changes.any_since(self._position):
                self._homeserver.background.run("synapse_lk_jwt_follow", self._follow)
            else:
                self._position = max(self._position, newest)
        except Exception:
            # Synapse calls this in a loop with callbacks of its own, which must not fail if a
            # newer Synapse has other internals. `_follow_and_store` follows the stream as well.
            logger.exception("Could not find out whether the state of a room has changed")

    async def _follow(self) -> None:
        """Reads all changes of state since the position that was reached last."""
        if self._is_following:
            return
        self._is_following = True
        try:
            await self._catch_up()
        finally:
            self._is_following = False

    async def _catch_up(self) -> None:
        newest = self._homeserver.state_changes.position()
        if self._position is None:
            self._position = self._stored = await self._stored_position.get()
            if self._position is None or self._position > newest:
                # The module starts for the first time, or events were removed from the database.
                # Synapse's user directory starts at the newest position in this case as well.
                self._position = newest
        while self._position < newest:
            reached, changes = await self._homeserver.state_changes.between(self._position, newest)
            change = Change(self._homeserver.clock.time_msec(), self._position)
            changed = _by_room(changes, change)
            # Most rooms have no call, and no work.
            for room_id in await self._calls.in_rooms(changed.keys()):
                self._removals.add(room_id, changed[room_id])
            self._position = reached
            newest = self._homeserver.state_changes.position()

    async def _follow_and_store(self) -> None:
        """As `_follow`. Not every step is stored, because processing a change twice is harmless."""
        await self._follow()
        if self._position is None:
            return
        # A restart of this process would lose changes that are not processed yet.
        unprocessed = (change.position for change in self._removals.unprocessed())
        done = min(unprocessed, default=self._position)
        if done != self._stored:
            await self._stored_position.set(done)
            self._stored = done


def _by_room(
    changes: Iterable[tuple[str, str, str]], change: Change
) -> dict[str, dict[str, Change]]:
    """The users whose membership changed, by Matrix room; ALL_USERS after a change of the ACL."""
    changed: dict[str, dict[str, Change]] = {}
    for room_id, event_type, state_key in changes:
        if event_type == EventTypes.Member:
            changed.setdefault(room_id, {})[state_key] = change
        elif event_type == EventTypes.ServerACL:
            changed.setdefault(room_id, {})[ALL_USERS] = change
    return changed
