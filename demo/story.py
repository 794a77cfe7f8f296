# SPDX-License-Identifier: Apache-2.0
"""The call that the demo makes, step by step, with a check of each result."""

from __future__ import annotations

import asyncio
import contextlib
import json
import textwrap
from datetime import datetime
from typing import Any
from urllib.parse import quote

from demo.self_check import SelfCheck
from testbed import service
from testbed.call import CallRejected, Participant
from testbed.http import Answer
from testbed.matrix import User
from testbed.stage import Stage

_FRAMES = 100
_COLUMN = 19


class UnexpectedResult(Exception):
    """A step had another result than expected. The message names it."""


def check(is_expected: bool, problem: str) -> None:
    """Raise UnexpectedResult with the text unless the result is expected."""
    if not is_expected:
        raise UnexpectedResult(problem)


def print_check(self_check: SelfCheck) -> None:
    """Check homeserver A and print the report.

    Raises:
        UnexpectedResult: if the report names a problem.
    """
    is_all_well, report = self_check.run()
    check(is_all_well, f"`synapse-lk-jwt check` reports a problem:\n{report}")
    _print_step("`synapse-lk-jwt check` finds no problem in homeserver A")
    print(textwrap.indent(report, "    "), flush=True)


class Story:
    """Rita of homeserver B is restricted on A. She can join Alice's call, but not start it."""

    def __init__(self, stage: Stage) -> None:
        self._livekit = stage.livekit
        self._a = stage.a
        self._b = stage.b
        self._check = SelfCheck(stage.a)

    async def run(self, keep: bool) -> None:
        """Make the call and print each step.

        Args:
            keep: whether to continue the call until interrupted.

        Raises:
            UnexpectedResult: if a step has another result than expected.
        """
        self._print_servers()
        print_check(self._check)
        # The steps block the event loop, which notices Ctrl-C only between them.
        await asyncio.sleep(0.01)
        alice, rita, room_id = self._create_room()
        await asyncio.sleep(0.01)
        ritas_token = self._request_token_of_restricted_user(rita, room_id)
        room = service.claims(ritas_token)["video"]["room"]
        await self._check_restricted_user_cannot_start_call(ritas_token)
        alices_token = self._request_token_of_local_user(alice, room_id, room)
        async with contextlib.AsyncExitStack() as call:
            alice_in_call = await self._join("Alice", alices_token, call)
            _print_step("Alice is in the call, with a tone for her microphone")
            _print_detail("LiveKit lists", self._in_call(room, 1))
            rita_in_call = await self._join("Rita", ritas_token, call)
            _print_step("Rita is in the call, with the token that LiveKit rejected before")
            _print_detail("LiveKit lists", self._in_call(room, 2))
            await self._hear(alice_in_call, rita_in_call)
            await self._request_token_from_own_homeserver(rita, room_id, room)
            if keep:
                self._print_commands(alice, rita, room_id, room)
                await self._print_participants(room)

    def _print_servers(self) -> None:
        _print_step("Three real servers are running on 127.0.0.1")
        _print_detail(
            "homeserver A", f"{self._a.client_url} with the module, full_access_homeservers: []"
        )
        _print_detail("homeserver B", f"{self._b.client_url} whose users are restricted on A")
        _print_detail("LiveKit", f"{self._livekit.api_url} with room.auto_create: false")

    def _create_room(self) -> tuple[User, User, str]:
        alice = self._a.register("alice")
        rita = self._b.register("rita")
        room_id = alice.create_room(invite=[rita.user_id])
        rita.join(room_id, via=[self._a.server_name])
        membership = alice.membership(room_id, rita.user_id)
        check(
            membership == "join",
            f"Rita's membership on A is {membership!r} instead of 'join'",
        )
        _print_step("Rita of homeserver B has joined the Matrix room of Alice of homeserver A")
        _print_detail("Alice", alice.user_id)
        _print_detail("Rita", rita.user_id)
        _print_detail("Matrix room", room_id)
        return alice, rita, room_id

    def _request_token_of_restricted_user(self, rita: User, room_id: str) -> str:
        answer = self._ask(rita, room_id)
        jwt = _token(answer, "Rita")
        _print_step("Rita requests a LiveKit access token from A, and gets one")
        self._show_token(answer, jwt, rita)
        rooms = self._livekit.rooms()
        check(rooms == [], f"LiveKit has a room after a restricted user's request: {rooms}")
        _print_detail("LiveKit lists", "no room")
        return jwt

    async def _check_restricted_user_cannot_start_call(self, jwt: str) -> None:
        try:
            rita_in_call = await Participant.join(self._livekit.url, jwt)
        except CallRejected as e:
            refusal = str(e)
        else:
            await rita_in_call.leave()
            raise UnexpectedResult("Rita could start the call, although she is restricted")
        check(
            "requested room does not exist" in refusal,
            f"LiveKit rejected Rita for another reason than expected: {refusal}",
        )
        _print_step("Rita cannot start the call with this token")
        _print_detail("answer", refusal)

    def _request_token_of_local_user(self, alice: User, room_id: str, room: str) -> str:
        answer = self._ask(alice, room_id)
        jwt = _token(answer, "Alice")
        _print_step(
            "Alice requests a token from A. She has full access, so A creates the LiveKit room"
        )
        self._show_token(answer, jwt, alice)
        names = [listed["name"] for listed in self._livekit.rooms()]
        check(names == [room], f"LiveKit has the rooms {names} instead of only {room}")
        _print_detail("LiveKit lists", f"room {room}")
        return jwt

    async def _join(self, who: str, jwt: str, call: contextlib.AsyncExitStack) -> Participant:
        try:
            participant = await Participant.join(self._livekit.url, jwt)
        except CallRejected as e:
            raise UnexpectedResult(f"LiveKit rejects {who}: {e}") from None
        call.push_async_callback(participant.leave)
        await participant.publish_tone()
        return participant

    async def _hear(self, alice: Participant, rita: Participant) -> None:
        try:
            heard = await asyncio.gather(
                alice.hear(rita.identity, _FRAMES), rita.hear(alice.identity, _FRAMES)
            )
        except asyncio.TimeoutError:
            raise UnexpectedResult(
                "Alice and Rita are in the call, but do not hear each other"
            ) from None
        _print_step("Audio flows both ways")
        _print_detail("Alice hears", f"{heard[0]} frames of Rita's tone, 10 ms each")
        _print_detail("Rita hears", f"{heard[1]} frames of Alice's tone, 10 ms each")

    async def _request_token_from_own_homeserver(self, rita: User, room_id: str, room: str) -> None:
        url, server_name = self._livekit.url, self._a.server_name
        body = service.homeserver_body(rita, room_id, url, server_name=server_name)
        answer = service.homeserver_get_token(rita, body)
        jwt = _token(answer, "Rita, on her own homeserver,")
        claims = service.claims(jwt)
        check(claims["video"]["room"] == room, f"The token is for another call: {claims}")
        try:
            there = await Participant.join(url, jwt)
        except CallRejected as e:
            raise UnexpectedResult(f"LiveKit rejects the token: {e}") from None
        await there.leave()
        _print_step(
            "Rita requests a token for A's LiveKit from B, which asks A over federation (MSC4195)"
        )
        _print_detail("request", answer.request)
        _print_detail("answer", f"{answer.status}, a JWT for {claims['sub']}")
        _print_detail("LiveKit", "accepts it")

    def _ask(self, user: User, room_id: str) -> Answer:
        return service.post(self._a.client_url, "/sfu/get", service.sfu_get_body(user, room_id))

    def _show_token(self, answer: Answer, jwt: str, user: User) -> None:
        claims = service.claims(jwt)
        video = claims["video"]
        identity = f"{user.user_id}:{user.device_id}"
        check(
            claims["sub"] == identity, f"The token is for {claims['sub']!r} instead of {identity!r}"
        )
        check(video["roomJoin"] is True, f"The token lacks roomJoin: {video}")
        check(video["roomCreate"] is False, f"The token allows roomCreate: {video}")
        _print_detail("request", answer.request)
        _print_detail(
            "answer", f"{answer.status}, url {answer.json['url']}, and a JWT with these claims:"
        )
        _print_detail("  sub", claims["sub"])
        grants = json.dumps(video)[1:-1]
        indent = " " * _COLUMN
        _print_detail(
            "  video", textwrap.fill(grants, 98, initial_indent=indent, subsequent_indent=indent)
        )
        _print_detail("  exp", f"{datetime.fromtimestamp(claims['exp']):%H:%M:%S}")

    def _in_call(self, room: str, expected: int) -> str:
        identities = sorted(listed["identity"] for listed in self._livekit.participants(room))
        check(
            len(identities) == expected,
            f"LiveKit lists {identities} in the call instead of {expected} participants",
        )
        return ", ".join(identities)

    async def _print_participants(self, room: str) -> None:
        """Print the participants that LiveKit lists, now and after each change, forever."""
        printed = None
        while True:
            participants = await asyncio.to_thread(self._livekit.participants, room)
            lines = sorted(_participant_line(participant) for participant in participants)
            if lines != printed:
                printed = lines
                print(f"{datetime.now():%H:%M:%S}  LiveKit lists {_plural(len(lines))}", flush=True)
                for line in lines:
                    print(f"  {line}", flush=True)
            await asyncio.sleep(0.5)

    def _print_commands(self, alice: User, rita: User, room_id: str, room: str) -> None:
        a = self._a.client_url
        p = a + service.PREFIX
        transports = f"{a}/_matrix/client/unstable/org.matrix.msc4143/rtc/transports"
        well_known = f"{a}/.well-known/matrix/client"
        sfu_get = json.dumps(service.sfu_get_body(rita, room_id))
        get_token = json.dumps(service.get_token_body(alice, room_id))
        forged = {"access_token": "forged", "matrix_server_name": self._b.server_name}
        forged_body = json.dumps(service.sfu_get_body(rita, room_id, openid_token=forged))
        kick_url = f"{a}/_matrix/client/v3/rooms/{quote(room_id)}/kick"
        kick = json.dumps({"user_id": rita.user_id})
        print(
            f"""
The call continues until Ctrl-C. Try these commands in another terminal. Their OpenID tokens are
valid for an hour.

Is the module running?
  curl -i {p}/healthz

What do clients discover?
  curl {well_known}
  curl -H 'Authorization: Bearer {alice.access_token}' {transports}

A LiveKit access token for Rita, at the endpoint of most clients:
  curl -d '{sfu_get}' {p}/sfu/get

A token for Alice, at the newer endpoint:
  curl -d '{get_token}' {p}/get_token

A forged OpenID token of B, which A rejects:
  curl -i -d '{forged_body}' {p}/sfu/get

Alice kicks Rita from the Matrix room. A removes Rita from the call:
  curl -H 'Authorization: Bearer {alice.access_token}' -d '{kick}' '{kick_url}'

Check homeserver A again:
  {self._check.command_line()}

Links: {p}/healthz
       {well_known}
       {self._livekit.api_url}  (LiveKit; the call is its room {room})
""",
            flush=True,
        )


def _participant_line(participant: dict[str, Any]) -> str:
    joined = datetime.fromtimestamp(int(participant["joined_at"]))
    names = ", ".join(track["name"] for track in participant.get("tracks", [])) or "nothing"
    return f"{participant['identity']}  joined at {joined:%H:%M:%S}, publishes {names}"


def _plural(participants: int) -> str:
    return f"{participants} participant" + ("" if participants == 1 else "s")


def _token(answer: Answer, who: str) -> str:
    check(answer.status == 200, f"{who} gets no token: {answer}")
    jwt = answer.json["jwt"]
    assert isinstance(jwt, str)
    return jwt


def _print_step(step: str) -> None:
    print(f"✔ {step}", flush=True)


def _print_detail(name: str, seen: str) -> None:
    print(f"    {name}".ljust(_COLUMN) + seen.lstrip(), flush=True)
