# SPDX-License-Identifier: Apache-2.0
"""Traces of one user's path into a call, with `--as` and `--room`."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from livekit import api

from synapse_lk_jwt.livekit.naming import livekit_room_name
from testbed import service
from testbed.call import Participant
from testbed.check import Checker, Report
from testbed.livekit import LiveKit
from testbed.matrix import User
from testbed.sets import Homeservers, running


def trace(homeservers: Homeservers, user_id: str, room_id: str, **module: Any) -> Report:
    """Traces a user's path into the call of a room, as A sees it."""
    report = Checker(homeservers.a).run("--as", user_id, "--room", room_id, module=module)
    steps = ["account", "member", "level", "LiveKit", "in the call"]
    assert [f.check for f in report.findings[:5]] == steps[: len(report.findings)], str(report)
    verdicts = [f.verdict for f in report.findings]
    assert "wrong" not in verdicts[:-1], "The trace continues after a step that failed."
    assert report.status == (1 if verdicts[-1] == "wrong" else 0)
    return report


def failure(homeservers: Homeservers, user_id: str, room_id: str, **module: Any) -> str:
    """The step that fails."""
    last = trace(homeservers, user_id, room_id, **module).findings[-1]
    assert last.verdict == "wrong", last
    return f"{last.check}: {last.text}"


def test_trace_of_a_member_is_ok(homeservers: Homeservers) -> None:
    alice = homeservers.user_of_a()
    room_id = alice.create_room()
    report = trace(homeservers, alice.user_id, room_id)
    assert report.the("ok", "account").text == f"{alice.user_id} is a user of this homeserver"
    assert report.the("ok", "member").text == f"is joined to {room_id}"
    assert report.the("ok", "level").text == "full access: may start calls, and publish"
    assert "the module creates the room when this user requests" in report.the("ok", "LiveKit").text
    assert report.the("warning", "in the call").text == "not now. No other participants are in it"
    # The trace creates no room.
    assert report.findings == trace(homeservers, alice.user_id, room_id).findings


def test_trace_on_livekit_that_asks_its_nodes_finds_no_room(
    homeservers: Homeservers, tmp_path: Path
) -> None:
    alice = homeservers.user_of_a()
    room_id = alice.create_room()
    a = homeservers.livekit_a
    nodes = {"api": {"enable_psrpc_for_get_list_participants": True}}
    livekit = LiveKit(tmp_path, key=a.key, secret=a.secret, extra_config=nodes)
    with running(livekit):
        report = trace(homeservers, alice.user_id, room_id, livekit_internal_url=livekit.api_url)
    assert report.the("warning", "in the call").text == "not now. No other participants are in it"


def test_trace_of_a_user_who_is_not_joined_ends_at_member(homeservers: Homeservers) -> None:
    alice, bob, rita = (
        homeservers.user_of_a(),
        homeservers.user_of_a("bob"),
        homeservers.user_of_b(),
    )
    room_id = alice.create_room()
    for user in (bob, rita):
        text = failure(homeservers, user.user_id, room_id)
        assert text.startswith(f"member: has never been in {room_id}, and only members get")
    alice.invite(room_id, bob.user_id)
    text = failure(homeservers, bob.user_id, room_id)
    assert text.startswith(f"member: has not accepted the invitation to {room_id}, and")
    alice.ban(room_id, bob.user_id)
    text = failure(homeservers, bob.user_id, room_id)
    assert text.startswith(f"member: is banned from {room_id}, and")
    report = trace(homeservers, bob.user_id, room_id, require_room_membership=False)
    assert report.status == 1, "The running homeserver decides, not the files."


def test_trace_of_a_user_who_left_ends_at_member(homeservers: Homeservers) -> None:
    alice = homeservers.user_of_a()
    room_id = alice.create_room()
    alice.leave(room_id)
    assert failure(homeservers, alice.user_id, room_id).startswith("member: ")
    assert room_id in failure(homeservers, alice.user_id, room_id)


def test_trace_of_a_user_whom_the_server_acl_excludes_ends_at_member(
    homeservers: Homeservers,
) -> None:
    alice, rita = homeservers.user_of_a(), homeservers.user_of_b()
    room_id = homeservers.room_of_both(alice, rita)
    acl = {"allow": ["*"], "deny": ["localhost"], "allow_ip_literals": True}
    alice.send_state(room_id, "m.room.server_acl", acl)
    text = failure(homeservers, rita.user_id, room_id)
    assert text == f"member: the server ACL of {room_id} excludes {homeservers.b.server_name}"


def test_trace_of_an_unusable_account_ends_at_account(homeservers: Homeservers) -> None:
    admin = homeservers.user_of_a("admin", admin=True)
    disable: list[Callable[[str], None]] = [admin.lock, admin.suspend, admin.deactivate]
    for how in disable:
        alice = homeservers.user_of_a()
        room_id = alice.create_room()
        how(alice.user_id)
        text = failure(homeservers, alice.user_id, room_id)
        assert text.startswith(f"account: {alice.user_id} does not exist here, or is deactivated")
    unknown = f"@unknown:{homeservers.a.server_name}"
    text = failure(homeservers, unknown, "!no-room")
    assert text.startswith(f"account: {unknown} does not exist here")


def test_trace_of_a_remote_user_names_the_line_for_full_access(homeservers: Homeservers) -> None:
    alice, rita = homeservers.user_of_a(), homeservers.user_of_b()
    room_id = homeservers.room_of_both(alice, rita)
    server = homeservers.b.server_name
    report = trace(homeservers, rita.user_id, room_id)
    finding = report.the("warning", "LiveKit")
    assert finding.text.startswith("has no such room: no full-access user has started the call")
    assert report.the("ok", "account").text == f"this homeserver can verify users of {server}"
    assert "restricted: may join a call that is running" in report.the("ok", "level").text
    # The printed line gives full access.
    report = trace(homeservers, rita.user_id, room_id, **finding.pasted)
    assert report.the("ok", "level").text.startswith("full access")
    assert "the module creates the room when this user requests" in report.the("ok", "LiveKit").text

    service.post(homeservers.a.client_url, "/sfu/get", service.sfu_get_body(alice, room_id)).ok()
    report = trace(homeservers, rita.user_id, room_id, remote_can_publish=[])
    assert report.the("ok", "level").text.endswith("is running, and listen only")
    assert report.the("ok", "LiveKit").text == "accepts the token that this user gets"


@pytest.mark.parametrize("auto_create", [False, True])
def test_restricted_user_without_running_call_is_reported(
    auto_create: bool, homeservers: Homeservers, tmp_path: Path
) -> None:
    alice, rita = homeservers.user_of_a(), homeservers.user_of_b()
    room_id = homeservers.room_of_both(alice, rita)
    a = homeservers.livekit_a
    livekit = LiveKit(tmp_path, auto_create=auto_create, key=a.key, secret=a.secret)
    with running(livekit):
        report = trace(homeservers, rita.user_id, room_id, livekit_internal_url=livekit.api_url)
        assert "has no such room" in report.the("warning", "LiveKit").text
        room = livekit_room_name(room_id, service.SLOT)
        livekit.ask("CreateRoom", {"name": room}, api.VideoGrants(room_create=True))
        report = trace(homeservers, rita.user_id, room_id, livekit_internal_url=livekit.api_url)
        assert report.the("ok", "LiveKit").text == "accepts the token that this user gets"


def test_trace_of_a_user_of_an_unreachable_server_ends_at_account(homeservers: Homeservers) -> None:
    alice = homeservers.user_of_a()
    text = failure(homeservers, "@rita:127.0.0.1:1", alice.create_room())
    assert text.startswith("account: this homeserver cannot verify users of 127.0.0.1:1")
    assert text.endswith("the request to 127.0.0.1:1 failed (ConnectionRefusedError)")


def test_trace_in_a_room_elsewhere_names_the_option_that_decides(homeservers: Homeservers) -> None:
    alice, rita = homeservers.user_of_a(), homeservers.user_of_b()
    room_id = rita.create_room()
    text = failure(homeservers, alice.user_id, room_id)
    assert text == f"member: this homeserver is not in {room_id}"
    report = trace(homeservers, rita.user_id, room_id)
    assert "It trusts users of other homeservers" in report.the("warning", "member").text


def test_trace_without_livekit_ends_at_livekit(homeservers: Homeservers) -> None:
    alice = homeservers.user_of_a()
    room_id = alice.create_room()
    url = "http://127.0.0.1:1"
    text = failure(homeservers, alice.user_id, room_id, livekit_internal_url=url)
    assert text.startswith("LiveKit: cannot be used: the connection is refused")
    text = failure(homeservers, alice.user_id, room_id, livekit_key="APIother")
    assert text.startswith("LiveKit: cannot be used: LiveKit answers 401")


def test_trace_without_synapse_cannot_run(homeservers: Homeservers) -> None:
    listeners = [{"port": 1, "type": "http", "resources": [{"names": ["client"]}]}]
    checker = Checker(homeservers.a)
    for changed in (listeners, []):
        report = checker.run("--as", "@a:b", "--room", "!a", config={"listeners": changed})
        assert (report.status, report.findings) == (2, [])
        assert report.errors.startswith("Cannot check: ")


def _sfu_get(user: User, room_id: str, homeservers: Homeservers) -> str:
    body = service.sfu_get_body(user, room_id)
    jwt: str = service.post(homeservers.a.client_url, "/sfu/get", body).ok()["jwt"]
    return jwt


def _get_token(user: User, room_id: str, homeservers: Homeservers) -> str:
    body = service.get_token_body(user, room_id)
    jwt: str = service.post(homeservers.a.client_url, "/get_token", body).ok()["jwt"]
    return jwt


def _homeserver_get_token(user: User, room_id: str, homeservers: Homeservers) -> str:
    body = service.homeserver_body(user, room_id, homeservers.livekit_a.url)
    jwt: str = service.homeserver_get_token(user, body).ok()["jwt"]
    return jwt


@pytest.mark.parametrize("ask", [_sfu_get, _get_token, _homeserver_get_token])
def test_trace_of_a_participant_names_identity_and_tracks(
    ask: Callable[[User, str, Homeservers], str], homeservers: Homeservers
) -> None:
    alice, bob = homeservers.user_of_a(), homeservers.user_of_a("bob")
    room_id = alice.create_room(invite=[bob.user_id])
    bob.join(room_id)

    async def test() -> None:
        jwt = ask(alice, room_id, homeservers)
        there = await Participant.join(homeservers.livekit_a.url, jwt)
        await there.publish_tone()
        report = await asyncio.to_thread(trace, homeservers, alice.user_id, room_id)
        text = report.the("ok", "in the call").text
        assert f"as {there.identity!r}, slot m.call#ROOM, publishing" in text
        assert report.bad == {}
        report = await asyncio.to_thread(trace, homeservers, bob.user_id, room_id)
        assert report.the("warning", "in the call").text == "not now. 1 other participant is in it"
        await there.leave()

    asyncio.run(test())
