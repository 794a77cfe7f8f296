# SPDX-License-Identifier: Apache-2.0
"""A user who takes part in calls as a Matrix client does.

Each user records when it was connected. `verdict.py` compares the room and the SFU with that
record.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Protocol, TypeVar

from testbed import service
from testbed.http import Answer, WrongAnswer
from testbed.livekit import LiveKit
from testbed.matrix import User
from testbed.member import MEMBER
from tests.chaos.hosts import Host

T = TypeVar("T")

DELAYS_MS = (5_000, 15_000, 60_000, 600_000, 3_600_000)
DOORS = ("/sfu/get", "/get_token", "service, A", "service, B", "homeserver")

# How long a user waits for a connection before requesting another token.
PATIENCE_SEC = 10.0

WHAT_NEXT = {
    "hang up, sending a leave": 3,
    "hang up, sending the delayed leave": 3,
    "hang up without a leave": 4,
    "reconnect": 3,
    "reconnect many times": 1,
    "disconnect and reconnect": 2,
    "leave the Matrix room": 3,
    "be kicked": 3,
    "be banned": 1,
    "be deactivated": 1,
}
OUT_OF_THE_ROOM = ("leave the Matrix room", "be kicked", "be banned", "be deactivated")
FOR_GOOD = ("be banned", "be deactivated")


class Cut(Exception):
    """The client was killed, so it does not do what it was about to do."""


@dataclass
class Membership:
    """One non-empty membership event and its delayed leave.

    Attributes:
        number: the number in the event.
        delay_ms: the delay of its delayed leave, in milliseconds.
        delay_id: the ID of its delayed leave.
        scheduled: when the leave was scheduled, in seconds since the epoch.
        delegated: since when the homeserver restarts the leave; None if it does not.
    """

    number: int
    delay_ms: int
    delay_id: str
    scheduled: float
    delegated: float | None = None


class Run(Protocol):
    """What a user needs of the run that it takes part in; `play.py` has it.

    Attributes:
        seed: makes the user's decisions repeatable.
        over: set when no user starts another call.
        closing: set when all users leave.
        livekit: the LiveKit server.
        moderator: kicks and bans.
        urls: the processes of the homeserver.
    """

    seed: int
    over: threading.Event
    closing: threading.Event
    livekit: LiveKit
    moderator: User
    urls: list[str]

    def note(self, who: str, what: str) -> None: ...

    def journal(self, who: str, what: str) -> None: ...

    def replace(self, user: SimulatedUser) -> None: ...

    def has_lost_membership(self, user: SimulatedUser, number: int) -> bool: ...


class SimulatedUser:
    """One device of one user, in one room."""

    def __init__(self, play: Run, name: str, account: User, room_id: str, host: Host) -> None:
        self.name = name
        self.account = account
        self.room_id = room_id
        self.host = host
        self.key = f"_{account.user_id}_{account.device_id}_m.call"
        self.identity = ""
        self.livekit_room = ""
        # Spans of time in which the user wanted to be in the call, and in which it was connected.
        self.wanted: list[list[float]] = []
        self.inside: list[list[float]] = []
        # When the user left or was removed from the Matrix room.
        self.left_room: list[float] = []
        # Spans of time in which the user was sending a leave.
        self.leaving: list[tuple[float, float]] = []
        # When LiveKit reported that it removed the participant.
        self.removed: list[float] = []
        self.memberships: dict[int, Membership] = {}
        # The number of the last membership before the user left the Matrix room. The room accepts
        # no leaves from the user after that.
        self.last_in_room = 0
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

    # What the user knows about itself

    @property
    def wants(self) -> bool:
        return bool(self.wanted) and self.wanted[-1][1] == float("inf")

    @property
    def is_inside(self) -> bool:
        return bool(self.inside) and self.inside[-1][1] == float("inf")

    def was_inside(self, since: float, until: float) -> bool:
        """Whether the user was connected all of that time."""
        return any(a <= since and until <= b for a, b in self.inside)

    def stayed(self, since: float, until: float) -> bool:
        """Whether the user wanted to be in the call all of that time."""
        return any(a <= since and until <= b for a, b in self.wanted)

    def on_report(self, report: dict[str, Any]) -> None:
        """Records a report of the user's client."""
        self._now_inside(report["is"] == "in", report["at"])
        if report["why"] in ("PARTICIPANT_REMOVED", "ROOM_DELETED"):
            self.removed.append(report["at"])

    def die(self) -> None:
        """Records that the client is about to be killed."""
        self.cut.set()
        self._now_wanting(False)
        self._now_inside(False, time.time())

    def join(self) -> None:
        """Waits for the end of this user's thread."""
        self._thread.join()

    def _now_wanting(self, wants: bool) -> None:
        _note(self.wanted, wants, time.time())

    def _now_inside(self, is_inside: bool, at: float) -> None:
        _note(self.inside, is_inside, at)

    # What the user does

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
                    play.note(self.name, "client killed")
                    self.cut.clear()
                    if self._is_gone:
                        return
                    play.over.wait(self._random.uniform(0, 5))
        except Exception as e:  # The verdict reports it.
            self.trouble = f"{type(e).__name__}: {e}"

    def _pause(self, seconds: float) -> None:
        if self.cut.wait(seconds):
            raise Cut()

    def _ask(self, func: Callable[[], T]) -> T:
        """Calls a function that sends a request, and repeats it while the homeserver is down."""
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
        """The same for a request that the homeserver rejects if it was processed before.

        Only the answer to the earlier attempt was lost then.
        """
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
            self._ask(lambda: self.account.join(self.room_id))
            self.is_in_room = True
        self._door = self._random.choice(DOORS)
        self._now_wanting(True)
        self._join_sfu()
        if self._random.random() < 0.7:
            self._wait_for_connection()
        self._announce()

    def _join_sfu(self) -> None:
        """Requests a token and makes the client connect."""
        if self._door in ("/sfu/get", "service, A"):
            answer = self._ask(lambda: self._post("/sfu/get").ok())
        elif self._door in ("/get_token", "service, B"):
            answer = self._ask(lambda: self._post("/get_token").ok())
        else:
            body = service.homeserver_body(self.account, self.room_id, self._play.livekit.url)
            answer = self._ask(
                lambda: service.homeserver_get_token(self.account.at(self._any_url()), body).ok()
            )
        claims = service.claims(answer["jwt"])
        self.identity, self.livekit_room = claims["sub"], claims["video"]["room"]
        self.host.order(self.name, "join", url=self._play.livekit.url, jwt=answer["jwt"])

    def _post(self, endpoint: str, **more: Any) -> Answer:
        make = service.sfu_get_body if endpoint == "/sfu/get" else service.get_token_body
        return service.post(self._any_url(), endpoint, make(self.account, self.room_id, **more))

    def _any_url(self) -> str:
        """Any process that serves the module's endpoints."""
        return self._random.choice(self._play.urls)

    def _wait_for_connection(self) -> None:
        deadline = time.time() + PATIENCE_SEC
        while not self.is_inside and time.time() < deadline:
            self._pause(0.05)

    def _announce(self) -> None:
        """Schedules the leave, sends the membership, and delegates the leave."""
        is_delegated = False
        while not is_delegated and not self._play.closing.is_set():
            self._number += 1
            delay_ms = self._random.choice(DELAYS_MS)
            delay_id = self._ask(lambda: self._schedule(delay_ms))  # noqa: B023
            membership = Membership(self._number, delay_ms, delay_id, time.time())
            self.memberships[self._number] = membership
            content = {"application": "m.call", "number": self._number}
            self._ask(lambda: self.account.send_state(self.room_id, MEMBER, content, self.key))  # noqa: B023
            # Synapse may have sent the leave at its start, even before the membership.
            is_delegated = self._ask(lambda: self._delegate(delay_id, delay_ms))  # noqa: B023
            if is_delegated:
                membership.delegated = time.time()
            self._play.journal(
                self.name,
                f"announced {self._number}, {delay_ms} ms, {delay_id}, by {self._door} as"
                f" {self.identity}: {'delegated' if is_delegated else 'rejected'}",
            )

    def _schedule(self, delay_ms: int) -> str:
        """Schedules the leave, unless an earlier request did so and only its answer was lost."""
        account = self.account
        known = {membership.delay_id for membership in self.memberships.values()}
        for event in account.delayed():
            # The answer with this ID was lost. A forgotten leave would end a later membership.
            if event["delay_id"] not in known and event.get("delay") == delay_ms:
                return str(event["delay_id"])
        return account.delay_state(self.room_id, MEMBER, {}, self.key, delay_ms)

    def _delegate(self, delay_id: str, delay_ms: int) -> bool:
        more = {"delay_id": delay_id, "delay_timeout": delay_ms}
        if self._door.startswith("/"):
            self._post(self._door, **more).ok()
            # The answer does not say so, but clients continue to restart their leave.
            return self._manage(delay_id, "restart").status == 200
        if self._door == "homeserver":
            body = service.homeserver_body(
                self.account, self.room_id, self._play.livekit.url, delay_id=delay_id
            )
            answer = service.homeserver_delegate(self.account.at(self._any_url()), body)
        else:
            answer = self._post("/delegate_delayed_leave", **more)
        if answer.status == 400:
            # The leave was sent in the meantime.
            return False
        answer.ok()
        return True

    def _manage(self, delay_id: str, do: str) -> Answer:
        """Restarts or sends a delayed event."""
        path = f"/_matrix/client/unstable/org.matrix.msc4140/delayed_events/{delay_id}/{do}"
        answer = self.account.call("POST", path, {})
        if answer.status != 404:
            answer.ok()
        return answer

    def _stay(self) -> None:
        """Stays in the call for a while, and replaces lost tokens and memberships as clients do."""
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
        """Does the next action, and returns whether the user continues."""
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
        elif what == "disconnect and reconnect":
            self._now_wanting(False)
            self.host.order(self.name, "leave")
            self._pause(self._random.uniform(0, 0.5))
            self._now_wanting(True)
            self._join_sfu()
            self._stay()
        self._now_wanting(False)
        if what == "hang up, sending a leave":
            began = time.time()
            self._ask(lambda: self.account.send_state(self.room_id, MEMBER, {}, self.key))
            self.leaving.append((began, time.time()))
        elif what == "hang up, sending the delayed leave":
            # 404 if the homeserver was faster.
            self._ask(lambda: self._manage(self.memberships[self._number].delay_id, "send"))
        self.host.order(self.name, "leave")
        return True

    def _leave_room(self, how: str) -> bool:
        moderator = self._play.moderator
        self._now_wanting(False)
        self.last_in_room = self._number
        self.is_in_room = False
        if how in FOR_GOOD:
            self._is_gone = True
            self._play.replace(self)
        if how == "leave the Matrix room":
            self._ask_once(lambda: self.account.leave(self.room_id))
        elif how == "be kicked":
            self._ask_once(lambda: moderator.kick(self.room_id, self.account.user_id))
        elif how == "be banned":
            self._ask_once(lambda: moderator.ban(self.room_id, self.account.user_id))
        else:
            self._ask_once(lambda: moderator.deactivate(self.account.user_id))
        # The client does not know, and tries to stay connected.
        self.left_room.append(time.time())
        self._pause(self._random.uniform(2, 8))
        self.host.order(self.name, "leave")
        return not self._is_gone

    def hang_up(self) -> None:
        """Disconnects without a leave, at the end of the run."""
        if self.wants:
            self._now_wanting(False)
            self.host.order(self.name, "leave")


def _note(spans: list[list[float]], begins: bool, at: float) -> None:
    """Begins or ends a span of time at the end of the list."""
    is_open = bool(spans) and spans[-1][1] == float("inf")
    if begins and not is_open:
        spans.append([at, float("inf")])
    elif not begins and is_open:
        spans[-1][1] = max(at, spans[-1][0])
