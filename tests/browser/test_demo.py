# SPDX-License-Identifier: Apache-2.0
"""`./run demo --browser` works as it prints. This test takes the pictures for the docs."""

import re
import subprocess
from pathlib import Path

from playwright.sync_api import Browser, Page

from demo.browser import BrowserStory
from testbed.browser import BrowserUser, Scene

CAMERA = (Path(__file__).resolve().parent / "camera.js").read_text()
# Good enough for the pictures, although the machine has no graphics card.
MEDIA = {"video": {"max_resolution": 360, "max_framerate": 10, "simulcast_layers": []}}
COLOURS = ["#7fb8ad", "#d9b26f", "#b39ac9"]


def test_browser_demo_followed_to_the_letter_behaves_as_printed(
    scene: Scene, browser: Browser, pictures: Path
) -> None:
    story = BrowserStory(scene.stage, media_quality=MEDIA)
    text = story.text()
    log = scene.stage.a.main
    before = log.log_size()
    participants: list[BrowserUser] = []
    for page, colour in zip(story.pages, COLOURS, strict=True):
        participant = scene.open_browser(page)
        participant.page.add_init_script(f"({CAMERA})({colour!r})")
        participants.append(participant)
    alice, bob, rita = participants
    links = dict(re.findall(r"^  (Alice|Bob|Rita) +(http\S+)$", text, re.MULTILINE))

    rita.follow(links["Rita"])
    rita.join()
    rita.wait_for_text("Call creation might be restricted to authorized users only.")
    take(rita.page, pictures / "restricted.png")

    alice.follow(links["Alice"])
    alice.join()
    alice.wait_for_videos(1)
    for participant, name in ((rita, "Rita"), (bob, "Bob")):
        participant.follow(links[name])
        participant.join()
    for participant in participants:
        participant.wait_for_videos(3)
    take(alice.page, pictures / "call.png")

    [kick] = re.findall(r"^ +(curl .*/kick'$)", text, re.MULTILINE)
    subprocess.run(["sh", "-c", kick], capture_output=True, timeout=30, check=True)
    bob.wait_for_text("You have been removed from the call")
    alice.wait_for_videos(2)
    bob.follow(links["Bob"])
    bob.join()
    bob.wait_for_videos(3)
    assert "Removed '@bob:" in log.log_text(before)


def take(page: Page, place: Path) -> None:
    place.parent.mkdir(exist_ok=True)
    page.screenshot(path=place)
    assert place.stat().st_size < 200_000
