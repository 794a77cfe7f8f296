# SPDX-License-Identifier: Apache-2.0
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.task import Clock

from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.work import MAX_QUICK, MAX_RUNNING, QUICK_SEC, NotDone, WorkByKey


class Background:
    """Runs work as a homeserver does, and keeps what it raises."""

    def __init__(self) -> None:
        self.reactor = Clock()
        self.background = self
        self.errors: list[str] = []

    def run(self, desc: str, func: Callable[..., Awaitable[None]], *args: object) -> None:
        deferred = ensureDeferred(cast(Any, func(*args)))
        deferred.addErrback(lambda failure: self.errors.append(str(failure.value)))


class Work:
    """Work that ends when the test fires its Deferred."""

    def __init__(self, **more: Any) -> None:
        self.background = Background()
        self.begun: dict[str, Deferred[None]] = {}
        self.items: list[dict[str, int]] = []
        self.queue: WorkByKey[int] = WorkByKey(
            cast(Homeserver, self.background), "test", self._work, **more
        )

    async def _work(self, key: str, items: dict[str, int]) -> None:
        self.items.append(dict(items))
        self.begun[key] = Deferred()
        await self.begun[key]

    def end(self, key: str, error: Exception | None = None) -> None:
        work = self.begun.pop(key)
        if error is None:
            work.callback(None)
        else:
            work.errback(error)


def test_work_by_key_items_added_meanwhile_are_done_together_afterwards() -> None:
    work = Work()
    for number in range(3):
        work.queue.add("room", {str(number): number})
    assert work.items == [{"0": 0}]
    work.end("room")
    assert work.items == [{"0": 0}, {"1": 1, "2": 2}]


def test_work_by_key_item_that_waits_keeps_its_value() -> None:
    work = Work()
    work.queue.add("room", {})
    work.queue.add("room", {"user": 1})
    work.queue.add("room", {"user": 2})
    work.end("room")
    assert work.items[-1] == {"user": 1}


def test_work_by_key_work_that_hangs_makes_way_for_other_keys() -> None:
    work = Work()
    for number in range(MAX_QUICK):
        work.queue.add(f"hangs {number}", {})
    work.queue.add("new", {})
    assert "new" not in work.begun
    work.background.reactor.advance(QUICK_SEC)
    assert "new" in work.begun


def test_work_by_key_thousand_keys_that_hang_leave_a_bounded_number_running() -> None:
    work = Work()
    for number in range(1_000):
        work.queue.add(str(number), {})
        work.background.reactor.advance(QUICK_SEC)
    assert len(work.begun) == MAX_RUNNING


def test_work_by_key_new_key_behind_a_backlog_is_next() -> None:
    work = Work()
    for number in range(1_000):
        work.queue.add(str(number), {})
        work.background.reactor.advance(QUICK_SEC)
    work.queue.add("new", {})
    work.end("0")
    assert "new" in work.begun


@pytest.mark.parametrize("error", [NotDone(), ValueError("database")])
def test_work_by_key_failed_work_is_kept_until_it_is_retried(error: Exception) -> None:
    work = Work(postpone_failures=True)
    work.queue.add("room", {"user": 1})
    work.end("room", error)
    assert list(work.queue.unfinished()) == [1]
    assert work.begun == {}
    work.queue.add("room", {"user": 2})
    work.end("room", error)
    work.queue.retry()
    # The time that was noted first counts.
    assert work.items[-1] == {"user": 1}
    work.end("room")
    assert list(work.queue.unfinished()) == []
    assert "room" not in work.queue


def test_work_by_key_failed_work_that_is_retried_does_not_delay_a_new_key() -> None:
    work = Work(postpone_failures=True)
    for number in range(MAX_RUNNING):
        work.queue.add(str(number), {"user": number})
        work.background.reactor.advance(QUICK_SEC)
    work.queue.add("failed", {"user": 1})
    work.end("0")
    work.end("failed", NotDone())
    work.queue.add("0", {"user": 0})
    work.background.reactor.advance(QUICK_SEC)
    work.queue.add("new", {"user": 1})
    work.queue.retry()
    work.end("1")
    assert "new" in work.begun
    assert "failed" not in work.begun
    work.end("2")
    assert "failed" in work.begun


def test_work_by_key_expected_failure_is_not_raised() -> None:
    work = Work()
    work.queue.add("expected", {})
    work.queue.add("bug", {})
    work.end("expected", NotDone())
    work.end("bug", ValueError("bug"))
    assert work.background.errors == ["bug"]


def test_work_by_key_work_that_ends_at_once_does_not_nest() -> None:
    depth = 0

    async def work(key: str, items: dict[str, int]) -> None:
        nonlocal depth
        depth += 1
        if key == "first":
            for number in range(5_000):
                queue.add(str(number), {})

    queue: WorkByKey[int] = WorkByKey(cast(Homeserver, Background()), "test", work)
    queue.add("first", {})
    assert depth == 5_001
