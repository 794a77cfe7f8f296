# SPDX-License-Identifier: Apache-2.0
"""What leaves, removals, webhooks and polls cost on a real Synapse with a stub SFU."""

import asyncio
import datetime
import hashlib
import json
import statistics
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import attr
from google.protobuf.json_format import MessageToJson
from livekit import api
from livekit.protocol.models import ParticipantInfo, Room
from livekit.protocol.webhook import WebhookEvent

from benchmarks.load import Result, run
from benchmarks.setting import KEY, SECRET, StubSfu, Tokens, http_request, module_config, port
from testbed import service
from testbed.matrix import User
from testbed.member import MEMBER, POWER_LEVELS
from testbed.process import stop_all, wait_until
from testbed.service import PREFIX
from testbed.synapse import Synapse

CALLS = 20
USERS_PER_CALL = 10
EVERY_SEC = 0.05
GOAL_MS = 250
TRACKED = (100, 10_000, 100_000)
HOUR_MS = 3_600_000
# How often the module restarts a leave with this delay while the participant is connected.
RESTART_MS = 300_000
# Long enough that each measurement ends before the next poll.
POLL_SEC = 300


@attr.s(auto_attribs=True, frozen=True)
class CallUser:
    """A user in a call, with the claims of their LiveKit token."""

    user: User
    room_id: str
    livekit_room: str
    identity: str
    attributes: Mapping[str, str]

    @property
    def key(self) -> str:
        """The state key of the user's membership event."""
        return f"_{self.user.user_id}_{self.user.device_id}_m.call"


def webhook(event: str, livekit_room: str, identity: str, attributes: Mapping[str, str]) -> bytes:
    """A webhook as a whole HTTP request, in LiveKit's form."""
    participant = ParticipantInfo(
        identity=identity, sid=f"PA_{identity}", attributes=dict(attributes)
    )
    message = WebhookEvent(event=event, room=Room(name=livekit_room), participant=participant)
    body = MessageToJson(message).encode("utf-8")
    token = (
        api.AccessToken(KEY, SECRET)
        .with_sha256(b64encode(hashlib.sha256(body).digest()).decode("ascii"))
        .with_ttl(datetime.timedelta(minutes=10))
        .to_jwt()
    )
    return http_request("POST", f"{PREFIX}/sfu_webhook", body, token)


def measure_times(directory: Path) -> None:
    """Prints how soon a leave of the room reaches the SFU, and a disconnect reaches the room."""
    directory.mkdir()
    sfu = StubSfu(directory)
    synapse = Synapse("leaves", directory, module_config(sfu, POLL_SEC))
    try:
        sfu.start()
        synapse.start()
        synapse.wait_ready()
        watcher = synapse.register("watcher")
        members = list(_call_users(synapse, watcher))
        sfu.put("/rooms", _rooms(members))
        for member in members:
            _delegate(member)
        to_room = _disconnect(synapse, sfu, watcher, members)
        sfu.put("/rooms", _rooms(members))
        from_request, from_answer = _leave(sfu, members)
    finally:
        stop_all([sfu.process, *synapse.processes])
    print(
        f"\n{len(members)} users in {CALLS} calls, one of them leaves every"
        f" {1000 * EVERY_SEC:.0f} ms (goal: p99 below {GOAL_MS} ms)"
    )
    print(f"{'':62}{'p50 ms':>8}{'p99 ms':>8}{'max ms':>8}")
    for what, times in (
        ("leaving the room, from the request to RemoveParticipant", from_request),
        ("leaving the room, from the answer to RemoveParticipant", from_answer),
        ("participant_left, from the webhook to the leave in /sync", to_room),
    ):
        print(
            f"{what:62}"
            + "".join(f"{1000 * Result(0, times).quantile(q):8.0f}" for q in (0.5, 0.99, 1))
        )


def _call_users(synapse: Synapse, watcher: User) -> Iterator[CallUser]:
    for call in range(CALLS):
        room_id = watcher.create_room(preset="public_chat", power_levels=POWER_LEVELS)
        for number in range(USERS_PER_CALL):
            user = synapse.register(f"user{call}-{number}")
            user.join(room_id)
            body = service.get_token_body(user, room_id)
            jwt = service.post(synapse.client_url, "/get_token", body).ok()["jwt"]
            claims = service.claims(jwt)
            yield CallUser(
                user, room_id, claims["video"]["room"], claims["sub"], claims["attributes"]
            )


def _rooms(members: Sequence[CallUser]) -> dict[str, dict[str, Mapping[str, str]]]:
    rooms: dict[str, dict[str, Mapping[str, str]]] = {}
    for member in members:
        rooms.setdefault(member.livekit_room, {})[member.identity] = member.attributes
    return rooms


def _delegate(member: CallUser) -> None:
    """Sends the membership of a user and delegates the leave."""
    user, room_id = member.user, member.room_id
    user.send_state(room_id, MEMBER, {"application": "m.call"}, member.key)
    delay_id = user.delay_state(room_id, MEMBER, {}, member.key, HOUR_MS)
    more = {"delay_id": delay_id, "delay_timeout": HOUR_MS}
    body = service.get_token_body(user, room_id, **more)
    service.post(user.client_url, "/delegate_delayed_leave", body).ok()


def _one_by_one(members: Sequence[CallUser], go: Callable[[CallUser], None]) -> None:
    with ThreadPoolExecutor(16) as threads:
        began = time.monotonic()
        doing = []
        for number, member in enumerate(members):
            time.sleep(max(0.0, began + number * EVERY_SEC - time.monotonic()))
            doing.append(threads.submit(go, member))
        for done in doing:
            done.result()


def _disconnect(
    synapse: Synapse, sfu: StubSfu, watcher: User, members: Sequence[CallUser]
) -> list[float]:
    sent: dict[str, float] = {}
    seen: dict[str, float] = {}
    synapse_port = port(synapse.client_url)

    def go(member: CallUser) -> None:
        sfu.put("/gone", {member.livekit_room: {member.identity: {}}})
        request = webhook(
            "participant_left", member.livekit_room, member.identity, member.attributes
        )
        sent[member.key] = time.monotonic()
        asyncio.run(run(synapse_port, [request], 1, 10))

    with _watching(watcher, seen):
        _one_by_one(members, go)
        wait_until(lambda: sent.keys() <= seen.keys(), "all leaves in the rooms")
    return [seen[key] - sent[key] for key in sent]


@contextmanager
def _watching(watcher: User, seen: dict[str, float]) -> Iterator[None]:
    """Records when a client's sync contains each leave."""
    wanted = {"room": {"timeline": {"types": [MEMBER]}, "state": {"types": []}}}
    path = f"/_matrix/client/v3/sync?filter={quote(json.dumps(wanted))}"
    since = watcher.call("GET", path).ok()["next_batch"]
    is_over = False

    def watch() -> None:
        nonlocal since
        while not is_over:
            answer = watcher.call("GET", f"{path}&timeout=500&since={since}").ok()
            now = time.monotonic()
            since = answer["next_batch"]
            for room in answer.get("rooms", {}).get("join", {}).values():
                for event in room["timeline"]["events"]:
                    if not event["content"]:
                        seen[event["state_key"]] = now

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        is_over = True
        thread.join()


def _leave(sfu: StubSfu, members: Sequence[CallUser]) -> tuple[list[float], list[float]]:
    sent: dict[str, float] = {}
    answered: dict[str, float] = {}

    def go(member: CallUser) -> None:
        sent[member.identity] = time.monotonic()
        member.user.leave(member.room_id)
        answered[member.identity] = time.monotonic()

    _one_by_one(members, go)
    wait_until(lambda: len(sfu.get("/removed")) >= len(members), "all of them removed")
    removed = {identity: at for _, identity, at in sfu.get("/removed")}
    return (
        [removed[identity] - at for identity, at in sent.items()],
        # The module may see the leave before Synapse answers.
        [max(0.0, removed[identity] - at) for identity, at in answered.items()],
    )


def measure_messages(directory: Path, rounds: int, messages: int) -> None:
    """Prints the CPU time of a message in a room without a call, with and without the module."""
    directory.mkdir()
    sfu = StubSfu(directory)
    synapses = {
        True: Synapse("with", directory, module_config(sfu, poll_sec=30)),
        False: Synapse("without", directory),
    }
    try:
        sfu.start()
        for synapse in synapses.values():
            synapse.start()
        makes = {}
        for has_module, synapse in synapses.items():
            synapse.wait_ready()
            makes[has_module] = _messages(synapse)
            asyncio.run(run(port(synapse.client_url), makes[has_module](messages), 1, 600))
        cpu: dict[bool, list[float]] = {True: [], False: []}
        for number in range(rounds):
            # The first of the two has colder caches, so they take turns.
            for has_module in (True, False) if number % 2 else (False, True):
                synapse = synapses[has_module]
                requests = makes[has_module](messages)
                before = synapse.main.cpu_seconds()
                asyncio.run(run(port(synapse.client_url), requests, 1, 600))
                cpu[has_module].append((synapse.main.cpu_seconds() - before) / messages)
    finally:
        stop_all([sfu.process, *(s.main for s in synapses.values())])
    ratio = statistics.median(a / b for a, b in zip(cpu[True], cpu[False], strict=True))
    print(
        f"\na message in a room without a call costs Synapse"
        f" {1000 * statistics.median(cpu[False]):.2f} ms of CPU time without the module and"
        f" {1000 * statistics.median(cpu[True]):.2f} ms with it: {100 * (ratio - 1):+.1f} %"
        f" (goal: within 5), {rounds} rounds of {messages} messages, medians"
    )


def _messages(synapse: Synapse) -> Callable[[int], list[bytes]]:
    user = synapse.register("alice")
    room_id = quote(user.create_room())
    made = 0

    def make(count: int) -> list[bytes]:
        nonlocal made
        made += count
        path = f"/_matrix/client/v3/rooms/{room_id}/send/m.room.message/"
        body = b'{"msgtype": "m.text", "body": "Good morning"}'
        return [
            http_request("PUT", f"{path}{number}", body, f"Bearer {user.access_token}")
            for number in range(made - count, made)
        ]

    return make


@attr.s(auto_attribs=True, frozen=True)
class Cost:
    """The wall clock and CPU seconds of one operation."""

    wall: float
    cpu: float


def measure_many(directory: Path, requests: int) -> None:
    """Prints what a token, a webhook and a poll cost while very many users are in calls."""
    directory.mkdir()
    sfu = StubSfu(directory)
    synapse = Synapse("many", directory, module_config(sfu, POLL_SEC))
    print(f"\n{'participants in calls':28}{'p50 ms':>10}{'CPU ms':>10}")
    try:
        sfu.start()
        synapse.start()
        synapse.wait_ready()
        many = Many(synapse, sfu)
        for count in TRACKED:
            synapse.stop()
            many.fill_up_to(count)
            synapse.start()
            synapse.wait_ready()
            for what, cost in many.costs(requests).items():
                name = f"{count:>7,} {what}"
                print(f"{name:28}{1000 * cost.wall:10.1f}{1000 * cost.cpu:10.1f}", flush=True)
    finally:
        stop_all([sfu.process, *synapse.processes])


class Many:
    """A few users who are in very many calls, in each with another device.

    Attributes:
        tokens: creates the users' token requests.
    """

    def __init__(
        self, synapse: Synapse, sfu: StubSfu, users_per_call: int = USERS_PER_CALL
    ) -> None:
        """
        Args:
            synapse: the homeserver of the users.
            sfu: the SFU of the calls.
            users_per_call: the number of users, all of whom are in each call.
        """
        self._synapse = synapse
        self._sfu = sfu
        self._users_per_call = users_per_call
        users = [synapse.register(f"user{number}") for number in range(users_per_call)]
        room_id = users[0].create_room(preset="public_chat", power_levels=POWER_LEVELS)
        for user in users[1:]:
            user.join(room_id)
        self.tokens = Tokens(synapse, users, room_id)
        self._count = 0

    def fill_up_to(self, count: int) -> None:
        """Adds participants to the database and to the SFU. Synapse must be stopped."""
        now_ms = int(1000 * time.time())
        rooms: dict[str, dict[str, dict[str, str]]] = {}
        delegations: list[dict[str, object]] = []
        identities: list[dict[str, object]] = []
        delayed: list[dict[str, object]] = []
        for number in range(self._count, count):
            livekit_room, identity, user = self._participant(number)
            state_key = f"_{identity}"
            rooms.setdefault(livekit_room, {})[identity] = {}
            delay_id = f"delay{number}"
            # The restarts fall due one after the other, as for real participants.
            restarted_ms = now_ms - number * RESTART_MS // count
            delegations.append(
                {
                    "delay_id": delay_id,
                    "user_id": user.user_id,
                    "room_id": self.tokens.room_id,
                    "livekit_room": livekit_room,
                    "member_identity": identity,
                    "event_type": MEMBER,
                    "state_key": state_key,
                    "delay_ms": HOUR_MS,
                    "created_ts": now_ms,
                    "has_multiple_identities": 0,
                    "phase": "connected",
                    "due_ts": restarted_ms + RESTART_MS,
                    "restarted_ts": restarted_ms,
                    "connected_ts": now_ms,
                    "suspected_gone_ts": 0,
                    "attempts": 0,
                }
            )
            identities.append(
                {
                    "livekit_room": livekit_room,
                    "identity": identity,
                    "delay_id": delay_id,
                    "sid": f"PA_{identity}",
                }
            )
            delayed.append(
                {
                    "delay_id": delay_id,
                    "user_localpart": user.user_id[1:].partition(":")[0],
                    "delay": HOUR_MS,
                    "send_ts": restarted_ms + HOUR_MS,
                    "room_id": self.tokens.room_id,
                    "event_type": MEMBER,
                    "state_key": state_key,
                    "content": "{}",
                    "is_processed": False,
                }
            )
        calls = [
            {"livekit_room": room, "room_id": self.tokens.room_id, "seen_ts": now_ms}
            for room in rooms
        ]
        for table, rows in (
            ("synapse_lk_jwt_calls", calls),
            ("synapse_lk_jwt_delegations", delegations),
            ("synapse_lk_jwt_identities", identities),
            ("delayed_events", delayed),
        ):
            self._synapse.insert(table, rows)
        self._count = count
        self._sfu.put("/rooms", rooms)

    def _participant(self, number: int) -> tuple[str, str, User]:
        user = self.tokens.users[number % self._users_per_call]
        return f"call{number // self._users_per_call}", f"{user.user_id}:DEVICE{number}", user

    def participants(self, count: int) -> list[tuple[str, str, str]]:
        """A sample of the participants: LiveKit rooms, identities and delay IDs."""
        numbers = (number * self._count // count for number in range(count))
        return [(*self._participant(number)[:2], f"delay{number}") for number in numbers]

    def costs(self, requests: int) -> dict[str, Cost]:
        """The cost of each operation."""
        # The module polls as soon as Synapse has started.
        first = self._poll()
        self._run(self.tokens.sfu_get(requests))
        costs = {"token": self._run(self.tokens.sfu_get(requests))}
        for event in ("participant_joined", "participant_left"):
            asked = self.participants(requests)
            costs[event] = self._run([webhook(event, room, who, {}) for room, who, _ in asked])
        return {**costs, "poll": first}

    def _poll(self) -> Cost:
        before = self._synapse.main.cpu_seconds()
        seconds = self.wait_for_poll()
        return Cost(seconds, self._synapse.main.cpu_seconds() - before)

    def wait_for_poll(self) -> float:
        """Waits until the first poll is over, and returns how many seconds it took.

        A poll begins with ListRooms and ends with ListParticipants.
        """
        rooms = self._count // self._users_per_call

        def is_over() -> bool:
            return bool(self._sfu.get("/asked").get("ListParticipants", [0])[0] >= rooms)

        wait_until(is_over, "poll", 600)
        asked = self._sfu.get("/asked")
        seconds: float = asked["ListParticipants"][2] - asked["ListRooms"][1]
        return seconds

    def _run(self, requests: list[bytes]) -> Cost:
        process = self._synapse.main
        before = process.cpu_seconds()
        result = asyncio.run(run(port(self._synapse.client_url), requests, 1, 600))
        cpu = process.cpu_seconds() - before
        return Cost(result.quantile(0.5), cpu / len(requests))


def measure(directory: Path, is_quick: bool) -> None:
    """Runs the benchmarks and prints the tables."""
    measure_times(directory / "times")
    measure_messages(directory / "messages", *((1, 100) if is_quick else (9, 400)))
    measure_many(directory / "many", 50 if is_quick else 400)
