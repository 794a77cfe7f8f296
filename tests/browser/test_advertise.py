# SPDX-License-Identifier: Apache-2.0
"""Element Call 0.26.1 where the homeserver announces more than the service, or something else.

It takes the first entry of type `livekit` and skips others, so `service` and `both` are the same to
it: all other tests of calls run with `service`.
"""

from collections.abc import Iterator

import pytest
from test_calls import MODES, call_of_two, in_the_call

from realparts.browser import Scene
from realparts.process import MissingTool, wait_until
from realparts.skips import missing_tool
from realparts.stage import BrowserStage


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserStage]:
    try:
        stage = BrowserStage(tmp_path_factory.mktemp("advertise"), advertise="both")
    except MissingTool as e:
        missing_tool(e)
    try:
        stage.start()
        yield stage
    finally:
        stage.stop()


@pytest.fixture
def msc4195_only(stage: BrowserStage) -> Iterator[None]:
    """Has A announce MSC4195's endpoints alone."""
    assert stage.a.module_config is not None
    before = stage.a.module_config
    stage.a.module_config = {**before, "advertise": "msc4195"}
    stage.a.restart()
    yield
    stage.a.module_config = before
    stage.a.restart()


@pytest.mark.parametrize("mode", MODES)
def test_call_with_both_announced_connects_and_a_closed_tab_leaves(mode: str, scene: Scene) -> None:
    alice, bob, room_id = call_of_two(scene, mode)
    # The leave is delegated, though the service's own endpoint denies it to an empty request.
    assert [url for url in bob.requests if "org.matrix.msc4140.delay=3600000" in url] != []
    # A client that leaves within two seconds is looked for once more.
    bob.wait_for_videos(2, frames=40)
    bob.close_tab()
    wait_until(
        lambda: in_the_call(alice.user, room_id) == {alice.user.user_id}, "end of Bob's membership"
    )
    alice.wait_for_videos(1)


def test_call_with_msc4195_announced_alone_is_not_supported(
    scene: Scene, msc4195_only: None
) -> None:
    alice = scene.of_a("alice")
    person = scene.person(alice, matrix_rtc_mode="matrix_2_0")
    person.open(scene.stage.room(alice))
    person.join()
    person.wait_for_text("Call is not supported")
