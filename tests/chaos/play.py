# SPDX-License-Identifier: Apache-2.0
"""The servers, the simulated users, and the outages that both go through."""

from __future__ import annotations

import itertools
import json
import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

from testbed import service
from testbed.http import WrongAnswer
from testbed.livekit import LiveKit
from testbed.matrix import User
from testbed.member import MEMBER, POWER_LEVELS
from testbed.postgres import Postgres
from testbed.redis import Redis
from testbed.sets import module_config, running
from testbed.synapse import Synapse
from tests.chaos.hosts import Host
from tests.chaos.simulated_user import SimulatedUser
from tests.chaos.webhooks import LossyWebhooks

# LiveKit's client reconnects every two seconds or so. The module sends the leave after two polls
# that do not list the participant, so polls must be further apart than that.
POLL_SEC = 4.0

USERS_PER_ROOM = 8
USERS_PER_HOST = 5

OUTAGES = ("clients", "synapse", "livekit", "both")

# The module restarts delayed leaves once a second. Synapse itself sends those that fall due before
# the first time after a start.
FIRST_TICK_SEC = 1.5


@dataclass(frozen=True)
class Seen:
    """A membership event in a room; a leave has no number."""

    at: float
    number: int | None
    event_id: str


@dataclass(frozen=True)
class Outage:
    """When a server was down, and which delayed events Synapse itself may have sent then."""

    what: str
    since: float
    until: float
    due: frozenset[str] = frozenset()


class Play:
    """One run. It kills and starts servers on the main thread only."""

    def __init__(self, directory: Path, seed: int, participants: int, has_workers: bool) -> None:
        self.directory = directory
        self.seed = seed
        self.has_workers = has_workers
        self.livekit = LiveKit(directory)
        self.users: list[SimulatedUser] = []
        self.outages: list[Outage] = []
        self.counts: Counter[str] = Counter()
        self.events: dict[tuple[str, str], list[Seen]] = {}
        self.trouble: list[str] = []
        # Set when no user starts another call.
        self.over = threading.Event()
        # Set when all users leave.
        self.closing = threading.Event()
        self._participants = participants
        self._random = random.Random(f"{seed} play")
        self._names = itertools.count(1)
        self._is_watching = True
        self._lock = threading.Lock()
        self._journal = (directory / "play.log").open("w")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Starts all servers, and stops them and the clients at the end."""
        with running(self.livekit), self._synapse():
            self.urls = [self.synapse.client_url, *self.synapse.worker_urls]
            self.webhooks = LossyWebhooks(
                self.urls[-1] + service.PREFIX + "/sfu_webhook", f"{self.seed} webhooks"
            )
            self.livekit.webhook_urls.append(self.webhooks.url)
            self.livekit.restart()
            self.moderator = self.synapse.register("moderator", admin=True)
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            hosts = -(-self._participants // USERS_PER_HOST)
            self.hosts = [
                Host(self.directory / f"clients{number}.log", self._report)
                for number in range(hosts)
            ]
            try:
                yield
            finally:
                self._is_watching = False
                for host in self.hosts:
                    host.end()
                self.webhooks.stop()
                self._journal.close()

    @contextmanager
    def _synapse(self) -> Iterator[None]:
        config = module_config(self.livekit, sanity_check_interval=f"{int(POLL_SEC)}s")
        if not self.has_workers:
            self.synapse = Synapse("chaos", self.directory, config)
            with running(self.synapse):
                yield
            return
        self._postgres, redis = Postgres(self.directory), Redis(self.directory)
        with running(self._postgres, redis):
            self.synapse = Synapse(
                "chaos",
                self.directory,
                config,
                postgres=self._postgres,
                redis=redis,
                workers=1,
                background_worker=True,
            )
            with running(self.synapse):
                yield

    # What simulated users report

    def note(self, who: str, what: str) -> None:
        """Counts an action of a user."""
        self.counts[what] += 1
        self.journal(who, what)

    def journal(self, who: str, what: str) -> None:
        """Writes a line into play.log, for debugging a failed run."""
        with self._lock:
            print(f"{clock(time.time())} {who}: {what}", file=self._journal, flush=True)

    def replace(self, user: SimulatedUser) -> None:
        """Adds a user in the place of one who cannot return to the room."""
        threading.Thread(target=self._add_user, args=[user.room_id, user.host], daemon=True).start()

    def has_lost_membership(self, user: SimulatedUser, number: int) -> bool:
        """Whether the room had the membership of that number and then got a leave."""
        seen = [event.number for event in self.events.get((user.room_id, user.key), ())]
        return seen[-1:] == [None] and number in seen

    def current(self, user: SimulatedUser) -> int | None:
        """The number of a user's membership in the room, None for none."""
        seen = self.events.get((user.room_id, user.key))
        return seen[-1].number if seen else None

    # The run

    def begin(self) -> None:
        """Creates rooms and users."""
        rooms = [
            self.moderator.create_room(preset="public_chat", power_levels=POWER_LEVELS)
            for _ in range(-(-self._participants // USERS_PER_ROOM))
        ]
        self._watcher.start()
        for number in range(self._participants):
            self._add_user(rooms[number % len(rooms)], self.hosts[number // USERS_PER_HOST])

    def disturb(self, seconds: float) -> None:
        """Kills servers and clients at random."""
        until = time.monotonic() + seconds
        # Short runs also have each kind of outage.
        first = self._random.sample(OUTAGES[:3], 3)
        for what in itertools.chain(first, iter(lambda: self._random.choice(OUTAGES), None)):
            pause = self._random.uniform(2, 6)
            if time.monotonic() + pause > until:
                break
            self.over.wait(pause)
            self._kill(what, down_sec=self._random.uniform(0, 4))
        self.over.wait(max(0.0, until - time.monotonic()))
        self.over.set()

    def close(self) -> None:
        """Makes every user disconnect without sending a leave."""
        self.closing.set()
        for user in self.users:
            user.join()
        for user in self.users:
            user.hang_up()

    def _kill(self, what: str, down_sec: float) -> None:
        self.note("play", f"kill {what}")
        if what == "clients":
            host = self._random.choice(self.hosts)
            for user in self.users:
                if user.host is host:
                    user.die()
            host.kill()
            return
        since = time.time()
        if what in ("livekit", "both"):
            self.livekit.process.kill()
            for user in self.users:
                user.on_report({"is": "out", "why": "", "at": since})
        if what in ("synapse", "both"):
            self.synapse.kill()
        self.over.wait(down_sec)
        due: Sequence[tuple[Any, ...]] = ()
        if what in ("livekit", "both"):
            self.livekit.start()
        if what in ("synapse", "both"):
            due = self.rows("SELECT delay_id, send_ts FROM delayed_events")
            self.synapse.start()
            self.synapse.wait_ready()
        if what in ("livekit", "both"):
            self.livekit.wait_ready()
        until = time.time()
        self.journal("play", f"{what} is back")
        last_ms = 1000 * (until + FIRST_TICK_SEC)
        self.outages.append(
            Outage(what, since, until, frozenset(d for d, send_ms in due if send_ms <= last_ms))
        )

    def _add_user(self, room_id: str, host: Host) -> None:
        name = f"user{next(self._names)}"
        user: User | None = None
        while user is None:
            try:
                user = self.synapse.register(name)
            except (OSError, HTTPException, WrongAnswer):
                # The account may exist although the answer was lost.
                name = f"user{next(self._names)}"
                self.over.wait(0.3)
        while True:
            try:
                user.join(room_id)
                break
            except (OSError, HTTPException, WrongAnswer):
                self.over.wait(0.3)
        self.users.append(SimulatedUser(self, name, user, room_id, host))

    def _report(self, report: dict[str, Any]) -> None:
        self.journal(report["who"], f"client is {report['is']} {report['why']}")
        for user in self.users:
            if user.name == report["who"]:
                user.on_report(report)

    def _watch(self) -> None:
        """Follows the rooms, as a client does."""
        wanted = json.dumps(
            {
                "room": {
                    "timeline": {"types": [MEMBER], "limit": 100},
                    "state": {"types": [MEMBER]},
                    "ephemeral": {"types": []},
                    "account_data": {"types": []},
                },
                "presence": {"types": []},
            }
        )
        path = f"/_matrix/client/v3/sync?timeout=500&filter={quote(wanted)}"
        since = ""
        while self._is_watching:
            try:
                answer = self.moderator.call("GET", path + since).ok()
            except (OSError, HTTPException, WrongAnswer):
                time.sleep(0.1)
                continue
            since = f"&since={answer['next_batch']}"
            for room_id, room in answer.get("rooms", {}).get("join", {}).items():
                if room["timeline"]["limited"] and room["timeline"]["events"]:
                    self.trouble.append(f"the sync of {room_id} left out events")
                for event in room["timeline"]["events"]:
                    self._saw(room_id, event)

    def _saw(self, room_id: str, event: dict[str, Any]) -> None:
        seen = self.events.setdefault((room_id, event["state_key"]), [])
        if all(event["event_id"] != other.event_id for other in seen):
            number = event["content"].get("number")
            seen.append(Seen(event["origin_server_ts"] / 1000, number, event["event_id"]))

    # The database

    def rows(self, sql: str) -> Sequence[tuple[Any, ...]]:
        """Runs a statement on the homeserver's database and returns its rows, if any."""
        if self.has_workers:
            connection: Any = self._postgres.connect(self.synapse.name)
        else:
            connection = sqlite3.connect(self.synapse.directory / "homeserver.db", timeout=30)
        with closing(connection), connection, closing(connection.cursor()) as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description is not None else ()


def clock(at: float) -> str:
    """A time in the format of Synapse's and LiveKit's logs."""
    return time.strftime("%H:%M:%S", time.localtime(at)) + f",{int(at * 1000) % 1000:03}"
