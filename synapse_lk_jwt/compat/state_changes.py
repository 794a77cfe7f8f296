# SPDX-License-Identifier: Apache-2.0
"""The stream of changes to the state of rooms, as Synapse's user directory follows it."""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from synapse_lk_jwt.compat.self_test import Feature


class StateDelta(Protocol):
    """A change to the state of a room."""

    @property
    def room_id(self) -> str: ...

    @property
    def event_type(self) -> str: ...

    @property
    def state_key(self) -> str: ...


class StreamChangeCache(Protocol):
    """The parts of Synapse's cache of the stream that this file uses."""

    def has_any_entity_changed(self, stream_pos: int) -> bool: ...


class StateChangesStore(Protocol):
    """The parts of Synapse's store that this file uses."""

    @property
    def _curr_state_delta_stream_cache(self) -> StreamChangeCache: ...

    def get_room_max_stream_ordering(self) -> int: ...

    async def get_partial_current_state_deltas(
        self, prev_stream_id: int, max_stream_id: int
    ) -> tuple[int, Sequence[StateDelta]]: ...


class Notifier(Protocol):
    """The parts of Synapse's notifier that this file uses."""

    def add_replication_callback(self, cb: Callable[[], None]) -> None: ...


class StateChangesHomeServer(Protocol):
    """The parts of Synapse's `HomeServer` that this file uses."""

    def get_notifier(self) -> Notifier: ...


class StateChanges:
    """Follows the stream.

    Attributes:
        are_available: whether this Synapse has the hooks for the stream. If not, no method may be
            called.
    """

    def __init__(
        self, hs: StateChangesHomeServer, store: StateChangesStore, off: Collection[Feature]
    ) -> None:
        self._hs = hs
        self._store = store
        self.are_available = Feature.STATE_CHANGES not in off

    def on_new_data(self, callback: Callable[[], None]) -> None:
        """Registers a function that Synapse calls whenever there may be new events.

        Synapse calls it on the reactor, so it must be quick.
        """
        self._hs.get_notifier().add_replication_callback(callback)

    def position(self) -> int:
        """The position in the event stream that this process has received."""
        return int(self._store.get_room_max_stream_ordering())

    def any_since(self, since: int) -> bool:
        """Whether the state of any room may have changed since a position; from memory."""
        return bool(self._store._curr_state_delta_stream_cache.has_any_entity_changed(since))

    async def between(self, since: int, until: int) -> tuple[int, Sequence[tuple[str, str, str]]]:
        """The changes to the state of rooms, in order, about a hundred at most.

        Returns:
            The position of the last of these changes, and of each change the room, the type and the
            state key.
        """
        reached, deltas = await self._store.get_partial_current_state_deltas(since, until)
        return int(reached), [(d.room_id, d.event_type, d.state_key) for d in deltas]
