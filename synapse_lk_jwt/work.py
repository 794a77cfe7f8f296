# SPDX-License-Identifier: Apache-2.0
"""Background work by key, such as a room: a bounded amount, and no key waits for one that hangs."""

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Generic, TypeVar

from synapse_lk_jwt.compat.homeserver import Homeserver

logger = logging.getLogger(__name__)

T = TypeVar("T")

# How many keys run at a time, and how many of these may be in their first moments.
MAX_RUNNING = 50
MAX_QUICK = 20

# Work that takes longer than this is waiting for a server, and not for this process.
QUICK_SEC = 0.1


class NotDone(Exception):
    """Work has failed, and the reason has been logged."""


class WorkByKey(Generic[T]):
    """Runs work in the background, once at a time for each key.

    Items that are added to a key while its work runs are processed together in the next run. Work
    that hangs lets work of other keys start. If the maximum is running, the key that was added last
    is next, so a backlog of rooms that hang does not delay another room.

    Attributes, all private:
        _waiting: the items of work that has not started, by key.
        _running: the items of work that runs.
        _postponed: the items of work that failed, until `retry` is called.
        _quick: the keys whose work started less than `QUICK_SEC` ago.
        _is_starting: whether `_start` runs. Work that ends immediately calls it again.
    """

    def __init__(
        self,
        homeserver: Homeserver,
        desc: str,
        work: Callable[[str, dict[str, T]], Awaitable[None]],
        *,
        postpone_failures: bool = False,
    ) -> None:
        """
        Args:
            homeserver: runs functions in the background.
            desc: a name for Synapse's metrics and log.
            work: gets a key, and its items by name. It may raise `NotDone`. Other exceptions are
                logged.
            postpone_failures: whether items are kept when `work` raises, until `retry` is called.
        """
        self._homeserver = homeserver
        self._desc = desc
        self._work = work
        self._postpone_failures = postpone_failures
        self._waiting: dict[str, dict[str, T]] = {}
        self._running: dict[str, dict[str, T]] = {}
        self._postponed: dict[str, dict[str, T]] = {}
        self._quick: set[str] = set()
        self._is_starting = False

    def add(self, key: str, items: dict[str, T]) -> None:
        """Adds items to the work of a key. An item that already waits keeps its value."""
        waiting = self._waiting.pop(key, {})
        # Last in, first out.
        self._waiting[key] = {**items, **waiting}
        self._start()

    def retry(self) -> None:
        """Queues all failed work again. It starts after the work that already waits."""
        postponed, self._postponed = self._postponed, {}
        waiting = self._waiting
        # Failed work may hang again, so it must not start before the work of a new key.
        self._waiting = {k: {**v, **waiting.pop(k, {})} for k, v in postponed.items()}
        self._waiting.update(waiting)
        self._start()

    def __contains__(self, key: str) -> bool:
        """Whether a key has items whose work has not succeeded."""
        return any(key in state for state in (self._waiting, self._running, self._postponed))

    def unfinished(self) -> Iterator[T]:
        """All items whose work has not succeeded."""
        for state in (self._waiting, self._running, self._postponed):
            for items in state.values():
                yield from items.values()

    def _start(self) -> None:
        if self._is_starting:
            return
        self._is_starting = True
        try:
            while len(self._quick) < MAX_QUICK and len(self._running) < MAX_RUNNING:
                key = next((k for k in reversed(self._waiting) if k not in self._running), None)
                if key is None:
                    return
                self._running[key] = self._waiting.pop(key)
                self._quick.add(key)
                self._homeserver.background.run(self._desc, self._run, key)
        finally:
            self._is_starting = False

    async def _run(self, key: str) -> None:
        timer = self._homeserver.reactor.callLater(QUICK_SEC, self._stop_counting_as_quick, key)
        is_done = False
        try:
            # The reason has been logged.
            with suppress(NotDone):
                await self._work(key, self._running[key])
                is_done = True
        finally:
            items = self._running.pop(key)
            self._quick.discard(key)
            if timer.active():
                timer.cancel()
            if not is_done and self._postpone_failures:
                # An item that was postponed before keeps its time.
                self._postponed[key] = {**items, **self._postponed.get(key, {})}
            self._start()

    def _stop_counting_as_quick(self, key: str) -> None:
        self._quick.discard(key)
        self._start()
