# SPDX-License-Identifier: Apache-2.0
"""The call that the demo makes: what happens, what is seen, and whether that is as promised."""

from __future__ import annotations

import asyncio
import contextlib
import json
import textwrap
from datetime import datetime

from testbed import service
from testbed.call import CallRefused, Participant
from testbed.http import Answer
from testbed.matrix import User
from testbed.stage import Stage

_FRAMES = 100
_COLUMN = 19


class NotAsPromised(Exception):
    """Something was seen that should not be; the message says what."""


def check(as_promised: bool, otherwise: str) -> None:
    """Raise NotAsPromised with the text unless the first is true."""
    if not as_promised:
        raise NotAsPromised(otherwise)


class Story:
    """Rita of homeserver B is restricted on A: she can join Alice's call, but not start it."""

    def __init__(self, stage: Stage) -> None:
        self._livekit = stage.livekit
        self._a = stage.a
        self._b = stage.b

    async def tell(self, keep: bool) -> None:
        """Make the call and print every step.

        Args:
            keep: whether to go on with the call until interrupted.

        Raises:
            NotAsPromised
        """
        self._introduce()
        alice, rita, room_id = self._meet()
        ritas_token = self._rita_asks(rita, room_id)
        room = service.claims(ritas_token)["video"]["room"]
        await self._rita_cannot_start_the_call(ritas_token)
        alices_token = self._alice_asks(alice, room_id, room)
        async with contextlib.AsyncExitStack() as call:
            alice_there = await self._join("Alice", alices_token, call)
            _done("Alice is in the call, with a tone for her microphone")
            _show("LiveKit lists", self._in_call(room, 1))
            rita_there = await self._join("Rita", ritas_token, call)
            _done("Rita is in the call, with the very token that was refused before")
            _show("LiveKit lists", self._in_call(room, 2))
            await self._hear(alice_there, rita_there)
            await self._rita_asks_her_own_homeserver(rita, room_id, room)
            if keep:
                self._say_what_to_try(alice, rita, room_id, room)
                await asyncio.Event().wait()

    def _introduce(self) -> None:
        _done("Three real servers are up on 127.0.0.1")
        _show("homeserver A", f"{self._a.client_url} with the module, full_access_homeservers: []")
        _show("homeserver B", f"{self._b.client_url} whose users are restricted on A")
        _show("LiveKit", f"{self._livekit.api_url} with room.auto_create: false")

    def _meet(self) -> tuple[User, User, str]:
        alice = self._a.register("alice")
        rita = self._b.register("rita")
        room_id = alice.create_room(invite=[rita.user_id])
        rita.join(room_id, via=[self._a.server_name])
        seen = alice.membership(room_id, rita.user_id)
        check(seen == "join", f"A says that Rita's membership is {seen!r}, and not 'join'")
        _done("Rita of homeserver B has joined the Matrix room of Alice of homeserver A")
        _show("Alice", alice.user_id)
        _show("Rita", rita.user_id)
        _show("Matrix room", room_id)
        return alice, rita, room_id

    def _rita_asks(self, rita: User, room_id: str) -> str:
        answer = self._ask(rita, room_id)
        jwt = _token(answer, "Rita")
        _done("Rita asks A for a LiveKit access token, and gets one")
        self._show_token(answer, jwt, rita)
        rooms = self._livekit.rooms()
        check(rooms == [], f"LiveKit has a room because a restricted user asked: {rooms}")
        _show("LiveKit lists", "no room")
        return jwt

    async def _rita_cannot_start_the_call(self, jwt: str) -> None:
        try:
            rita_there = await Participant.join(self._livekit.url, jwt)
        except CallRefused as e:
            refusal = str(e)
        else:
            await rita_there.leave()
            raise NotAsPromised("Rita could start the call, although she is restricted")
        check(
            "requested room does not exist" in refusal,
            f"LiveKit refused Rita, but for another reason: {refusal}",
        )
        _done("Rita cannot start the call with it")
        _show("LiveKit says", refusal)

    def _alice_asks(self, alice: User, room_id: str, room: str) -> str:
        answer = self._ask(alice, room_id)
        jwt = _token(answer, "Alice")
        _done("Alice asks A for a token: she has full access, so A makes the LiveKit room")
        self._show_token(answer, jwt, alice)
        names = [listed["name"] for listed in self._livekit.rooms()]
        check(names == [room], f"LiveKit has the rooms {names}, and not just {room}")
        _show("LiveKit lists", f"room {room}")
        return jwt

    async def _join(self, who: str, jwt: str, call: contextlib.AsyncExitStack) -> Participant:
        try:
            participant = await Participant.join(self._livekit.url, jwt)
        except CallRefused as e:
            raise NotAsPromised(f"LiveKit does not let {who} in: {e}") from None
        call.push_async_callback(participant.leave)
        await participant.publish_tone()
        return participant

    async def _hear(self, alice: Participant, rita: Participant) -> None:
        try:
            heard = await asyncio.gather(
                alice.hear(rita.identity, _FRAMES), rita.hear(alice.identity, _FRAMES)
            )
        except asyncio.TimeoutError:
            raise NotAsPromised(
                "the two are in the call, but they do not hear each other"
            ) from None
        _done("Audio flows both ways")
        _show("Alice hears", f"{heard[0]} frames of Rita's tone, 10 ms each")
        _show("Rita hears", f"{heard[1]} frames of Alice's tone, 10 ms each")

    async def _rita_asks_her_own_homeserver(self, rita: User, room_id: str, room: str) -> None:
        url, server_name = self._livekit.url, self._a.server_name
        body = service.homeserver_body(rita, room_id, url, server_name=server_name)
        answer = service.homeserver_get_token(rita, body)
        jwt = _token(answer, "Rita, of her own homeserver,")
        said = service.claims(jwt)
        check(said["video"]["room"] == room, f"the token is for another call: {said}")
        try:
            there = await Participant.join(url, jwt)
        except CallRefused as e:
            raise NotAsPromised(f"LiveKit does not take the token: {e}") from None
        await there.leave()
        _done("Rita asks B for a token of A's LiveKit, as MSC4195 has it: B asks A over federation")
        _show("request", answer.request)
        _show("answer", f"{answer.status}, a JWT for {said['sub']}")
        _show("LiveKit", "takes it")

    def _ask(self, user: User, room_id: str) -> Answer:
        return service.post(self._a.client_url, "/sfu/get", service.sfu_get_body(user, room_id))

    def _show_token(self, answer: Answer, jwt: str, user: User) -> None:
        said = service.claims(jwt)
        video = said["video"]
        identity = f"{user.user_id}:{user.device_id}"
        check(said["sub"] == identity, f"the token is for {said['sub']!r}, and not {identity!r}")
        check(video["roomJoin"] is True, f"the token does not let its holder join: {video}")
        check(video["roomCreate"] is False, f"the token lets its holder make rooms: {video}")
        _show("request", answer.request)
        _show("answer", f"{answer.status}, url {answer.json['url']}, and a JWT that says:")
        _show("  sub", said["sub"])
        grants = json.dumps(video)[1:-1]
        indent = " " * _COLUMN
        _show("  video", textwrap.fill(grants, 98, initial_indent=indent, subsequent_indent=indent))
        _show("  exp", f"{datetime.fromtimestamp(said['exp']):%H:%M:%S}")

    def _in_call(self, room: str, expected: int) -> str:
        identities = sorted(listed["identity"] for listed in self._livekit.participants(room))
        check(
            len(identities) == expected,
            f"LiveKit lists {identities} in the call, and not {expected} participants",
        )
        return ", ".join(identities)

    def _say_what_to_try(self, alice: User, rita: User, room_id: str, room: str) -> None:
        a = self._a.client_url
        p = a + service.PREFIX
        transports = f"{a}/_matrix/client/unstable/org.matrix.msc4143/rtc/transports"
        well_known = f"{a}/.well-known/matrix/client"
        sfu_get = json.dumps(service.sfu_get_body(rita, room_id))
        get_token = json.dumps(service.get_token_body(alice, room_id))
        forged = {"access_token": "forged", "matrix_server_name": self._b.server_name}
        forged_body = json.dumps(service.sfu_get_body(rita, room_id, openid_token=forged))
        print(
            f"""
The call goes on until Ctrl-C. To try meanwhile, for example in another terminal; the OpenID tokens
are good for an hour:

Is the module there?
  curl -i {p}/healthz

What do clients discover?
  curl {well_known}
  curl -H 'Authorization: Bearer {alice.access_token}' {transports}

A LiveKit access token for Rita, as clients in the field ask for it:
  curl -d '{sfu_get}' {p}/sfu/get

One for Alice at the newer endpoint:
  curl -d '{get_token}' {p}/get_token

A forged OpenID token in the name of B:
  curl -i -d '{forged_body}' {p}/sfu/get

Links: {p}/healthz
       {well_known}
       {self._livekit.api_url}  (LiveKit; the call is in its room {room})
""",
            flush=True,
        )


def _token(answer: Answer, who: str) -> str:
    check(answer.status == 200, f"{who} gets no token: {answer}")
    jwt = answer.json["jwt"]
    assert isinstance(jwt, str)
    return jwt


def _done(step: str) -> None:
    print(f"✔ {step}", flush=True)


def _show(name: str, seen: str) -> None:
    print(f"    {name}".ljust(_COLUMN) + seen.lstrip(), flush=True)
