# SPDX-License-Identifier: Apache-2.0
"""Records a page as a moving picture, from screenshots."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page

_WIDTH = 900
# The viewer sees each frame for this long. A busy machine takes longer for a screenshot.
_FRAME_MS = 200
_LAST_FRAME_MS = 1500


class Recording:
    """Screenshots of one page at intervals. `film` and `film_until` block while they take them."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._frames: list[Image.Image] = []

    def film(self, seconds: float) -> None:
        """Record the page.

        Args:
            seconds: how long the viewer sees this part.
        """
        for _ in range(round(seconds * 1000 / _FRAME_MS)):
            self._take()

    def film_until(self, condition: Callable[[], bool], timeout: float = 30.0) -> None:
        """Record the page until a condition is true.

        Args:
            condition: asked after each frame.
            timeout: seconds.

        Raises:
            AssertionError: if the condition is not true in time.
        """
        end = time.monotonic() + timeout
        self._take()
        while not condition():
            assert time.monotonic() < end, "the page did not change as expected"
            self._take()

    def save(self, place: Path) -> None:
        """Write an animated WebP that repeats without end."""
        first, *others = self._frames
        first.save(
            place,
            save_all=True,
            append_images=others,
            duration=[_FRAME_MS] * len(others) + [_LAST_FRAME_MS],
            loop=0,
            quality=70,
            method=4,
        )

    def _take(self) -> None:
        start = time.monotonic()
        picture = Image.open(io.BytesIO(self._page.screenshot(type="jpeg", quality=95)))
        height = round(picture.height * _WIDTH / picture.width)
        self._frames.append(picture.resize((_WIDTH, height), Image.Resampling.LANCZOS))
        elapsed_ms = (time.monotonic() - start) * 1000
        # Playwright handles the events of its pages during this wait.
        self._page.wait_for_timeout(max(0, _FRAME_MS - elapsed_ms))
