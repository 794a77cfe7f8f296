# SPDX-License-Identifier: Apache-2.0
"""Somebody who takes part in calls, as a Matrix client does it, and what becomes of them.

What a person knows of themselves is the truth that the room and the SFU are held against.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, TypeVar

from testbed import service
from testbed.http import Answer, WrongAnswer
from testbed.matrix import User
from testbed.member import MEMBER

if TYPE_CHECKING:
    from tests.chaos.hosts import Host
    from tests.chaos.play import Play

T = TypeVar("T")

DELAYS_MS = (5_000, 15_000, 60_000, 600_000, 3_600_000)
DOORS = ("/sfu/get", "/get_token", "service, A", "service, B", "homeserver")

# How long to wait for a connection before asking for another token, as whoever sits in front of it
# would.
PATIENCE_SEC = 10.0

WHAT_NEXT = {
    "hang up and say so": 3,
    "hang up, sending the delayed leave": 3,
    "hang up without a word": 4,
    "reconnect": 3,
    "reconnect many times": 1,
    "drop out and come back": 2,
    "leave the Matrix room": 3,
    "be kicked": 3,
    "be banned": 1,
    "be deactivated": 1,
}
OUT_OF_THE_ROOM = ("leave the Matrix room", "be kicked", "be banned", "be deactivated")
FOR_GOOD = ("be banned", "be deactivated")


class Cut(Exception):
    """The client has died, and whatever it was about to do."""


@dataclass
class Membership:
    """One non-empty membership event, and the delayed leave that goes with it.

    Attributes:
        number: also in the event.
        delay_ms: of its delayed leave.
        delay_id: of the delayed leave.
        scheduled: when that was scheduled.
        taken: since when the homeserver looks after it; None if it does not.
    """

    number: int
    delay_ms: int
    delay_id: str
    scheduled: float
    taken: float | None = None


class Person:
    """One device of one user, in one room."""

    def __init__(self, play: Play, name: str, user: User, room_id: str, host: Host) -> None:
        self.name = name
        self.user = user
        self.room_id = room_id
        self.host = host
        self.key = f"_{user.user_id}_{user.device_id}_m.call"
        self.identity = ""
        self.livekit_room = ""
        # When they wanted to be in the call, and when they were, from and to.
        self.wanted: list[list[float]] = []
        self.inside: list[list[float]] = []
        # When they were put out of the Matrix room, and when the SFU has thrown them out.
        self.put_out: list[float] = []
        # When they were sending their leave themselves, from and to.
        self.leaving: list[tuple[float, float]] = []
        self.removed: list[float] = []
        self.memberships: dict[int, Membership] = {}
        # Memberships up to this one are of before they left the Matrix room, which takes no leave
        # of theirs any more.
        self.void = 0
        self.is_in_room = True
        self.trouble: str | None = None
        self.cut = threading.Event()
        self._play = play
        self._random = random.Random(f"{play.seed} {name}")
        self._number = 0
        self._door = DOORS[0]
        self._is_gone = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    # The truth

    @property
    def wants(self) -> bool:
        return bool(self.wanted) and self.wanted[-1][1] == float("inf")

    @property
    def is_inside(self) -> bool:
        return bool(self.inside) and self.inside[-1][1] == float("inf")

    def was_inside(self, since: float, until: float) -> bool:
        """Whether they were connected all of that time."""
        return any(a <= since and until <= b for a, b in self.inside)

    def stayed(self, since: float, until: float) -> bool:
        """Whether they wanted to be in the call all of that time."""
        return any(a <= since and until <= b for a, b in self.wanted)

    def told(self, report: dict[str, Any]) -> None:
        """What the client tells."""
        self._now_inside(report["is"] == "in", report["at"])
        if report["why"] in ("PARTICIPANT_REMOVED", "ROOM_DELETED"):
            self.removed.append(report["at"])

    def die(self) -> None:
        """The client is about to be killed."""
        self.cut.set()
        self._now_wanting(False)
        self._now_inside(False, time.time())

    def join(self) -> None:
        """Waits for the end of this person's life."""
        self._thread.join()

    def _now_wanting(self, wants: bool) -> None:
        _note(self.wanted, wants, time.time())

    def _now_inside(self, is_inside: bool, at: float) -> None:
        _note(self.inside, is_inside, at)

    # Their life

    def _run(self) -> None:
        play = self._play
        try:
            while not play.over.is_set():
                try:
                    self._enter()
                    self._stay()
                    if play.over.is_set():
                        break
                    if not self._go_on():
                        return
                    self._pause(self._random.uniform(0, 3))
                except Cut:
                    play.note(self.name, "die without a word")
                    self.cut.clear()
                    if self._is_gone:
                        return
                    play.over.wait(self._random.uniform(0, 5))
        except Exception as e:
            self.trouble = f"{type(e).__name__}: {e}"

    def _pause(self, seconds: float) -> None:
        if self.cut.wait(seconds):
            raise Cut()

    def _ask(self, func: Callable[[], T]) -> T:
        """Does what asks the homeserver, again and again while it is down."""
        while True:
            if self.cut.is_set():
                raise Cut()
            try:
                return func()
            except (OSError, HTTPException):
                self._pause(0.3)
            except WrongAnswer as e:
                if " -> 5" not in str(e):
                    raise
                self._pause(0.3)

    def _ask_once(self, func: Callable[[], None]) -> None:
        """The same for what is refused when it has been done, and only the answer was lost."""
        asked = 0

        def ask() -> None:
            nonlocal asked
            asked += 1
            try:
                func()
            except WrongAnswer as e:
                if asked == 1 or " -> 4" not in str(e):
                    raise

        self._ask(ask)

    def _enter(self) -> None:
        self._play.note(self.name, "enter")
        if not self.is_in_room:
            self._ask(lambda: self.user.join(self.room_id))
            self.is_in_room = True
        self._door = self._random.choice(DOORS)
        self._now_wanting(True)
        self._join_sfu()
        if self._random.random() < 0.7:
            self._wait_for_connection()
        self._announce()

    def _join_sfu(self) -> None:
        """Gets a token and has the client connect."""
        if self._door in ("/sfu/get", "service, A"):
            answer = self._ask(lambda: self._post("/sfu/get").ok())
        elif self._door in ("/get_token", "service, B"):
            answer = self._ask(lambda: self._post("/get_token").ok())
        else:
            body = service.homeserver_body(self.user, self.room_id, self._play.livekit.url)
            answer = self._ask(
                lambda: service.homeserver_get_token(self.user.at(self._any_url()), body).ok()
            )
        claims = service.claims(answer["jwt"])
        self.identity, self.livekit_room = claims["sub"], claims["video"]["room"]
        self.host.order(self.name, "join", url=self._play.livekit.url, jwt=answer["jwt"])

    def _post(self, endpoint: str, **more: Any) -> Answer:
        make = service.sfu_get_body if endpoint == "/sfu/get" else service.get_token_body
        return service.post(self._any_url(), endpoint, make(self.user, self.room_id, **more))

    def _any_url(self) -> str:
        """Any process that serves the module's endpoints."""
        return self._random.choice(self._play.urls)

    def _wait_for_connection(self) -> None:
        deadline = time.time() + PATIENCE_SEC
        while not self.is_inside and time.time() < deadline:
            self._pause(0.05)

    def _announce(self) -> None:
        """Schedules the leave, sends the membership, and hands the leave over."""
        is_taken = False
        while not is_taken and not self._play.closing.is_set():
            self._number += 1
            delay_ms = self._random.choice(DELAYS_MS)
            delay_id = self._ask(lambda: self._schedule(delay_ms))  # noqa: B023
            membership = Membership(self._number, delay_ms, delay_id, time.time())
            self.memberships[self._number] = membership
            content = {"application": "m.call", "number": self._number}
            self._ask(lambda: self.user.send_state(self.room_id, MEMBER, content, self.key))  # noqa: B023
            # While the homeserver was down it may have been sent, ahead even of the membership.
            is_taken = self._ask(lambda: self._delegate(delay_id, delay_ms))  # noqa: B023
            if is_taken:
                membership.taken = time.time()
            self._play.journal(
                self.name,
                f"announced {self._number}, {delay_ms} ms, {delay_id}, by {self._door} as"
                f" {self.identity}: {'taken' if is_taken else 'refused'}",
            )

    def _schedule(self, delay_ms: int) -> str:
        """Schedules the leave, unless that has been done and only the answer was lost."""
        user = self.user
        known = {membership.delay_id for membership in self.memberships.values()}
        for event in user.delayed():
            # An answer that was lost: a leave that nobody knows of would end a later membership.
            if event["delay_id"] not in known and event.get("delay") == delay_ms:
                return str(event["delay_id"])
        return user.delay_state(self.room_id, MEMBER, {}, self.key, delay_ms)

    def _delegate(self, delay_id: str, delay_ms: int) -> bool:
        more = {"delay_id": delay_id, "delay_timeout": delay_ms}
        if self._door.startswith("/"):
            self._post(self._door, **more).ok()
            # The answer does not tell, but clients go on restarting their leave.
            return self._manage(delay_id, "restart").status == 200
        if self._door == "homeserver":
            body = service.homeserver_body(
                self.user, self.room_id, self._play.livekit.url, delay_id=delay_id
            )
            answer = service.homeserver_delegate(self.user.at(self._any_url()), body)
        else:
            answer = self._post("/delegate_delayed_leave", **more)
        if answer.status == 400:
            # It was sent meanwhile.
            return False
        answer.ok()
        return True

    def _manage(self, delay_id: str, do: str) -> Answer:
        """Has a delayed event restarted, or sent."""
        path = f"/_matrix/client/unstable/org.matrix.msc4140/delayed_events/{delay_id}/{do}"
        answer = self.user.call("POST", path, {})
        if answer.status != 404:
            answer.ok()
        return answer

    def _stay(self) -> None:
        """Is in the call for a while, and makes good what is lost, as clients do."""
        play = self._play
        until = time.time() + self._random.uniform(2, 15)
        outside_since = time.time()
        while not play.closing.is_set() and (play.over.is_set() or time.time() < until):
            self._pause(0.2)
            if self.is_inside:
                outside_since = time.time()
            elif time.time() - outside_since > PATIENCE_SEC:
                play.note(self.name, "ask for another token")
                outside_since = time.time()
                self._join_sfu()
            if play.has_lost_membership(self, self._number):
                play.note(self.name, "announce again")
                self._announce()

    def _go_on(self) -> bool:
        """Does what comes next; returns whether life goes on."""
        (what,) = self._random.choices(list(WHAT_NEXT), list(WHAT_NEXT.values()))
        self._play.note(self.name, what)
        if what in OUT_OF_THE_ROOM:
            return self._leave_room(what)
        if what == "reconnect":
            self.host.order(self.name, "again")
            self._stay()
        elif what == "reconnect many times":
            for _ in range(10):
                self.host.order(self.name, "again")
                self._pause(self._random.uniform(0.1, 0.5))
            self._stay()
        elif what == "drop out and come back":
            self._now_wanting(False)
            self.host.order(self.name, "leave")
            self._pause(self._random.uniform(0, 0.5))
            self._now_wanting(True)
            self._join_sfu()
            self._stay()
        self._now_wanting(False)
        if what == "hang up and say so":
            began = time.time()
            self._ask(lambda: self.user.send_state(self.room_id, MEMBER, {}, self.key))
            self.leaving.append((began, time.time()))
        elif what == "hang up, sending the delayed leave":
            # 404 if the homeserver was faster.
            self._ask(lambda: self._manage(self.memberships[self._number].delay_id, "send"))
        self.host.order(self.name, "leave")
        return True

    def _leave_room(self, how: str) -> bool:
        moderator = self._play.moderator
        self._now_wanting(False)
        self.void = self._number
        self.is_in_room = False
        if how in FOR_GOOD:
            self._is_gone = True
            self._play.replace(self)
        if how == "leave the Matrix room":
            self._ask_once(lambda: self.user.leave(self.room_id))
        elif how == "be kicked":
            self._ask_once(lambda: moderator.kick(self.room_id, self.user.user_id))
        elif how == "be banned":
            self._ask_once(lambda: moderator.ban(self.room_id, self.user.user_id))
        else:
            self._ask_once(lambda: moderator.deactivate(self.user.user_id))
        # Their client knows nothing of that, and tries what it can to stay.
        self.put_out.append(time.time())
        self._pause(self._random.uniform(2, 8))
        self.host.order(self.name, "leave")
        return not self._is_gone

    def hang_up(self) -> None:
        """At the very end: without a word."""
        if self.wants:
            self._now_wanting(False)
            self.host.order(self.name, "leave")


def _note(spans: list[list[float]], begins: bool, at: float) -> None:
    """Notes in a list of spans of time that one begins, or that it ends."""
    is_open = bool(spans) and spans[-1][1] == float("inf")
    if begins and not is_open:
        spans.append([at, float("inf")])
    elif not begins and is_open:
        spans[-1][1] = max(at, spans[-1][0])
