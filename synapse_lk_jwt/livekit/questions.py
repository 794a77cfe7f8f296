# SPDX-License-Identifier: Apache-2.0
"""Questions to LiveKit that many ask at the same time, and that need one request."""

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from synapse.module_api import make_deferred_yieldable, run_in_background
from synapse.util.async_helpers import ObservableDeferred

K = TypeVar("K")
T = TypeVar("T")


class SharedQuestions(Generic[K, T]):
    """Asks each question once at a time, and shares its answer or its failure.

    An answer that was asked for before a call is too old for that call, as the call may follow from
    something that has just happened. Such a call waits, and is then answered by the next request.
    So however many calls there are, two requests answer them all, and a failure fails them all.
    """

    def __init__(self) -> None:
        self._in_flight: dict[K, tuple[int, ObservableDeferred[T]]] = {}
        self._number = 0

    async def ask(self, key: K, question: Callable[[], Awaitable[T]]) -> T:
        """An answer to a question that is asked from now on.

        Args:
            key: what tells it from other questions.
            question: makes the request.

        Raises:
            Exception: what `question` raises, for this call or for the one before.
        """
        before = self._number
        number, request = self._in_flight.get(key) or self._start(key, question)
        answer: T = await make_deferred_yieldable(request.observe())
        if number <= before:
            _, request = self._in_flight.get(key) or self._start(key, question)
            answer = await make_deferred_yieldable(request.observe())
        return answer

    def _start(
        self, key: K, question: Callable[[], Awaitable[T]]
    ) -> tuple[int, ObservableDeferred[T]]:
        self._number += 1
        number = self._number

        async def ask() -> T:
            try:
                return await question()
            finally:
                # Ahead of those that wait for this: they must not find it in flight.
                self._in_flight.pop(key, None)

        deferred = run_in_background(ask)
        request = ObservableDeferred(deferred, consumeErrors=True)
        if not deferred.called:
            self._in_flight[key] = (number, request)
        return number, request
