# SPDX-License-Identifier: Apache-2.0
"""Users of Element Call in Chromium, with a simulated camera and microphone."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from operator import lt
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, Route, sync_playwright
from playwright.sync_api import Error as PlaywrightError

from testbed.element_call import ElementCall
from testbed.matrix import User
from testbed.process import MissingTool, Process, wait_until
from testbed.stage import BrowserStage

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    # LiveKit is on 127.0.0.1.
    "--allow-loopback-in-peer-connection",
    "--disable-features=WebRtcHideLocalIpsWithMdns",
    # The browser sends no requests to the internet.
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
)
# Enough to see that a video plays, at little CPU time.
_LIGHT = {"video": {"max_resolution": 180, "max_framerate": 15, "simulcast_layers": []}}
_FRAMES = """
    [...document.querySelectorAll("video")].map(
        video => video.getVideoPlaybackQuality().totalVideoFrames
    )
"""

_number = itertools.count()


def find_chromium() -> str:
    """The path of the installed Chromium.

    Raises:
        MissingTool
    """
    for program in _PROGRAMS:
        found = shutil.which(program)
        if found is not None:
            return found
    raise MissingTool("Chromium is missing: install Debian's package chromium")


@contextlib.contextmanager
def chromium(headed: bool = False) -> Iterator[Browser]:
    """A running browser.

    Args:
        headed: whether the browser has a window.

    Raises:
        MissingTool
    """
    program = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, headless=not headed, args=_FLAGS
        )
        try:
            yield browser
        finally:
            browser.close()


class BrowserUser:
    """A user of Element Call with their own browser context."""

    def __init__(self, browser: Browser, element_call: ElementCall) -> None:
        self.user = element_call.user
        self._element_call = element_call
        self._context = browser.new_context(viewport={"width": 1000, "height": 700})
        self.page: Page = self._context.new_page()
        self.requests: list[str] = []
        self._console: list[str] = []
        self.page.on(
            "request", lambda request: self.requests.append(f"{request.method} {request.url}")
        )
        self.page.on("console", lambda message: self._note(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self._note(f"uncaught: {error}"))

    def open(self, room_id: str) -> None:
        """Open the link to the call in a room, without waiting for the lobby."""
        self.follow(self._element_call.link(room_id))

    def follow(self, link: str) -> None:
        """Open a URL, without waiting for the page."""
        # A browser does not reload a page if only the part of the URL after `#` changes.
        self.page.goto("about:blank")
        self.page.goto(link, wait_until="commit")

    def join(self) -> None:
        """Click the join button once the lobby shows it, without waiting for the call."""
        self.page.get_by_test_id("lobby_joinCall").click()

    def hang_up(self) -> None:
        # The controls hide in a small window while the pointer rests.
        self.page.mouse.move(500, 650)
        self.page.get_by_test_id("incall_leave").click()

    def close_tab(self) -> None:
        """Close the page at once, without its unload handlers and without waiting for requests."""
        self.page.close()

    def crash(self) -> None:
        """Crash the page, so that it sends nothing more, not even a disconnect to LiveKit."""
        with contextlib.suppress(PlaywrightError):
            self.page.goto("chrome://crash")

    def block_sync(self, news: Callable[[], object]) -> None:
        """Hold back all further answers to the page's `/sync` requests.

        Args:
            news: makes the homeserver answer the `/sync` request that is under way.
        """
        held: list[Route] = []
        self.page.route("**/_matrix/client/v3/sync*", lambda route: held.append(route))
        news()
        wait_until(lambda: bool(self.frames() and held), f"next sync of {self.user.user_id}")

    def frames(self) -> list[int]:
        """The number of frames that each video on the page has shown so far."""
        frames = self.page.evaluate(_FRAMES)
        assert isinstance(frames, list)
        return frames

    def wait_for_videos(self, number: int, frames: int = 10, timeout: float = 30.0) -> None:
        """Wait until the page has `number` videos and each of them shows `frames` more frames."""
        start: list[int] = []

        def go_on() -> bool:
            nonlocal start
            now = self.frames()
            # The page replaces videos while users join and leave.
            if not len(now) == len(start) == number or any(map(lt, now, start)):
                start = now
                return False
            return all(n - s >= frames for n, s in zip(now, start, strict=True))

        wait_until(go_on, f"{number} moving videos at {self.user.user_id}", timeout)

    def wait_for_text(self, text: str, timeout: float = 30.0) -> None:
        self.page.get_by_text(text).first.wait_for(timeout=timeout * 1000)

    def write_down(self, directory: Path) -> None:
        """Write a screenshot and the browser's console into a directory."""
        name = self.user.user_id[1:].partition(":")[0]
        (directory / f"{name}-console.log").write_text("\n".join(self._console))
        # A closed or crashed tab has no screenshot.
        with contextlib.suppress(PlaywrightError):
            self.page.screenshot(path=directory / f"{name}.png", timeout=5_000)

    def leave(self) -> None:
        """Close the browser context and stop the server of Element Call."""
        self._context.close()
        self._element_call.stop()

    def _note(self, line: str) -> None:
        self._console.append(f"{time.strftime('%H:%M:%S')} {line}")


class Scene:
    """The users of one test and their browsers, on servers that the tests share."""

    def __init__(self, browser: Browser, stage: BrowserStage) -> None:
        self.stage = stage
        self.users: list[BrowserUser] = []
        self._browser = browser
        processes = [stage.livekit.process, *stage.a.processes, *stage.b.processes]
        self._logs: list[tuple[Process, int]] = [(p, p.log_size()) for p in processes]

    def of_a(self, name: str) -> User:
        return self.stage.a.register(f"{name}{next(_number)}")

    def of_b(self, name: str) -> User:
        return self.stage.b.register(f"{name}{next(_number)}")

    def browser_user(self, user: User, **config: Any) -> BrowserUser:
        """Open a browser for a user, with this configuration of Element Call."""
        return self.open_browser(ElementCall(user, **{"media_quality": _LIGHT, **config}))

    def open_browser(self, element_call: ElementCall) -> BrowserUser:
        """Start an Element Call, and open a browser for its user."""
        element_call.start()
        user = BrowserUser(self._browser, element_call)
        self.users.append(user)
        return user

    def write_down(self, directory: Path) -> None:
        """Write screenshots and consoles of all users, and the servers' logs, into a directory."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        for user in self.users:
            user.write_down(directory)
        for process, since in self._logs:
            (directory / f"{process.name}.log").write_text(process.log_text(since))

    def end(self) -> None:
        for user in self.users:
            user.leave()
