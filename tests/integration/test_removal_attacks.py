# SPDX-License-Identifier: Apache-2.0
"""Participants that try to avoid their removal, or to slow down the homeserver."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
from livekit import rtc

from testbed import service
from testbed.http import http
from testbed.livekit import LiveKit
from testbed.matrix import User
from testbed.member import POWER_LEVELS, enter
from testbed.process import until, wait_until
from testbed.sets import one_homeserver
from testbed.signalling import Signalling
from testbed.synapse import Synapse

POLL_SEC = 2

# How long a removal may take while the participant obstructs it.
REMOVED_SEC = 15
ANSWER_SEC = 0.5

number = iter(range(10_000))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Synapse, LiveKit]]:
    directory = tmp_path_factory.mktemp("attacks")
    with one_homeserver(directory, "r", sanity_check_interval=f"{POLL_SEC}s") as (synapse, livekit):
        yield synapse, livekit
        log = synapse.log_text()
    assert "Traceback" not in log
    # No participant may cause a log line that says that LiveKit failed.
    assert "cannot be used" not in log
    assert "rejected RemoveParticipant" not in log


@pytest.fixture
def synapse(one: tuple[Synapse, LiveKit]) -> Synapse:
    return one[0]


@pytest.fixture
def livekit(one: tuple[Synapse, LiveKit]) -> LiveKit:
    return one[1]


def users_in_room(synapse: Synapse, *names: str) -> tuple[str, list[User]]:
    """Create users in one room, of which the first one is the creator."""
    users = [synapse.register(f"{name}{next(number)}") for name in names]
    room_id = users[0].create_room(power_levels=POWER_LEVELS, preset="public_chat")
    for user in users[1:]:
        user.join(room_id)
    return room_id, users


def token(user: User, room_id: str, device: str = "") -> str:
    body = service.sfu_get_body(user, room_id, device_id=device or user.device_id)
    jwt: str = service.post(user.client_url, "/sfu/get", body).ok()["jwt"]
    return jwt


def livekit_room(jwt: str) -> str:
    room: str = service.claims(jwt)["video"]["room"]
    return room


def identities(livekit: LiveKit, room: str) -> list[str]:
    return [participant["identity"] for participant in livekit.participants(room)]


def bytes_of_names(livekit: LiveKit, room: str) -> int:
    """The length of the names of all tracks in a room together."""
    tracks = [track for p in livekit.participants(room) for track in p.get("tracks", [])]
    return sum(len(track.get("name", "")) for track in tracks)


@contextlib.contextmanager
def answers_in_time(synapse: Synapse) -> Iterator[None]:
    """Sends trivial requests one after the other, and fails if an answer takes too long."""
    slowest = 0.0
    is_over = threading.Event()

    def ask() -> None:
        nonlocal slowest
        while not is_over.is_set():
            began = time.monotonic()
            http("GET", f"{synapse.client_url}/_matrix/client/versions", timeout=60.0).ok()
            slowest = max(slowest, time.monotonic() - began)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    assert slowest < ANSWER_SEC, slowest


def test_poll_of_duplicate_connections_with_identities_of_250_kilobytes_does_not_block_synapse(
    synapse: Synapse, livekit: LiveKit
) -> None:
    room_id, (alice, mallory) = users_in_room(synapse, "alice", "mallory")
    room = livekit_room(token(alice, room_id))
    jwt = token(mallory, room_id)
    with answers_in_time(synapse):
        duplicates = [
            Signalling(livekit.url, jwt, publish=f"{n}" + "%23" * 250_000) for n in range(3)
        ]
        assert [duplicate.status for duplicate in duplicates] == [101] * 3
        wait_until(
            lambda: all(len(identity) < 1_000 for identity in identities(livekit, room)),
            "removal of the long identities",
            REMOVED_SEC,
        )
    for duplicate in duplicates:
        duplicate.close()


def test_ban_with_20_megabytes_of_identities_listed_removes_the_user(
    synapse: Synapse, livekit: LiveKit
) -> None:
    room_id, (alice, mallory, bob) = users_in_room(synapse, "alice", "mallory", "bob")
    room = livekit_room(token(alice, room_id))
    duplicates = []
    jwts = [token(mallory, room_id), token(bob, room_id)]
    there = Signalling(livekit.url, jwts[1])
    try:
        with answers_in_time(synapse):
            duplicates += [
                Signalling(livekit.url, jwts[0], publish=f"{n}" + "%23" * 330_000)
                for n in range(60)
            ]
            duplicates.append(Signalling(livekit.url, jwts[0]))
            assert {duplicate.status for duplicate in duplicates} == {101}
            began = time.monotonic()
            alice.ban(room_id, mallory.user_id)
            alice.kick(room_id, bob.user_id)
            wait_until(lambda: not identities(livekit, room), "empty room", REMOVED_SEC)
            print(f"removed after {time.monotonic() - began:.1f} s")
    finally:
        for duplicate in [*duplicates, there]:
            duplicate.close()


def test_ban_with_track_names_of_6_megabytes_removes_the_user_and_sends_other_leaves(
    synapse: Synapse, livekit: LiveKit
) -> None:
    async def test() -> None:
        room_id, (alice, mallory, bob, carl) = users_in_room(
            synapse, "alice", "mallory", "bob", "carl"
        )
        room = livekit_room(token(alice, room_id))
        leaving = await enter(carl, room_id, livekit, 3_600_000)
        kicked = Signalling(livekit.url, token(bob, room_id))
        rooms = []
        for device in ("ONE", "TWO", "THREE"):
            client = rtc.Room()
            await client.connect(livekit.url, token(mallory, room_id, device))
            source = rtc.AudioSource(48_000, 1)
            name = device[0] * 6_000_000
            track = rtc.LocalAudioTrack.create_audio_track(name, source)
            await client.local_participant.publish_track(track)
            rooms.append(client)
        await until(lambda: bytes_of_names(livekit, room) >= 18_000_000, "long names")
        with answers_in_time(synapse):
            await asyncio.to_thread(alice.kick, room_id, bob.user_id)
            await until(
                lambda: not any(i.startswith(bob.user_id) for i in identities(livekit, room)),
                "removal of the other user",
                REMOVED_SEC,
            )
            await leaving.there.leave()
            await until(lambda: not leaving.is_in_room(alice), "delegated leave", REMOVED_SEC)
            await asyncio.to_thread(alice.ban, room_id, mallory.user_id)
            await until(lambda: not any(r.isconnected() for r in rooms), "removal", REMOVED_SEC)
        kicked.close()
        for client in rooms:
            await client.disconnect()

    asyncio.run(test())


def test_banned_user_without_media_is_removed_within_seconds_each_time(
    synapse: Synapse, livekit: LiveKit
) -> None:
    room_id, (alice, mallory) = users_in_room(synapse, "alice", "mallory")
    jwt = token(mallory, room_id)
    # Another participant keeps the room.
    listener = Signalling(livekit.url, token(alice, room_id))
    alice.ban(room_id, mallory.user_id)
    for _ in range(3):
        silent = Signalling(livekit.url, jwt)
        assert silent.status == 101
        wait_until(
            lambda: service.claims(jwt)["sub"] not in identities(livekit, livekit_room(jwt)),
            "removal of the silent participant",
            5,
        )
        silent.close()
    listener.close()


@pytest.fixture
def own_metadata(synapse: Synapse) -> Iterator[None]:
    config = dict(synapse.module_config or {})
    synapse.module_config = {**config, "can_update_own_metadata": True}
    synapse.restart()
    yield
    synapse.module_config = config
    synapse.restart()


@pytest.mark.parametrize("duplicate", ["", "duplicate", "x" * 9_000])
def test_ban_of_participant_that_replaced_its_attributes_removes_it(
    duplicate: str, synapse: Synapse, livekit: LiveKit, own_metadata: None
) -> None:
    room_id, (alice, mallory) = users_in_room(synapse, "alice", "mallory")
    token(alice, room_id)
    body = service.get_token_body(mallory, room_id)
    jwt = service.post(mallory.client_url, "/get_token", body).ok()["jwt"]
    hidden = Signalling(livekit.url, jwt, publish=duplicate, attributes={"synapse_lk_jwt": "x"})
    assert hidden.status == 101
    (participant,) = livekit.participants(livekit_room(jwt))
    assert participant["attributes"] == {"synapse_lk_jwt": "x"}
    alice.ban(room_id, mallory.user_id)
    wait_until(lambda: not livekit.participants(livekit_room(jwt)), "removal", REMOVED_SEC)
    hidden.close()
