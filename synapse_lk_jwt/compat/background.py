# SPDX-License-Identifier: Apache-2.0
"""Functions that run outside of any request."""

import logging
from collections.abc import Awaitable, Callable

from synapse.module_api import ModuleApi

logger = logging.getLogger(__name__)


class Background:
    """Runs functions as Synapse's background processes, each with its own log context."""

    def __init__(self, api: ModuleApi, database_error: type[Exception]) -> None:
        """
        Args:
            api: Synapse's module API.
            database_error: the base class of the exceptions that the database driver raises.
        """
        self._api = api
        self._database_error = database_error
        self.sleep = api.sleep

    def repeat(
        self,
        interval_ms: int,
        desc: str,
        func: Callable[[], Awaitable[None]],
        *,
        at_once: bool = False,
        run_on_all_instances: bool = False,
    ) -> None:
        """Calls a function at an interval, on the process that runs background tasks.

        Args:
            interval_ms: milliseconds between two calls, and before the first. A call that takes
                longer delays the next one.
            desc: a name for Synapse's metrics and log.
            func: the function.
            at_once: whether the first call happens as soon as Synapse has started.
            run_on_all_instances: whether each process calls the function.
        """
        if not self._api.should_run_background_tasks() and not run_on_all_instances:
            return

        async def run() -> None:
            await self._log_database_errors(desc, func)

        self._api.looping_background_call(
            run, interval_ms, desc=desc, run_on_all_instances=run_on_all_instances
        )
        if at_once:
            self._api.delayed_background_call(min(interval_ms, 1000), run, desc=desc)

    def run(self, desc: str, func: Callable[..., Awaitable[None]], *args: object) -> None:
        """Starts an async function. The caller does not wait for it."""
        self._api.run_as_background_process(desc, self._log_database_errors, desc, func, *args)

    def run_at_shutdown(self, desc: str, func: Callable[[], Awaitable[None]]) -> None:
        """Calls a function when Synapse stops, on the process that runs background tasks.

        Synapse does not wait for the function. But Twisted's thread pools run all queued calls
        before they end, so the first transaction that the function starts is completed.

        Args:
            desc: a name for Synapse's metrics and log.
            func: the function.
        """
        if self._api.should_run_background_tasks():
            self._api._hs.register_async_shutdown_handler(
                phase="before", eventType="shutdown", shutdown_func=self.run, desc=desc, func=func
            )

    async def _log_database_errors(
        self, desc: str, func: Callable[..., Awaitable[None]], *args: object
    ) -> None:
        """Logs one line, and no traceback, while the database is unavailable."""
        try:
            await func(*args)
        except self._database_error as e:
            logger.error(
                "The background task %s failed because of the database: %s: %s",
                desc,
                type(e).__name__,
                e,
            )
