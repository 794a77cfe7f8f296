# SPDX-License-Identifier: Apache-2.0
"""Decisions of a server admin about rooms and accounts apply to calls."""

import asyncio
from collections.abc import Iterator
from urllib.parse import quote

import pytest

from testbed import service
from testbed.call import Participant
from testbed.http import Answer
from testbed.livekit import LiveKit
from testbed.matrix import User
from testbed.postgres import Postgres
from testbed.process import until, wait_until
from testbed.redis import Redis
from testbed.sets import Homeservers, module_config, running
from testbed.synapse import Synapse


def ask(client_url: str, user: User, room_id: str) -> Answer:
    return service.post(client_url, "/sfu/get", service.sfu_get_body(user, room_id))


def block(admin: User, room_id: str) -> None:
    path = f"/_synapse/admin/v1/rooms/{quote(room_id, safe='')}/block"
    admin.call("PUT", path, {"block": True}).ok()


def shut_down(admin: User, room_id: str) -> None:
    path = f"/_synapse/admin/v2/rooms/{quote(room_id, safe='')}"
    delete_id = admin.call("DELETE", path, {"block": True, "purge": True}).ok()["delete_id"]
    status = f"/_synapse/admin/v2/rooms/delete_status/{delete_id}"
    wait_until(lambda: admin.call("GET", status).ok()["status"] == "complete", "shut down")


def test_room_that_was_shut_down_gets_no_token_and_its_call_ends(homeservers: Homeservers) -> None:
    admin, alice = homeservers.user_of_a("admin", admin=True), homeservers.user_of_a()
    rita = homeservers.user_of_b()
    room_id = homeservers.room_of_both(alice, rita)
    livekit = homeservers.livekit_a

    async def scenario() -> None:
        ask(homeservers.a.client_url, alice, room_id).ok()
        jwt = ask(homeservers.a.client_url, rita, room_id).ok()["jwt"]
        livekit_room = service.claims(jwt)["video"]["room"]
        await Participant.join(livekit.url, jwt)
        assert len(livekit.participants(livekit_room)) == 1

        await asyncio.to_thread(shut_down, admin, room_id)

        for user in (alice, rita):
            answer = ask(homeservers.a.client_url, user, room_id)
            assert (answer.status, answer.json["errcode"]) == (403, "M_FORBIDDEN"), answer
        await until(
            lambda: livekit_room not in [room["name"] for room in livekit.rooms()], "call ended"
        )

    asyncio.run(scenario())


def test_token_for_blocked_room_of_another_server_is_refused(homeservers: Homeservers) -> None:
    admin, rita = homeservers.user_of_a("admin", admin=True), homeservers.user_of_b()
    room_id = rita.create_room()
    ask(homeservers.a.client_url, rita, room_id).ok()
    block(admin, room_id)
    answer = ask(homeservers.a.client_url, rita, room_id)
    assert (answer.status, answer.json["errcode"]) == (403, "M_FORBIDDEN"), answer


@pytest.fixture(scope="module")
def expiring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Synapse]:
    """A homeserver with a worker and with accounts that expire."""
    directory = tmp_path_factory.mktemp("expiring")
    livekit, redis, postgres = LiveKit(directory), Redis(directory), Postgres(directory)
    with running(redis, postgres):
        synapse = Synapse(
            "e",
            directory,
            module_config(livekit),
            {"account_validity": {"enabled": True, "period": "6w"}},
            postgres=postgres,
            redis=redis,
            workers=1,
        )
        with running(livekit, synapse):
            yield synapse


def test_token_for_expired_account_is_refused_by_every_process(expiring: Synapse) -> None:
    admin, alice = expiring.register("admin", admin=True), expiring.register("alice")
    room_id = alice.create_room()
    body = service.sfu_get_body(alice, room_id)
    urls = [expiring.client_url, *expiring.worker_urls]
    for url in urls:
        service.post(url, "/sfu/get", body).ok()

    admin.call(
        "POST",
        "/_synapse/admin/v1/account_validity/validity",
        {"user_id": alice.user_id, "expiration_ts": 1, "enable_renewal_emails": False},
    ).ok()

    # The worker learns of the expiry by replication.
    wait_until(
        lambda: [service.post(url, "/sfu/get", body).status for url in urls] == [401, 401],
        "expired on both",
    )
    assert "Traceback" not in expiring.log_text()


def test_token_with_server_name_in_capitals_is_issued(homeservers: Homeservers) -> None:
    alice, rita = homeservers.user_of_a(), homeservers.user_of_b()
    room_id = homeservers.room_of_both(alice, rita)
    url = homeservers.livekit_b.url
    body = service.homeserver_body(alice, room_id, url, server_name=homeservers.b.server_name)
    assert service.homeserver_get_token(alice, body).ok()["jwt"]
    body["server_name"] = homeservers.b.server_name.upper()
    assert body["server_name"] != homeservers.b.server_name
    assert service.homeserver_get_token(alice, body).ok()["jwt"]


def test_token_for_room_id_with_a_line_break_is_rejected(homeservers: Homeservers) -> None:
    rita = homeservers.user_of_b()
    room_id = "!inj\n2026-01-01 00:00:00,000 CRITICAL root INJECTED LINE"
    answer = ask(homeservers.a.client_url, rita, room_id)
    assert (answer.status, answer.json["errcode"]) == (400, "M_BAD_JSON"), answer
    assert "INJECTED" not in homeservers.a.log_text()
