# SPDX-License-Identifier: Apache-2.0
"""Only users who are joined to the Matrix room get a token, also directly after a change."""

from collections.abc import Callable

import pytest

from testbed import service
from testbed.http import Answer
from testbed.matrix import User
from testbed.process import wait_until
from testbed.sets import Homeservers


def ask(homeservers: Homeservers, user: User, room_id: str) -> Answer:
    body = service.get_token_body(user, room_id)
    return service.post(homeservers.a.client_url, "/get_token", body)


REMOVALS: dict[str, Callable[[User, User, str], None]] = {
    "leaves": lambda alice, user, room_id: user.leave(room_id),
    "is kicked": lambda alice, user, room_id: alice.kick(room_id, user.user_id),
    "is banned": lambda alice, user, room_id: alice.ban(room_id, user.user_id),
}


@pytest.mark.parametrize("how", REMOVALS)
@pytest.mark.parametrize("local", [True, False])
def test_token_for_user_who_left_is_refused(
    how: str, local: bool, homeservers: Homeservers
) -> None:
    alice = homeservers.user_of_a()
    user = homeservers.user_of_a("bob") if local else homeservers.user_of_b()
    room_id = alice.create_room(invite=[user.user_id])
    user.join(room_id, via=[homeservers.a.server_name])
    ask(homeservers, user, room_id).ok()

    REMOVALS[how](alice, user, room_id)

    # A learns of the leave when B sends it.
    wait_until(lambda: alice.membership(room_id, user.user_id) != "join", "gone")
    answer = ask(homeservers, user, room_id)
    assert (answer.status, answer.json["errcode"]) == (403, "M_FORBIDDEN"), answer


def test_token_for_user_of_server_denied_by_acl_is_refused(homeservers: Homeservers) -> None:
    alice, rita = homeservers.user_of_a(), homeservers.user_of_b()
    room_id = homeservers.room_of_both(alice, rita)
    ask(homeservers, rita, room_id).ok()
    alice.send_state(room_id, "m.room.server_acl", {"allow": ["*"], "deny": ["localhost"]})
    answer = ask(homeservers, rita, room_id)
    assert (answer.status, answer.json["errcode"]) == (403, "M_FORBIDDEN"), answer
    ask(homeservers, alice, room_id).ok()


@pytest.mark.parametrize("local", [True, False])
def test_token_for_user_who_never_joined_is_refused(local: bool, homeservers: Homeservers) -> None:
    room_id = homeservers.user_of_a().create_room()
    stranger = homeservers.user_of_a("bob") if local else homeservers.user_of_b()
    answer = ask(homeservers, stranger, room_id)
    assert (answer.status, answer.json["errcode"]) == (403, "M_FORBIDDEN"), answer
