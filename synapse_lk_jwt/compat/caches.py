# SPDX-License-Identifier: Apache-2.0
"""Synapse's caches."""

from inspect import signature
from typing import Any

from synapse.util.caches.response_cache import ResponseCache, ResponseCacheContext
from synapse.util.clock import Clock

__all__ = ["Caches", "ResponseCacheContext"]


class Caches:
    """Creates caches that Synapse's metrics and cache factors include."""

    def __init__(self, clock: Clock, server_name: str) -> None:
        self._clock = clock
        self._server_name = server_name

    def response_cache(self, name: str, remember_ms: int) -> ResponseCache[Any]:
        """A cache that shares requests in flight, and keeps their results for `remember_ms`."""
        if "timeout" in signature(ResponseCache).parameters:
            from synapse.util.duration import Duration

            timeout: dict[str, Any] = {"timeout": Duration(milliseconds=remember_ms)}
        else:
            timeout = {"timeout_ms": remember_ms}
        return ResponseCache(
            clock=self._clock,
            name=name,
            server_name=self._server_name,
            enable_logging=False,
            **timeout,
        )
