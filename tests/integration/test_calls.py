# SPDX-License-Identifier: Apache-2.0
"""Calls between two homeservers, in which LiveKit's own clients hear each other."""

import asyncio
from pathlib import Path

import pytest

from demo.story import Story
from testbed import service
from testbed.call import CallRejected, Participant
from testbed.matrix import User
from testbed.sets import Homeservers
from testbed.stage import Stage


def test_demo_run_completes_every_step(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    try:
        stage.start()
        asyncio.run(Story(stage).run(keep=False))
    finally:
        stage.stop()


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
