# SPDX-License-Identifier: Apache-2.0
"""Participants with delegated leaves, written to the database, as 10,000 requests would be slow."""

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection

import attr

from benchmarks.setting import SECRET, StubSfu, port
from synapse_lk_jwt.livekit.naming import livekit_room_name
from synapse_lk_jwt.livekit.ownership import OwnerSealer, ParticipantOwner
from testbed.http import http
from testbed.matrix import User
from testbed.member import MEMBER, POWER_LEVELS
from testbed.synapse import Synapse

HOUR_MS = 3_600_000
# How often the module restarts a leave with this delay while the participant is connected.
RESTART_MS = 300_000

_SEALER = OwnerSealer(SECRET)


@attr.s(auto_attribs=True, frozen=True)
class Participant:
    """A device of a user in a call, with the claims of its LiveKit token.

    Attributes:
        user: the user.
        room_id: the Matrix room.
        slot_id: the slot of the call in the room.
        device_id: an invented device ID.
    """

    user: User
    room_id: str
    slot_id: str
    device_id: str

    @property
    def livekit_room(self) -> str:
        """The LiveKit room."""
        return livekit_room_name(self.room_id, self.slot_id)

    @property
    def identity(self) -> str:
        """The participant identity."""
        return f"{self.user.user_id}:{self.device_id}"

    @property
    def attributes(self) -> dict[str, str]:
        """The attributes of the token."""
        owner = ParticipantOwner(self.user.user_id, self.room_id, self.slot_id)
        return _SEALER.seal(owner, self.identity)

    @property
    def key(self) -> str:
        """The state key of the membership event."""
        return f"_{self.user.user_id}_{self.device_id}_{self.slot_id}"

    @property
    def delay_id(self) -> str:
        """The delayed event."""
        return f"{self.livekit_room} {self.identity}"


def users(synapse: Synapse, number: int) -> list[User]:
    """Creates users."""
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(synapse.register, (f"user{n}" for n in range(number))))


def room(members: Sequence[User]) -> str:
    """Creates a Matrix room whose members may be in calls."""
    room_id = members[0].create_room(preset="public_chat", power_levels=POWER_LEVELS)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda user: user.join(room_id), members[1:]))
    return room_id


def rooms(members: Sequence[User], number: int) -> list[str]:
    """Creates Matrix rooms with one member each."""
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(lambda n: room([members[n % len(members)]]), range(number)))


def join(sfu: StubSfu, participants: Iterable[Participant]) -> None:
    """Adds participants to the stub's rooms."""
    there: dict[str, dict[str, dict[str, str]]] = {}
    for participant in participants:
        attributes = participant.attributes
        there.setdefault(participant.livekit_room, {})[participant.identity] = attributes
    sfu.put("/rooms", there)


def leave(sfu: StubSfu, participants: Iterable[Participant]) -> None:
    """Removes participants from the stub's rooms."""
    gone: dict[str, dict[str, dict[str, str]]] = {}
    for participant in participants:
        gone.setdefault(participant.livekit_room, {})[participant.identity] = {}
    sfu.put("/gone", gone)


def note_calls(synapse: Synapse, participants: Iterable[Participant]) -> None:
    """Writes the calls of participants to the database, as the first token of a call does."""
    now_ms = int(1000 * time.time())
    calls = {participant.livekit_room: participant.room_id for participant in participants}
    rows = [{"livekit_room": a, "room_id": b, "seen_ts": now_ms} for a, b in calls.items()]
    synapse.insert("synapse_lk_jwt_calls", rows)


def delegate(synapse: Synapse, participants: Sequence[Participant]) -> None:
    """Delegates the leaves of participants who are connected and have been seen."""
    now_ms = int(1000 * time.time())
    tables: Mapping[str, list[dict[str, object]]] = {
        "synapse_lk_jwt_delegations": [],
        "synapse_lk_jwt_identities": [],
        "delayed_events": [],
    }
    delegations, identities, delayed = tables.values()
    for number, p in enumerate(participants):
        # The restarts fall due one after the other, as for real participants.
        restarted_ms = now_ms - number * RESTART_MS // len(participants)
        delegations.append(
            {
                "delay_id": p.delay_id,
                "user_id": p.user.user_id,
                "room_id": p.room_id,
                "livekit_room": p.livekit_room,
                "member_identity": p.identity,
                "event_type": MEMBER,
                "state_key": p.key,
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
                "livekit_room": p.livekit_room,
                "identity": p.identity,
                "delay_id": p.delay_id,
                "sid": f"PA_{p.identity}",
            }
        )
        delayed.append(
            {
                "delay_id": p.delay_id,
                "user_localpart": p.user.user_id[1:].partition(":")[0],
                "delay": HOUR_MS,
                "send_ts": restarted_ms + HOUR_MS,
                "room_id": p.room_id,
                "event_type": MEMBER,
                "state_key": p.key,
                "content": "{}",
                "is_processed": False,
            }
        )
    for table, rows in tables.items():
        synapse.insert(table, rows)


def leaves_since(synapse: Synapse, since_ms: int) -> tuple[int, int]:
    """The number of leaves in the rooms since a time, and when the last one was sent.

    Both times are milliseconds since the epoch.
    """
    # A leave has the content `{}`, which only the JSON of an event contains.
    ((number, last_ms),) = synapse.select(
        "SELECT COUNT(*), MAX(received_ts) FROM events JOIN event_json USING (event_id)"
        " WHERE type = ? AND received_ts >= ? AND json LIKE '%\"content\":{}%'",
        (MEMBER, since_ms),
    )
    return number, last_ms or 0


def metric(synapse: Synapse, name: str, label: str = "") -> float:
    """The sum of a metric of the main process over the series whose labels contain a text."""
    answer = http("GET", f"{synapse.client_url}/_synapse/metrics")
    total = 0.0
    for line in answer.body.decode("utf-8").splitlines():
        if line.startswith((f"{name}{{", f"{name} ")) and label in line:
            total += float(line.rpartition(" ")[2])
    return total


@contextmanager
def sampling(synapse: Synapse, pause_sec: float, path: str = "/health") -> Iterator[list[float]]:
    """Sends trivial requests one after the other, and records how many seconds each answer takes.

    The times show how long the reactor was blocked.
    """
    times: list[float] = []
    is_over = threading.Event()

    def sample() -> None:
        connection = HTTPConnection("127.0.0.1", port(synapse.client_url), timeout=60)
        while not is_over.wait(pause_sec):
            began = time.perf_counter()
            connection.request("GET", path)
            connection.getresponse().read()
            times.append(time.perf_counter() - began)
        connection.close()

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield times
    finally:
        is_over.set()
        thread.join()


def quantile(times: Sequence[float], part: float) -> float:
    """The time that this part of the answers stayed below."""
    return sorted(times)[min(len(times) - 1, int(len(times) * part))]
