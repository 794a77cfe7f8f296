# SPDX-License-Identifier: Apache-2.0
"""MSC4195's endpoints with the newest matrix-js-sdk."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from synapse_lk_jwt.discovery import Advertise, transports
from synapse_lk_jwt.livekit.naming import livekit_room_name, member_identity
from testbed import service
from testbed.cache import npm_packages
from testbed.call import Participant
from testbed.matrix import User
from testbed.process import MissingTool, wait_until
from testbed.stage import Stage

PROJECT = Path(__file__).resolve().parent / "js-sdk"
PREFIX = "/_matrix/client/unstable/io.element.msc4195/rtc/livekit"
MEMBER = "org.matrix.msc3401.call.member"
HOUR_MS = 3_600_000


class Sdk:
    """matrix-js-sdk in Node."""

    def __init__(self) -> None:
        node = shutil.which("node")
        if node is None:
            raise MissingTool("Node.js is missing: install it to run matrix-js-sdk")
        index = npm_packages(PROJECT) / "matrix-js-sdk" / "lib" / "index.js"
        self._command = [node, str(PROJECT / "call.mjs"), str(index)]

    def call(self, user: User, *calls: list[Any]) -> tuple[list[Any], list[Any]]:
        """Call methods of the user's client, and return their results and all requests."""
        client = {
            "baseUrl": user.client_url,
            "userId": user.user_id,
            "deviceId": user.device_id,
            "accessToken": user.access_token,
        }
        done = subprocess.run(
            self._command,
            input=json.dumps({"client": client, "calls": calls}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        answer = json.loads(done.stdout.rstrip().rpartition("\n")[2])
        return answer["results"], answer["requests"]


@pytest.fixture(scope="module")
def sdk() -> Sdk:
    return Sdk()


@pytest.fixture(scope="module", params=["service", "both", "msc4195"])
def advertise(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


@pytest.fixture(scope="module")
def two(advertise: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("two"), advertise=advertise)
    try:
        stage.start()
        yield stage
    finally:
        stage.stop()


def body(user: User, room_id: str, **more: str) -> dict[str, Any]:
    """The body that the types of the SDK require."""
    member = {"id": "some-member", "claimed_device_id": user.device_id}
    return {"room_id": room_id, "slot_id": service.SLOT, "member": member, **more}


def test_sdk_get_token_for_own_and_remote_sfu_connects(
    sdk: Sdk, two: Stage, advertise: str
) -> None:
    alice, rita = two.a.register("alice1"), two.b.register("rita1")
    room_id = alice.create_room(invite=[rita.user_id])
    rita.join(room_id, via=[two.a.server_name])

    [found], _ = sdk.call(alice, ["_unstable_getRTCTransports"])
    url = two.livekit.url
    assert found == transports(Advertise(advertise), url, two.service_url)
    # The application passes the URL of the SFU to the SDK.
    a = {"url": url, "server_name": two.a.server_name}
    # Alice need not name her own homeserver. For Rita, the SFU belongs to another homeserver.
    for user, asked in (
        (alice, body(alice, room_id, url=url)),
        (alice, body(alice, room_id, **a)),
        (rita, body(rita, room_id, **a)),
    ):
        [result], [request] = sdk.call(user, ["_unstable_getLivekitToken", asked])
        said = service.claims(result["jwt"])
        assert said["sub"] == member_identity(user.user_id, "some-member")
        assert said["video"]["room"] == livekit_room_name(room_id, service.SLOT)
        assert request == {
            "method": "POST",
            "path": f"{PREFIX}/get_token",
            "authorization": f"Bearer {user.access_token}",
            "body": asked,
        }


def test_sdk_get_token_without_access_raises_a_matrix_error(sdk: Sdk, two: Stage) -> None:
    alice, rita = two.a.register("alice2"), two.b.register("rita2")
    room_id = alice.create_room(invite=[rita.user_id])
    other_sfu = body(alice, room_id, url="wss://elsewhere.example.com")
    other_server = body(
        alice, room_id, url="wss://sfu-of-b.example.com", server_name=two.b.server_name
    )
    results, _ = sdk.call(
        alice,
        ["_unstable_getLivekitToken", other_sfu],
        # B is not in the room.
        ["_unstable_getLivekitToken", other_server],
        ["_unstable_delegateDelayedLeave", {**other_sfu, "delay_id": "syd_x"}],
        [
            "_unstable_delegateDelayedLeave",
            {**body(alice, room_id, url=two.livekit.url), "delay_id": "syd_unknown"},
        ],
    )
    not_found, invalid, forbidden = (
        {"status": 404, "errcode": "M_NOT_FOUND"},
        {"status": 400, "errcode": "M_INVALID_PARAM"},
        {"status": 403, "errcode": "M_FORBIDDEN"},
    )
    assert results == [not_found, forbidden, invalid, invalid]


def test_sdk_delegated_leave_of_closed_client_is_sent(sdk: Sdk, two: Stage) -> None:
    alice = two.a.register("alice3")
    room_id = alice.create_room()
    key = f"_{alice.user_id}_{alice.device_id}"
    asked = body(alice, room_id, url=two.livekit.url)
    [token, delayed, _], _ = sdk.call(
        alice,
        ["_unstable_getLivekitToken", asked],
        ["_unstable_sendDelayedStateEvent", room_id, {"delay": HOUR_MS}, MEMBER, {}, key],
        ["sendStateEvent", room_id, MEMBER, {"application": "m.call"}, key],
    )
    handed_over = {**asked, "delay_id": delayed["delay_id"]}

    async def call() -> None:
        there = await Participant.join(two.livekit.url, token["jwt"])
        [result], [request] = sdk.call(alice, ["_unstable_delegateDelayedLeave", handed_over])
        await there.leave()
        assert result == {}
        assert (request["path"], request["body"]) == (
            f"{PREFIX}/delegate_delayed_leave",
            handed_over,
        )

    # In its own thread, because Playwright has an event loop in this one.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, call()).result()
    # The module waits for participants who leave within two seconds, as some reconnect at once.
    wait_until(lambda: alice.state(room_id, MEMBER, key) == {}, "end of the membership")
