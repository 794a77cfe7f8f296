# SPDX-License-Identifier: Apache-2.0
"""Calls in Element Call: users see each other, and leave the call in every way."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser

from testbed.browser import BrowserUser, Scene
from testbed.matrix import User
from testbed.process import wait_until
from testbed.stage import BrowserStage

MODES = ["compatibility", "matrix_2_0"]


def call_of_two(scene: Scene, mode: str) -> tuple[BrowserUser, BrowserUser, str]:
    """Start a call of Alice and Bob, who see each other's video, in a new Matrix room."""
    alice, bob = scene.of_a("alice"), scene.of_a("bob")
    room_id = scene.stage.room(alice, bob)
    participants = [scene.browser_user(user, matrix_rtc_mode=mode) for user in (alice, bob)]
    for participant in participants:
        participant.open(room_id)
    for participant in participants:
        participant.join()
    for participant in participants:
        participant.wait_for_videos(2)
    return participants[0], participants[1], room_id


def in_the_call(user: User, room_id: str) -> set[str]:
    """The users with a membership of the call in the Matrix room."""
    state = user.call("GET", f"/_matrix/client/v3/rooms/{room_id}/state").ok()
    senders = {
        event["sender"]
        for event in state
        if event["type"] == "org.matrix.msc3401.call.member" and event["content"]
    }
    # In `matrix_2_0` memberships are messages. The last message with a sticky key is in effect.
    last: dict[tuple[str, str], Any] = {}
    for event in reversed(user.timeline(room_id)):
        if event["type"] == "org.matrix.msc4143.rtc.member":
            content = event["content"]
            last[event["sender"], content["msc4354_sticky_key"]] = content
    return senders | {sender for (sender, _), content in last.items() if "application" in content}


def on_the_sfu(scene: Scene) -> int:
    livekit = scene.stage.livekit
    return sum(len(livekit.participants(room["name"])) for room in livekit.rooms())


def livekit_rooms(scene: Scene) -> set[str]:
    return {room["sid"] for room in scene.stage.livekit.rooms()}


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer. pytest shows the time with `-s` and when a test fails."""
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    print(f"took {took:.2f} s")
    assert took < seconds


@pytest.mark.parametrize("mode", MODES)
def test_call_of_two_ends_for_both_after_hangup(mode: str, scene: Scene) -> None:
    alice, bob, room_id = call_of_two(scene, mode)
    assert on_the_sfu(scene) == 2
    assert in_the_call(alice.user, room_id) == {alice.user.user_id, bob.user.user_id}

    bob.hang_up()

    alice.wait_for_videos(1)
    wait_until(
        lambda: in_the_call(alice.user, room_id) == {alice.user.user_id}, "end of Bob's membership"
    )
    assert on_the_sfu(scene) == 1


@pytest.mark.parametrize("mode", MODES)
def test_closed_tab_is_removed_from_the_call_within_two_seconds(mode: str, scene: Scene) -> None:
    alice, bob, room_id = call_of_two(scene, mode)
    # Without the module, the leave would be sent after an hour.
    scheduled = [url for url in bob.requests if "org.matrix.msc4140.delay=" in url]
    assert ["org.matrix.msc4140.delay=3600000" in url for url in scheduled] == [True]

    # The module waits for participants who leave within two seconds, as some reconnect at once.
    bob.wait_for_videos(2, frames=40)

    with within(2):
        bob.close_tab()
        wait_until(
            lambda: in_the_call(alice.user, room_id) == {alice.user.user_id},
            "end of Bob's membership",
        )

    alice.wait_for_videos(1)


def test_crashed_tab_is_removed_when_livekit_notices(scene: Scene) -> None:
    alice, bob, room_id = call_of_two(scene, "compatibility")

    bob.crash()
    wait_until(lambda: on_the_sfu(scene) == 1, "end of Bob's connection", timeout=60)
    with within(2):
        wait_until(
            lambda: in_the_call(alice.user, room_id) == {alice.user.user_id},
            "end of Bob's membership",
        )

    alice.wait_for_videos(1)


@pytest.mark.parametrize("mode", MODES)
def test_kick_of_a_user_ends_the_users_call_within_a_second(mode: str, scene: Scene) -> None:
    alice, bob, room_id = call_of_two(scene, mode)

    alice.user.kick(room_id, bob.user.user_id)
    with within(1):
        wait_until(lambda: bob.frames() == [], "end of the videos at Bob's")
        wait_until(lambda: on_the_sfu(scene) == 1, "end of Bob's connection")

    bob.wait_for_text("You have been removed from the call")
    alice.wait_for_videos(1)


def test_kick_without_sync_ends_the_call_of_the_page(scene: Scene) -> None:
    alice, bob, room_id = call_of_two(scene, "compatibility")
    bob.block_sync(lambda: alice.user.send_text(room_id, "Bob's last news"))

    alice.user.kick(room_id, bob.user.user_id)
    with within(1):
        wait_until(lambda: bob.frames() == [], "end of the videos at Bob's")
        assert on_the_sfu(scene) == 1


@pytest.fixture(params=[False, True], ids=["auto_create=false", "auto_create=true"])
def auto_create(request: pytest.FixtureRequest, stage: BrowserStage) -> Iterator[bool]:
    """Run a test with each value of LiveKit's `auto_create`."""
    livekit = stage.livekit
    if request.param != livekit.auto_create:
        livekit.auto_create = request.param
        livekit.restart()
    yield request.param
    if livekit.auto_create:
        livekit.auto_create = False
        livekit.restart()


@pytest.mark.parametrize("mode", MODES)
def test_restricted_user_can_join_a_running_call_and_start_none(
    mode: str, auto_create: bool, scene: Scene
) -> None:
    alice, rita = scene.of_a("alice"), scene.of_b("rita")
    room_id = scene.stage.room(alice, rita)
    rita_there, alice_there = (scene.browser_user(u, matrix_rtc_mode=mode) for u in (rita, alice))

    before = livekit_rooms(scene)

    rita_there.open(room_id)
    rita_there.join()
    rita_there.wait_for_text(
        "Failed to connect to Livekit server"
        if auto_create
        else "Call creation might be restricted to authorized users only."
    )
    assert livekit_rooms(scene) <= before

    alice_there.open(room_id)
    alice_there.join()
    alice_there.wait_for_videos(1)
    rita_there.open(room_id)
    rita_there.join()
    for participant in (rita_there, alice_there):
        participant.wait_for_videos(2)
    assert on_the_sfu(scene) == 2


def test_call_after_livekit_restart_reconnects(scene: Scene) -> None:
    livekit = scene.stage.livekit
    alice = scene.of_a("alice")
    room_id = scene.stage.room(alice)
    participant = scene.browser_user(alice)
    livekit.stop()
    try:
        participant.open(room_id)
        participant.join()
        participant.wait_for_text("Something went wrong")
    finally:
        livekit.start()
        livekit.wait_ready()

    participant.open(room_id)
    participant.join()
    participant.wait_for_videos(1)


# Homeservers with other values of `advertise`. Element Call 0.26.1 uses the first entry of type
# `livekit` and skips the others, so that few tests are needed.


@pytest.fixture(scope="module")
def other_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserStage]:
    stage = BrowserStage(tmp_path_factory.mktemp("advertise"), advertise="both")
    try:
        stage.start()
        yield stage
    finally:
        stage.stop()


@pytest.fixture
def both(browser: Browser, other_stage: BrowserStage) -> Iterator[Scene]:
    """The users of a homeserver with `advertise: both`."""
    scene = Scene(browser, other_stage)
    yield scene
    scene.end()


@pytest.fixture
def msc4195(both: Scene) -> Iterator[Scene]:
    """The users of a homeserver with `advertise: msc4195`."""
    homeserver = both.stage.a
    before = homeserver.module_config
    homeserver.module_config = {**(before or {}), "advertise": "msc4195"}
    homeserver.restart()
    yield both
    homeserver.module_config = before
    homeserver.restart()


@pytest.mark.parametrize("mode", MODES)
def test_call_with_both_transports_announced_connects_and_closed_tab_leaves(
    mode: str, both: Scene
) -> None:
    alice, bob, room_id = call_of_two(both, mode)
    # Element Call also delegates its leave if `advertise` is not `service`.
    assert [url for url in bob.requests if "org.matrix.msc4140.delay=3600000" in url] != []
    # The module waits for participants who leave within two seconds, as some reconnect at once.
    bob.wait_for_videos(2, frames=40)
    bob.close_tab()
    wait_until(
        lambda: in_the_call(alice.user, room_id) == {alice.user.user_id}, "end of Bob's membership"
    )
    alice.wait_for_videos(1)


def test_call_with_only_msc4195_announced_is_not_supported(msc4195: Scene) -> None:
    alice = msc4195.of_a("alice")
    participant = msc4195.browser_user(alice, matrix_rtc_mode="matrix_2_0")
    participant.open(msc4195.stage.room(alice))
    participant.join()
    participant.wait_for_text("Call is not supported")
