# SPDX-License-Identifier: Apache-2.0
"""Decides which failures get a line in the log, so that a broken LiveKit does not flood it."""

import attr
from twisted.internet.interfaces import IReactorTime

# A failure that ends and returns is logged at most once in this time.
LOG_AGAIN_SEC = 60
MAX_FAILURES = 100


@attr.s(auto_attribs=True, slots=True)
class _Failure:
    logged_sec: float
    is_over: bool = False


class FailureLog:
    """Remembers which failures were logged.

    A failure is logged once while it lasts. The failures of one scope end together.
    """

    def __init__(self, reactor: IReactorTime) -> None:
        self._reactor = reactor
        # The scope and the text of each failure, oldest first.
        self._failures: dict[tuple[str, str], _Failure] = {}

    def is_due(self, scope: str, text: str) -> bool:
        """Whether to log a failure now. If so, it counts as logged.

        Args:
            scope: the failures that end together with this one.
            text: what distinguishes it from others of that scope.
        """
        now_sec = self._reactor.seconds()
        failure = self._failures.pop((scope, text), None)
        is_due = failure is None or (
            failure.is_over and now_sec >= failure.logged_sec + LOG_AGAIN_SEC
        )
        if failure is None or is_due:
            failure = _Failure(now_sec)
        if len(self._failures) >= MAX_FAILURES:
            self._failures.pop(next(iter(self._failures)))
        self._failures[scope, text] = failure
        return is_due

    def end(self, scope: str) -> bool:
        """Notes that the failures of a scope are over.

        Returns:
            Whether one of them was logged and had not ended yet.
        """
        ended = [
            failure
            for (failure_scope, _), failure in self._failures.items()
            if failure_scope == scope and not failure.is_over
        ]
        for failure in ended:
            failure.is_over = True
        return bool(ended)
