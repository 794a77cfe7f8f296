# SPDX-License-Identifier: Apache-2.0
"""People with a browser who use Element Call: real Chromium, with made-up camera and microphone."""

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
    # Nothing is to be asked of the internet.
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
)
# Enough to see that the video is alive, and no more work than that.
_LIGHT = {"video": {"max_resolution": 180, "max_framerate": 15, "simulcast_layers": []}}
_FRAMES = """
    [...document.querySelectorAll("video")].map(
        video => video.getVideoPlaybackQuality().totalVideoFrames
    )
"""

_number = itertools.count()


def find_chromium() -> str:
    """The program to start.

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
        headed: whether it has a window, for somebody to watch.

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


class Person:
    """Somebody who looks at Element Call in a browser of their own."""

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
        """Follow a link to the call in a room, without waiting for the lobby."""
        self.follow(self._element_call.link(room_id))

    def follow(self, link: str) -> None:
        """Go to an address, without waiting for the page."""
        # Going where it is already, but for what is behind the `#`, is no going for a browser.
        self.page.goto("about:blank")
        self.page.goto(link, wait_until="commit")

    def join(self) -> None:
        """Click where the lobby invites to, once it is there, and wait for nothing more."""
        self.page.get_by_test_id("lobby_joinCall").click()

    def hang_up(self) -> None:
        # The controls hide in a small window while the pointer rests.
        self.page.mouse.move(500, 650)
        self.page.get_by_test_id("incall_leave").click()

    def close_tab(self) -> None:
        """The page is gone at once: nobody is asked, and nothing that it began is waited for."""
        self.page.close()

    def crash(self) -> None:
        """The page is gone without having done anything more; LiveKit is not told, either."""
        with contextlib.suppress(PlaywrightError):
            self.page.goto("chrome://crash")

    def hear_nothing(self, news: Callable[[], object]) -> None:
        """From now on the homeserver has nothing to say to the page, which goes on waiting.

        Args:
            news: makes the homeserver answer what the page has asked already.
        """
        held: list[Route] = []
        self.page.route("**/_matrix/client/v3/sync*", lambda route: held.append(route))
        news()
        wait_until(lambda: bool(self.frames() and held), f"next sync of {self.user.user_id}")

    def frames(self) -> list[int]:
        """How many frames each video on the page has shown so far."""
        frames = self.page.evaluate(_FRAMES)
        assert isinstance(frames, list)
        return frames

    def wait_for_videos(self, number: int, frames: int = 10, timeout: float = 30.0) -> None:
        """Wait until there are so many videos, each of which goes on by so many frames."""
        start: list[int] = []

        def go_on() -> bool:
            nonlocal start
            now = self.frames()
            # While people come and go, videos are taken away and begin anew.
            if not len(now) == len(start) == number or any(map(lt, now, start)):
                start = now
                return False
            return all(n - s >= frames for n, s in zip(now, start, strict=True))

        wait_until(go_on, f"{number} moving videos at {self.user.user_id}", timeout)

    def wait_for_text(self, text: str, timeout: float = 30.0) -> None:
        self.page.get_by_text(text).first.wait_for(timeout=timeout * 1000)

    def write_down(self, directory: Path) -> None:
        """Write what this person sees, and what the browser's console says, into a directory."""
        name = self.user.user_id[1:].partition(":")[0]
        (directory / f"{name}-console.log").write_text("\n".join(self._console))
        # There is nothing to see if the tab is closed or has crashed.
        with contextlib.suppress(PlaywrightError):
            self.page.screenshot(path=directory / f"{name}.png", timeout=5_000)

    def leave(self) -> None:
        """Close the browser, and end Element Call."""
        self._context.close()
        self._element_call.stop()

    def _note(self, line: str) -> None:
        self._console.append(f"{time.strftime('%H:%M:%S')} {line}")


class Scene:
    """The people of one test and their browsers, on servers that the tests share."""

    def __init__(self, browser: Browser, stage: BrowserStage) -> None:
        self.stage = stage
        self.people: list[Person] = []
        self._browser = browser
        processes = [stage.livekit.process, *stage.a.processes, *stage.b.processes]
        self._logs: list[tuple[Process, int]] = [(p, p.log_size()) for p in processes]

    def of_a(self, name: str) -> User:
        return self.stage.a.register(f"{name}{next(_number)}")

    def of_b(self, name: str) -> User:
        return self.stage.b.register(f"{name}{next(_number)}")

    def person(self, user: User, **config: Any) -> Person:
        """Give the user a browser, and Element Call with this configuration."""
        return self.visitor(ElementCall(user, **{"media_quality": _LIGHT, **config}))

    def visitor(self, element_call: ElementCall) -> Person:
        """Give the user of an Element Call that has not been started a browser."""
        element_call.start()
        person = Person(self._browser, element_call)
        self.people.append(person)
        return person

    def write_down(self, directory: Path) -> None:
        """Write what all see, and the servers' logs of this test, into a directory."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        for person in self.people:
            person.write_down(directory)
        for process, since in self._logs:
            (directory / f"{process.name}.log").write_text(process.log_text(since))

    def end(self) -> None:
        for person in self.people:
            person.leave()
