# SPDX-License-Identifier: Apache-2.0
"""The set-up of docs/scaling.md, with the configuration files of contrib/scaling."""

import asyncio
import hashlib
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing

import pytest
from google.protobuf.json_format import MessageToJson
from livekit import api
from livekit.protocol.models import ParticipantInfo, Room
from livekit.protocol.webhook import WebhookEvent

from synapse_lk_jwt.delegation.state_machine import SHORT_SESSION_MS
from synapse_lk_jwt.livekit.naming import livekit_room_name
from synapse_lk_jwt.livekit.tokens import MUST_NOT_CREATE
from testbed import service
from testbed.call import Participant
from testbed.federation import authorization
from testbed.http import Answer, WrongAnswer, http
from testbed.matrix import User
from testbed.member import MEMBER, POWER_LEVELS, Member, enter, is_kept_out
from testbed.process import until
from testbed.scaling import KEY, LIVEKIT_URL, POLL_SEC, SECRET, Node, Scaled, scaled
from testbed.sets import running
from testbed.synapse import Synapse

HOUR_MS = 3_600_000
# Less than the time in which a poll would notice a lost participant.
AT_ONCE_SEC = POLL_SEC - 0.5
# Two polls without the participant and one more request, and time for other work.
POLLS_SEC = 6 * POLL_SEC


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scaled]:
    with scaled(tmp_path_factory.mktemp("scaling")) as there:
        yield there
    assert "Traceback" not in there.synapse.log_text()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Synapse]:
    synapse = Synapse("other", tmp_path_factory.mktemp("other"), host="localhost")
    with running(synapse):
        yield synapse


def room(servers: Scaled, host: User, *guests: User, node: int | None = None) -> str:
    """Create a room in which all users may be in a call, and its LiveKit room on one node."""
    room_id = host.create_room(preset="public_chat", power_levels=POWER_LEVELS)
    for guest in guests:
        guest.join(room_id)
    if node is not None:
        servers.nodes[node].create_room(livekit_room_name(room_id, service.SLOT))
    return room_id


PROCESSES = ("main", "worker1", "worker2", "background")


@pytest.mark.parametrize("process", [*PROCESSES, "proxy"])
def test_endpoints_of_every_process_issue_tokens(
    process: str, servers: Scaled, other: Synapse
) -> None:
    alice, rita = servers.user("alice"), other.register(f"rita-of-{process}")
    room_id = room(servers, alice)
    rita.join(room_id, via=[servers.synapse.server_name])
    url = {**servers.urls, "proxy": servers.proxy_url}[process]
    for endpoint, body in (
        ("/sfu/get", service.sfu_get_body(alice, room_id)),
        ("/get_token", service.get_token_body(alice, room_id)),
        ("/get_token", service.get_token_body(rita, room_id)),
    ):
        assert service.post(url, endpoint, body).ok()["url"] == LIVEKIT_URL
    if process == "background":
        # The background worker has no listener for other requests.
        return
    body = service.homeserver_body(alice, room_id, LIVEKIT_URL)
    for prefix in ("v1", "unstable/io.element.msc4195"):
        assert service.homeserver_get_token(alice.at(url), body, prefix).ok()["jwt"]
        assert federation_get_token(other, servers, url, rita, room_id, prefix).ok()["jwt"]
    for path in ("unstable/org.matrix.msc4143", "v1"):
        answer = alice.at(url).call("GET", f"/_matrix/client/{path}/rtc/transports")
        (transport,) = answer.ok()["rtc_transports"]
        assert transport["livekit_service_url"].endswith(service.PREFIX)


def federation_get_token(
    other: Synapse, servers: Scaled, url: str, rita: User, room_id: str, prefix: str
) -> Answer:
    path = f"/_matrix/federation/{prefix}/rtc/livekit/get_token"
    body = {**service.homeserver_body(rita, room_id, LIVEKIT_URL), "user_id": rita.user_id}
    signed = authorization(other, servers.synapse.server_name, "POST", path, body)
    return http("POST", url + path, body, {"Authorization": signed})


def test_proxy_of_the_set_up_routes_module_paths_to_the_workers(servers: Scaled) -> None:
    alice = servers.user("alice")
    body = service.get_token_body(alice, room(servers, alice))
    synapse = servers.synapse
    marks = {process: process.log_size() for process in synapse.processes}
    for _ in range(4):
        service.post(servers.proxy_url, "/get_token", body).ok()
    asked = {
        process: process.log_text(marks[process]).count(f'"POST {service.PREFIX}/get_token')
        for process in synapse.processes
    }
    assert asked == {
        synapse.main: 0,
        synapse.workers["worker1"]: 2,
        synapse.workers["worker2"]: 2,
        synapse.workers["background"]: 0,
    }


@pytest.mark.parametrize("process", PROCESSES)
def test_webhook_to_any_process_takes_effect(process: str, servers: Scaled) -> None:
    alice = servers.user("alice")
    room_id = room(servers, alice)
    # The webhooks of this test report a participant that does not exist.
    jwt = service.post(
        servers.urls["main"], "/get_token", service.get_token_body(alice, room_id)
    ).ok()["jwt"]
    key = f"_{alice.user_id}"
    alice.send_state(room_id, MEMBER, {"in": "the call"}, key)
    delay_id = alice.delay_state(room_id, MEMBER, {}, key)
    body = service.get_token_body(alice, room_id, delay_id=delay_id, delay_timeout=HOUR_MS)
    service.post(servers.urls["main"], "/get_token", body).ok()
    send_webhook(servers.urls[process], "participant_joined", jwt)
    assert alice.state(room_id, MEMBER, key)
    send_webhook(servers.urls[process], "participant_left", jwt)

    async def test() -> None:
        await until(lambda: not alice.state(room_id, MEMBER, key), "leave", AT_ONCE_SEC)

    asyncio.run(test())
    assert alice.delayed() == []


def send_webhook(url: str, event: str, jwt: str) -> None:
    """Send a webhook about the participant of a token."""
    claims = service.claims(jwt)
    webhook = WebhookEvent(
        event=event,
        room=Room(name=claims["video"]["room"]),
        participant=ParticipantInfo(
            identity=claims["sub"], sid="PA_1", attributes=claims["attributes"]
        ),
    )
    body = MessageToJson(webhook).encode()
    digest = b64encode(hashlib.sha256(body).digest()).decode()
    signed = api.AccessToken(KEY, SECRET).with_sha256(digest).to_jwt()
    path = f"{url}{service.PREFIX}/sfu_webhook"
    http("POST", path, body, {"Authorization": signed}).ok()


async def both_hear(one: Participant, other: Participant) -> None:
    await asyncio.gather(one.publish_tone(), other.publish_tone())
    await asyncio.gather(one.hear(other.identity), other.hear(one.identity))


@pytest.mark.parametrize("node", [0, 1])
def test_participants_on_two_nodes_share_one_call(node: int, servers: Scaled) -> None:
    alice, bob = servers.user("alice"), servers.user("bob")
    room_id = room(servers, alice, bob, node=node)
    # The worker that issues a token need not be the one that gets the webhooks.
    node1, node2 = servers.nodes
    url1, url2 = servers.synapse.worker_urls

    async def test() -> None:
        alices = await enter(alice, room_id, node1, 3_000, url2)
        bobs = await enter(bob, room_id, node2, 3_000, url1)
        began = {user: user.delayed()[0]["running_since"] for user in (alice, bob)}
        await both_hear(alices.there, bobs.there)

        def are_kept_alive() -> bool:
            return all(
                user.delayed()[0]["running_since"] > since + 3_000 for user, since in began.items()
            )

        await until(are_kept_alive, "restarts")
        assert alices.is_in_room(alice)
        assert bobs.is_in_room(alice)
        alice.kick(room_id, bob.user_id)
        await until(lambda: not bobs.there.is_connected, "removal", 5)
        for livekit in servers.nodes:
            await is_kept_out(livekit.url, bobs.jwt)
        await alices.there.leave()
        await until(lambda: not alices.is_in_room(alice), "leave", AT_ONCE_SEC)
        assert alices.leaves_sent() == 1
        await bobs.there.leave()

    asyncio.run(test())


async def have_been_seen(servers: Scaled, *members: Member) -> None:
    """Wait until the module has seen the members for longer than a moment."""
    users = [member.user.user_id for member in members]

    def are_settled() -> bool:
        with closing(servers.postgres.connect(servers.synapse.name)) as connection:
            cursor = connection.cursor()
            cursor.execute(
                "SELECT COUNT(*) FROM synapse_lk_jwt_delegations WHERE user_id = ANY(%s)"
                " AND phase = 'connected' AND connected_ts < %s",
                (users, int(1000 * time.time()) - SHORT_SESSION_MS),
            )
            (count,) = cursor.fetchone()
            return bool(count == len(users))

    await until(are_settled, "knowledge of them")


def test_killed_generic_worker_loses_no_call(servers: Scaled) -> None:
    alice, bob = servers.user("alice"), servers.user("bob")
    # The first node sends its webhooks to the first worker.
    room_id = room(servers, alice, bob, node=0)
    worker1 = servers.synapse.workers["worker1"]

    async def test() -> None:
        url = servers.synapse.worker_urls[0]
        members = [
            await enter(user, room_id, servers.nodes[0], HOUR_MS, url) for user in (alice, bob)
        ]
        await have_been_seen(servers, *members)
        worker1.kill()
        await members[1].there.leave()
        await until(lambda: not members[1].is_in_room(alice), "leave", POLLS_SEC)
        assert members[0].is_in_room(alice)
        # The clients stay connected.
        body = service.get_token_body(bob, room_id)
        for _ in range(2):
            service.post(servers.proxy_url, "/get_token", body).ok()
        start_again(servers, "worker1")
        await members[0].there.leave()
        # LiveKit sends webhooks one by one, and may still be trying to send the previous one.
        await until(lambda: not members[0].is_in_room(alice), "leave", POLLS_SEC)
        assert [member.leaves_sent() for member in members] == [1, 1]

    asyncio.run(test())


def start_again(servers: Scaled, worker: str) -> None:
    process = servers.synapse.workers[worker]
    process.start()
    url = servers.urls[worker]

    def is_up() -> bool:
        try:
            return http("GET", f"{url}/health").status == 200
        except OSError:
            return False

    process.wait_until(is_up, f"{worker} ready")


def test_killed_background_worker_delays_removals_and_no_leaves(servers: Scaled) -> None:
    alice, bob, carol = (servers.user(name) for name in ("alice", "bob", "carol"))
    room_id = room(servers, alice, bob, carol)

    async def test() -> None:
        alices, bobs, carols = [
            await enter(user, room_id, servers.nodes[0], HOUR_MS) for user in (alice, bob, carol)
        ]
        await have_been_seen(servers, alices, bobs, carols)
        servers.synapse.workers["background"].kill()
        alice.kick(room_id, bob.user_id)
        # Other workers get the webhooks.
        await alices.there.leave()
        await until(lambda: not alices.is_in_room(carol), "leave", AT_ONCE_SEC)
        assert bobs.there.is_connected
        start_again(servers, "background")
        await until(lambda: not bobs.there.is_connected, "removal")
        assert carols.there.is_connected
        assert carols.is_in_room(carol)
        await carols.there.leave()
        await until(lambda: not carols.is_in_room(carol), "leave", AT_ONCE_SEC)
        assert [alices.leaves_sent(), carols.leaves_sent()] == [1, 1]

    asyncio.run(test())


def test_killed_livekit_node_moves_its_calls(servers: Scaled) -> None:
    alice, bob, carol, dave, erin = (
        servers.user(name) for name in ("alice", "bob", "carol", "dave", "erin")
    )
    node1, node2 = servers.nodes
    lost, goes_on, empty = (
        room(servers, alice, bob, carol, dave, erin, node=node) for node in (0, 1, 0)
    )

    async def test() -> None:
        # Clients of the running node reconnect to it. Clients of the killed node are lost.
        alices = await enter(alice, lost, node2, HOUR_MS)
        bobs = await enter(bob, lost, node1, HOUR_MS)
        carols = await enter(carol, goes_on, node2, HOUR_MS)
        daves = await enter(dave, goes_on, node2, HOUR_MS)
        erins = await enter(erin, empty, node1, HOUR_MS)
        members = (alices, bobs, carols, daves, erins)
        await have_been_seen(servers, *members)
        node1.process.kill()
        await both_hear(carols.there, daves.there)
        for gone in (bobs, erins):
            await until(lambda gone=gone: not gone.is_in_room(alice), "leave", 40)  # type: ignore[misc]
        for stays in (alices, carols, daves):
            assert stays.is_in_room(alice)
        await until(lambda: identities(node2, alices) == {alices.there.identity}, "alice")
        node1.start()
        node1.wait_ready()
        for member in (alices, carols, daves):
            await member.there.leave()
            await until(lambda member=member: not member.is_in_room(alice), "leave", POLLS_SEC)  # type: ignore[misc]
        assert [member.leaves_sent() for member in members] == [1] * 5

    asyncio.run(test())


def test_restricted_user_alone_on_a_killed_node_reconnects_after_two_polls(
    servers: Scaled, other: Synapse
) -> None:
    alice, rita = servers.user("alice"), other.register("rita-alone")
    room_id = room(servers, alice, node=0)
    rita.join(room_id, via=[servers.synapse.server_name])
    node1, node2 = servers.nodes

    async def test() -> None:
        alices = await enter(alice, room_id, node1, HOUR_MS)
        body = service.get_token_body(rita, room_id)
        jwt = service.post(servers.proxy_url, "/get_token", body).ok()["jwt"]
        assert service.claims(jwt)["roomPreset"] == MUST_NOT_CREATE
        ritas = await Participant.join(servers.livekit_url, jwt)

        def is_rita_alone() -> bool:
            try:
                return identities(node2, alices) == {ritas.identity}
            except WrongAnswer:
                # The room exists on neither node.
                return False

        await have_been_seen(servers, alices)
        await alices.there.leave()
        await until(is_rita_alone, "end of alice")
        await polled(servers)
        node1.process.kill()
        began = time.monotonic()
        await until(lambda: not is_rita_alone(), "end of rita's connection")
        await until(is_rita_alone, "return of rita", 60)
        print(f"rita was back after {time.monotonic() - began:.1f} s")
        assert ritas.is_connected
        await ritas.leave()
        node1.start()
        node1.wait_ready()

    asyncio.run(test())


async def polled(servers: Scaled) -> None:
    """Wait until a poll that begins after this call has ended."""
    background = servers.synapse.workers["background"]
    mark = background.log_size()
    await until(lambda: background.log_text(mark).count("/ListRooms: 200") > 1, "poll")


def identities(node: Node, member: Member) -> set[str]:
    return {p["identity"] for p in node.participants(member.livekit_room)}
