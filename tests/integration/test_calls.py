# SPDX-License-Identifier: Apache-2.0
"""Calls between two homeservers, in which LiveKit's own clients hear each other."""

import asyncio
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from demo.story import Story, UnexpectedResult
from testbed import service
from testbed.call import CallRejected, Participant
from testbed.matrix import User
from testbed.process import Process
from testbed.sets import Homeservers
from testbed.stage import Stage

ROOT = Path(__file__).resolve().parents[2]


def test_demo_run_completes_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage(tmp_path)
    try:
        stage.start()
        asyncio.run(Story(stage).run(keep=False))
    finally:
        stage.stop()
    # The demo checks homeserver A, and prints the report.
    assert re.search(r"^    \d+ ok, 0 warnings, 0 problems$", capsys.readouterr().out, re.MULTILINE)


def test_demo_whose_check_finds_a_problem_fails_with_the_report(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.a.extra_config["max_event_delay_duration"] = None
    try:
        stage.start()
        with pytest.raises(UnexpectedResult, match="✘ delayed events"):
            asyncio.run(Story(stage).run(keep=False))
    finally:
        stage.stop()


def test_kept_demo_lists_participants_until_ctrl_c(tmp_path: Path) -> None:
    demo = Process(
        "demo",
        [sys.executable, "-m", "demo", "--keep"],
        tmp_path / "demo.log",
        directory=ROOT,
        stop_signal=signal.SIGINT,
        grace=30,
    )
    demo.start()
    try:
        demo.wait_until(lambda: "LiveKit lists 2 participants" in demo.log_text(), "both", 60)
        [kick] = re.findall(r"^ +(curl .*/kick')$", demo.log_text(), re.MULTILINE)
        subprocess.run(["sh", "-c", kick], capture_output=True, timeout=30, check=True)
        demo.wait_until(lambda: "LiveKit lists 1 participant\n" in demo.log_text(), "one", 10)
        # The terminal and tox both send Ctrl-C.
        demo.terminate()
    finally:
        demo.stop()
    assert "Traceback" not in demo.log_text()
    assert demo.log_text().endswith("\nStopped.\n")


def test_federated_tokens_of_both_sfus_carry_audio_both_ways(
    homeservers: Homeservers,
) -> None:
    alice, rita = homeservers.user_of_a(), homeservers.user_of_b()
    room_id = homeservers.room_of_both(alice, rita)
    a, b = homeservers.livekit_a.url, homeservers.livekit_b.url

    def token(user: User, url: str, server_name: str) -> str:
        body = service.homeserver_body(user, room_id, url, server_name=server_name)
        jwt = service.homeserver_get_token(user, body).ok()["jwt"]
        assert isinstance(jwt, str)
        return jwt

    # Each user publishes on their own homeserver's SFU, and listens on the other one.
    publishing = [
        token(alice, a, homeservers.a.server_name),
        token(rita, b, homeservers.b.server_name),
    ]
    listening = [
        token(alice, b, homeservers.b.server_name),
        token(rita, a, homeservers.a.server_name),
    ]

    async def call() -> None:
        participants = [
            await Participant.join(a, publishing[0]),
            await Participant.join(b, publishing[1]),
            await Participant.join(b, listening[0]),
            await Participant.join(a, listening[1]),
        ]
        alice_speaks, rita_speaks, alice_listens, rita_listens = participants
        await alice_speaks.publish_tone()
        await rita_speaks.publish_tone()
        await asyncio.gather(
            alice_listens.hear(rita_speaks.identity), rita_listens.hear(alice_speaks.identity)
        )
        for participant in participants:
            await participant.leave()

    asyncio.run(call())


def test_restricted_server_over_federation_joins_a_running_call_and_starts_none(
    homeservers: Homeservers,
) -> None:
    alice, rita = homeservers.user_of_a(), homeservers.user_of_b()
    room_id = homeservers.room_of_both(alice, rita)
    livekit = homeservers.livekit_a
    before = len(livekit.rooms())
    body = service.homeserver_body(
        rita, room_id, livekit.url, server_name=homeservers.a.server_name
    )
    ritas = service.homeserver_get_token(rita, body).ok()["jwt"]
    assert len(livekit.rooms()) == before

    async def join() -> None:
        await (await Participant.join(livekit.url, ritas)).leave()

    with pytest.raises(CallRejected, match="requested room does not exist"):
        asyncio.run(join())

    own = service.homeserver_body(alice, room_id, livekit.url)
    service.homeserver_get_token(alice, own, "unstable/io.element.msc4195").ok()
    asyncio.run(join())
