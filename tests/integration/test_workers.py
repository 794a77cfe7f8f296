# SPDX-License-Identifier: Apache-2.0
"""A homeserver with a main process and workers, on PostgreSQL and Redis."""

import asyncio
import hashlib
import json
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from livekit import api

from testbed import service
from testbed.http import http
from testbed.matrix import User
from testbed.member import MEMBER, POWER_LEVELS, enter, is_kept_out
from testbed.process import until
from testbed.sets import Cluster

PROCESSES = ("main", "worker")


@pytest.mark.parametrize("process", PROCESSES)
def test_token_request_to_any_process_succeeds(process: str, cluster: Cluster) -> None:
    alice = cluster.user()
    room_id = alice.create_room()
    url = cluster.urls[process]
    service.post(url, "/sfu/get", service.sfu_get_body(alice, room_id)).ok()
    service.post(url, "/get_token", service.get_token_body(alice, room_id)).ok()
    body = service.homeserver_body(alice, room_id, cluster.livekit.url)
    for prefix in ("v1", "unstable/io.element.msc4195"):
        service.homeserver_get_token(alice.at(url), body, prefix).ok()


@pytest.mark.parametrize("process", PROCESSES)
def test_discovery_on_any_process_names_the_service(process: str, cluster: Cluster) -> None:
    alice = cluster.user().at(cluster.urls[process])
    service_url = cluster.synapse.client_url + service.PREFIX
    answer = alice.call("GET", "/_matrix/client/unstable/org.matrix.msc4143/rtc/transports")
    ours = {"type": "livekit", "livekit_service_url": service_url}
    assert answer.ok() == {"rtc_transports": [ours]}
    answer = alice.call("GET", "/_matrix/client/v1/rtc/transports")
    assert answer.ok() == {"rtc_transports": [ours], "transports": [ours]}
    versions = http("GET", f"{cluster.urls[process]}/_matrix/client/versions").ok()
    assert versions["unstable_features"]["org.matrix.msc4143"] is True
    well_known = http("GET", f"{cluster.urls[process]}/.well-known/matrix/client").ok()
    assert well_known["org.matrix.msc4143.rtc_foci"] == [ours]


@pytest.mark.parametrize("asked", PROCESSES)
@pytest.mark.parametrize("how", ["deactivated", "locked", "suspended"])
def test_deactivated_locked_or_suspended_user_gets_401_from_any_process(
    how: str, asked: str, cluster: Cluster
) -> None:
    admin, alice = cluster.user("admin", admin=True), cluster.user()
    room_id = alice.create_room()
    body = service.get_token_body(alice, room_id)
    url = cluster.urls[asked]
    service.post(url, "/get_token", body).ok()

    {"deactivated": admin.deactivate, "locked": admin.lock, "suspended": admin.suspend}[how](
        alice.user_id
    )
    # Redis informs the worker a moment after the admin has got the answer.
    status = 200
    for _ in range(50):
        status = service.post(url, "/get_token", body).status
        if status != 200:
            break
    assert status == 401


FIELDS: dict[str, list[tuple[str, ...]]] = {
    "/sfu/get": [
        ("room",),
        ("device_id",),
        ("delay_id",),
        ("openid_token", "access_token"),
        ("openid_token", "matrix_server_name"),
    ],
    "/get_token": [
        ("room_id",),
        ("slot_id",),
        ("delay_id",),
        ("member", "id"),
        ("member", "claimed_user_id"),
        ("member", "claimed_device_id"),
        ("openid_token", "access_token"),
        ("openid_token", "matrix_server_name"),
    ],
    "homeserver": [("url",), ("room_id",), ("slot_id",), ("member_id",), ("server_name",)],
}


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(
    ("endpoint", "path"),
    [(endpoint, path) for endpoint, paths in FIELDS.items() for path in paths],
)
@pytest.mark.parametrize("poison", ["!a\0", "!a\ud800", "@a\0:x.org", "\udfff"])
def test_token_with_strings_that_postgresql_cannot_store_is_rejected(
    poison: str, endpoint: str, path: tuple[str, ...], process: str, cluster: Cluster, carol: User
) -> None:
    room_id = "!room:example.org"
    url = cluster.urls[process]
    body: dict[str, Any]
    token = {"access_token": "t", "matrix_server_name": cluster.synapse.server_name}
    delay = {"delay_id": "d", "delay_timeout": 1000}
    if endpoint == "/sfu/get":
        body = service.sfu_get_body(carol, room_id, openid_token=token, **delay)
    elif endpoint == "/get_token":
        body = service.get_token_body(carol, room_id, openid_token=token, **delay)
    else:
        body = service.homeserver_body(carol, room_id, "wss://sfu.example.org")
    holder = body
    for name in path[:-1]:
        holder = holder[name]
    holder[path[-1]] = poison
    if endpoint == "homeserver":
        answer = service.homeserver_get_token(carol.at(url), body)
    else:
        answer = service.post(url, endpoint, body)
    assert (answer.status, answer.json["errcode"]) == (400, "M_BAD_JSON"), answer
    assert path[-1] in answer.json["error"]


@pytest.fixture(scope="module")
def carol(cluster: Cluster) -> User:
    return cluster.user("poisoner")


@pytest.mark.parametrize("process", PROCESSES)
def test_delegation_and_removal_at_any_process_take_effect(process: str, cluster: Cluster) -> None:
    alice, bob = cluster.user("alice"), cluster.user("bob")
    url = cluster.urls[process]
    room_id = alice.create_room(preset="public_chat", power_levels=POWER_LEVELS)
    bob.join(room_id)

    async def test() -> None:
        # The generic worker gets the webhooks, and another worker runs background tasks.
        bobs = await enter(bob, room_id, cluster.livekit, 6_000, url)
        alices = await enter(alice, room_id, cluster.livekit, 3_600_000, url)
        began = bob.delayed()[0]["running_since"]
        await until(lambda: bob.delayed()[0]["running_since"] > began + 6_000, "restarts")
        assert bobs.is_in_room(alice)
        await alices.there.leave()
        await until(lambda: not alices.is_in_room(bob), "leave", 5)
        alice.kick(room_id, bob.user_id)
        await until(lambda: not bobs.there.is_connected, "removal", 5)
        await is_kept_out(cluster.livekit.url, bobs.jwt)
        assert alices.leaves_sent() == 1

    asyncio.run(test())


def test_delegation_requested_many_times_at_once_keeps_one_delayed_event(cluster: Cluster) -> None:
    dave = cluster.user("dave")
    room_id = dave.create_room(power_levels=POWER_LEVELS)
    delay_ids = [dave.delay_state(room_id, MEMBER, {}, "key") for _ in range(4)]
    asked = [
        (url, service.sfu_get_body(dave, room_id, delay_id=delay_id, delay_timeout=3_600_000))
        for delay_id in delay_ids
        for url in cluster.urls.values()
        for _ in range(2)
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda ask: service.post(ask[0], "/sfu/get", ask[1]), asked))
    assert [answer.status for answer in answers] == [200] * len(asked)
    # Each delegation replaces the previous ones, also those of another process.
    assert len(dave.delayed()) == 1


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(
    "event", ["participant_joined", "participant_left", "participant_connection_aborted"]
)
def test_webhook_with_name_that_postgresql_cannot_store_is_accepted(
    event: str, process: str, cluster: Cluster
) -> None:
    livekit = cluster.livekit
    body = json.dumps({"event": event, "room": {"name": "r"}, "participant": {"identity": "\0"}})
    digest = b64encode(hashlib.sha256(body.encode()).digest()).decode()
    signed = api.AccessToken(livekit.key, livekit.secret).with_sha256(digest).to_jwt()
    path = f"{cluster.urls[process]}{service.PREFIX}/sfu_webhook"
    answer = http("POST", path, body.encode(), {"Authorization": signed})
    # LiveKit sends its webhooks one by one, and would repeat a rejected one before the others.
    assert answer.status == 200, answer


def test_cluster_log_after_all_tests_has_no_traceback(cluster: Cluster) -> None:
    assert "Traceback" not in cluster.synapse.log_text()
