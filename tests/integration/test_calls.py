# SPDX-License-Identifier: Apache-2.0
"""The promise of the README: real homeservers, a real SFU, real clients that hear each other."""

import asyncio
from pathlib import Path

import pytest

from demo.story import Story
from testbed import service
from testbed.call import CallRefused, Participant
from testbed.matrix import User
from testbed.process import MissingTool
from testbed.sets import Homeservers
from testbed.skips import missing_tool
from testbed.stage import Stage


def test_the_demo_tells_the_truth(tmp_path: Path) -> None:
    try:
        stage = Stage(tmp_path)
    except MissingTool as e:
        missing_tool(e)
    try:
        stage.start()
        asyncio.run(Story(stage).run(keep=False))
    finally:
        stage.stop()


def test_each_hears_the_other_on_both_sfus_with_tokens_that_came_over_federation(
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

    # Each publishes on the own homeserver's SFU, and listens on the other's.
    publishing = [
        token(alice, a, homeservers.a.server_name),
        token(rita, b, homeservers.b.server_name),
    ]
    listening = [
        token(alice, b, homeservers.b.server_name),
        token(rita, a, homeservers.a.server_name),
    ]

    async def call() -> None:
        people = [
            await Participant.join(a, publishing[0]),
            await Participant.join(b, publishing[1]),
            await Participant.join(b, listening[0]),
            await Participant.join(a, listening[1]),
        ]
        alice_speaks, rita_speaks, alice_listens, rita_listens = people
        await alice_speaks.publish_tone()
        await rita_speaks.publish_tone()
        await asyncio.gather(
            alice_listens.hear(rita_speaks.identity), rita_listens.hear(alice_speaks.identity)
        )
        for person in people:
            await person.leave()

    asyncio.run(call())


def test_a_restricted_server_joins_over_federation_what_it_cannot_start(
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

    with pytest.raises(CallRefused, match="requested room does not exist"):
        asyncio.run(join())

    own = service.homeserver_body(alice, room_id, livekit.url)
    service.homeserver_get_token(alice, own, "unstable/io.element.msc4195").ok()
    asyncio.run(join())
