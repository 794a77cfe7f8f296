# SPDX-License-Identifier: Apache-2.0
"""Requests to LiveKit that many callers need at the same time."""

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from synapse.module_api import make_deferred_yieldable, run_in_background
from synapse.util.async_helpers import ObservableDeferred

K = TypeVar("K")
T = TypeVar("T")


class SharedQuestions(Generic[K, T]):
    """Makes one request for a question at a time, and shares its answer or its failure.

    A request that began before a call is too old for that call, because the caller may react to
    something that has just happened. Such a call waits, and the next request answers it. So two
    requests answer any number of calls, and a failure fails all of them.
    """

    def __init__(self) -> None:
        self._in_flight: dict[K, tuple[int, ObservableDeferred[T]]] = {}
        self._number = 0

    async def ask(self, key: K, question: Callable[[], Awaitable[T]]) -> T:
        """Returns an answer to a question, from a request that begins after this call.

        Args:
            key: identifies the question.
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
                # This must precede the callbacks of waiting calls, which start the next request.
                self._in_flight.pop(key, None)

        deferred = run_in_background(ask)
        request = ObservableDeferred(deferred, consumeErrors=True)
        if not deferred.called:
            self._in_flight[key] = (number, request)
        return number, request
