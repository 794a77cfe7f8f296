# SPDX-License-Identifier: Apache-2.0
"""`./run demo --browser` works as it prints. This test takes the pictures for the docs."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from demo.browser import BrowserStory
from demo.self_check import SelfCheck
from demo.story import print_check
from testbed.browser import BrowserUser, Scene
from testbed.recording import Recording

CAMERA = (Path(__file__).resolve().parent / "camera.js").read_text()
# Good enough for the pictures, although the machine has no graphics card.
MEDIA = {"video": {"max_resolution": 360, "max_framerate": 10, "simulcast_layers": []}}
COLOURS = ["#7fb8ad", "#d9b26f", "#b39ac9"]
MEGABYTE = 1_000_000


def test_browser_demo_followed_to_the_letter_behaves_as_printed(
    scene: Scene, pictures: Path
) -> None:
    print_check(SelfCheck(scene.stage.a))
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
    rita.page.screenshot(path=pictures / "restricted.png")

    recording = Recording(alice.page)
    record_joins(recording, alice, links["Alice"], {rita: links["Rita"], bob: links["Bob"]})
    for participant in participants:
        participant.wait_for_videos(3)
    recording.film(1.6)

    [kick] = re.findall(r"^ +(curl .*/kick'$)", text, re.MULTILINE)
    subprocess.run(["sh", "-c", kick], capture_output=True, timeout=30, check=True)
    recording.film_until(shows(alice, 2))
    recording.film(1)
    recording.save(pictures / "call.webp")
    assert (pictures / "call.webp").stat().st_size < 3 * MEGABYTE
    bob.wait_for_text("You have been removed from the call")
    alice.wait_for_videos(2)
    bob.follow(links["Bob"])
    bob.join()
    bob.wait_for_videos(3)
    assert "Removed '@bob:" in log.log_text(before)


def record_joins(
    recording: Recording, alice: BrowserUser, link: str, others: dict[BrowserUser, str]
) -> None:
    """Record how Alice and then the others join. The others have their own links."""
    alice.follow(link)
    alice.wait_for_text("Join call")
    recording.film(1)
    alice.join()
    recording.film_until(shows(alice, 1))
    recording.film(1.2)
    for videos, (other, others_link) in enumerate(others.items(), 2):
        other.follow(others_link)
        other.join()
        recording.film_until(shows(alice, videos))
        recording.film(1.6)


def shows(user: BrowserUser, videos: int) -> Callable[[], bool]:
    return lambda: len(user.frames()) == videos
