# SPDX-License-Identifier: Apache-2.0
"""What must be true of a play: while it went on, and when all is quiet."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

from testbed.http import WrongAnswer
from tests.chaos.person import Membership, Person
from tests.chaos.play import FIRST_TICK_SEC, POLL_SEC, Play, clock

# LiveKit takes so long to notice that a client is dead (21 s were seen), and the homeserver two
# polls, each of them ten seconds late at worst, to notice that LiveKit has.
NOTICED_SEC = 30.0
GHOST_SEC = NOTICED_SEC + 2 * POLL_SEC + 10.0

# A connection of less than this may not have been noticed, or not yet.
MOMENT_SEC = 3.0

# A leave that is on its way is not called back, and takes its time on a busy machine.
ON_ITS_WAY_SEC = 2.0

# Synapse sends what fell due while it was down, and it takes it a moment.
SENDING_SEC = 5.0

# Also in `synapse_lk_jwt/monitor.py`: calls that the SFU does not know are kept for so long.
FORGET_CALLS_MS = 600_000


def wait_for(find: Callable[[], list[str]], timeout: float) -> list[str]:
    """Waits until there is nothing to find; returns what is there all the same."""
    deadline = time.monotonic() + timeout
    while (found := find()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def disagreements(play: Play) -> list[str]:
    """Where the room and the SFU do not say the same."""
    return list(_disagreements(play))


def _disagreements(play: Play) -> Iterator[str]:
    inside = {
        livekit_room: {
            participant["identity"]
            for participant in play.livekit.participants(livekit_room)
            if participant["state"] != "DISCONNECTED"
        }
        for livekit_room in {person.livekit_room for person in play.people}
        if livekit_room
    }
    for person in play.people:
        is_inside = person.identity in inside.get(person.livekit_room, ())
        number = play.current(person)
        if person.wants:
            if not is_inside:
                yield f"{person.name} is not connected, and tries to be"
            if number is None:
                yield f"{person.name} is connected, and has no membership"
            continue
        if is_inside:
            yield f"{person.name} is connected, and must not be"
        if number is None or number <= person.void or not person.is_in_room:
            continue
        membership = person.memberships.get(number)
        if membership is None or not _waits_for_its_delay(play, person, membership):
            yield f"{person.name} has membership {number}, and is not connected"


def _waits_for_its_delay(play: Play, person: Person, membership: Membership) -> bool:
    """Whether nobody could know that a client had gone but by its own delay, which is not over."""
    last_started = max(membership.scheduled, membership.taken or 0)
    is_over = time.time() > last_started + membership.delay_ms / 1000 + SENDING_SEC
    return not _was_seen(play, person, membership) and not is_over


def _was_seen(play: Play, person: Person, membership: Membership) -> bool:
    """Whether they were connected for so long that the homeserver must know, webhook or not."""
    taken = membership.taken
    return taken is not None and any(
        until - max(since, taken) - _down_sec(play, max(since, taken), until)
        > POLL_SEC + MOMENT_SEC
        for since, until in person.inside
    )


def _down_sec(play: Play, since: float, until: float) -> float:
    return sum(
        max(0.0, min(outage.until, until) - max(outage.since, since)) for outage in play.outages
    )


def leftovers(play: Play) -> list[str]:
    """Rows of the module's tables for what is over."""
    return list(_leftovers(play))


def _leftovers(play: Play) -> Iterator[str]:
    alive = set()
    for person in play.people:
        number = play.current(person)
        membership = person.memberships.get(number or 0)
        if membership is not None and (
            person.wants or _waits_for_its_delay(play, person, membership)
        ):
            alive.add(membership.delay_id)
    for delay_id, user_id, phase in play.rows(
        "SELECT delay_id, user_id, phase FROM synapse_lk_jwt_delegations"
    ):
        if delay_id not in alive:
            yield f"the delegation {delay_id} of {user_id} is {phase}, and it is over"
    for (delay_id,) in play.rows(
        "SELECT DISTINCT delay_id FROM synapse_lk_jwt_identities WHERE delay_id NOT IN"
        " (SELECT delay_id FROM synapse_lk_jwt_delegations)"
    ):
        yield f"identities of {delay_id}, which is no delegation"


def forgotten_calls(play: Play) -> list[str]:
    """Calls that are kept although LiveKit does not know them; ages those that would be later."""
    there = {room["name"] for room in play.livekit.rooms()}
    gone = {name for (name,) in play.rows("SELECT livekit_room FROM synapse_lk_jwt_calls")} - there
    for name in gone:
        play.rows(
            f"UPDATE synapse_lk_jwt_calls SET seen_ms = {1000 * time.time() - FORGET_CALLS_MS:.0f}"
            f" WHERE livekit_room = '{name}' AND seen_ms > 0"
        )
    return [f"the call {name} is over, and is kept" for name in gone]


def history(play: Play) -> list[str]:
    """What went wrong on the way, and may have been made good since."""
    found = [*play.trouble]
    sent, sent_at_start = _sent_by_synapse(play)
    for person in play.people:
        if person.trouble is not None:
            found.append(f"{person.name} was in trouble: {person.trouble}")
        found += _wrong_leaves(play, person, sent, sent_at_start)
        found += _ghosts(play, person)
        found += [
            f"{person.name} was removed at {clock(at)}, and was no reason to"
            for at in person.removed
            if any(since < at - 0.5 and at + 0.5 < until for since, until in person.wanted)
        ]
    return found


def _wrong_leaves(
    play: Play, person: Person, sent: set[str], sent_at_start: set[str]
) -> Iterator[str]:
    seen = play.events.get((person.room_id, person.key), [])
    for before, event in pairwise(seen):
        if event.number is not None:
            continue
        if before.number is None:
            # Synapse may send what fell due while it was down twice, or what is due and what the
            # client has it send; and it takes what client and module send while the other one is
            # not in the room yet.
            both = {before.event_id, event.event_id}
            if not (both <= sent or both & sent_at_start) and not any(
                since - 0.5 <= max(before.at, event.at) <= until for since, until in person.leaving
            ):
                yield f"{person.name} has two leaves in a row: {before.event_id}, {event.event_id}"
            continue
        membership = person.memberships.get(before.number)
        if (
            membership is not None
            and membership.taken is not None
            # Before, it was for the client to keep it from being sent; or it was an older one.
            and membership.taken + ON_ITS_WAY_SEC < event.at
            and person.stayed(membership.taken, event.at)
            and person.was_inside(event.at - MOMENT_SEC, event.at)
            and event.event_id not in sent_at_start
        ):
            yield (
                f"{person.name} was connected, and membership {before.number} (delay"
                f" {membership.delay_ms} ms) was ended at {clock(event.at)}: {event.event_id}"
            )


def _sent_by_synapse(play: Play) -> tuple[set[str], set[str]]:
    """Leaves that Synapse sent itself, when they fell due or a client said so.

    Returns:
        All of them, and those that fell due while it was down, or not all up.
    """
    due = {delay_id for outage in play.outages for delay_id in outage.due}
    sent, sent_at_start = set(), set()
    for event_id, at_ms, metadata in play.rows(
        "SELECT event_id, origin_server_ts, internal_metadata"
        " FROM events JOIN event_json USING (event_id)"
    ):
        delay_id = json.loads(metadata).get("delay_id")
        if delay_id is None:
            continue
        sent.add(event_id)
        if delay_id in due or any(
            outage.what != "livekit"
            and outage.since <= at_ms / 1000 <= outage.until + FIRST_TICK_SEC
            for outage in play.outages
        ):
            sent_at_start.add(event_id)
    return sent, sent_at_start


def ghosts(play: Play, person: Person) -> Iterator[tuple[float, Membership, float]]:
    """When somebody was gone, the membership that they left behind, and seconds that it stayed."""
    seen = play.events.get((person.room_id, person.key), [])
    for before, event in pairwise(seen):
        membership = person.memberships.get(before.number or 0)
        if event.number is not None or membership is None or membership.number <= person.void:
            continue
        gone = max((until for _, until in person.wanted if until <= event.at), default=None)
        if gone is not None and gone > before.at:
            yield gone, membership, event.at - gone


def _ghosts(play: Play, person: Person) -> Iterator[str]:
    for gone, membership, seconds in ghosts(play, person):
        bound_sec = GHOST_SEC
        if not _was_seen(play, person, membership):
            bound_sec = max(GHOST_SEC, membership.delay_ms / 1000 + SENDING_SEC)
        if seconds > bound_sec + _down_sec(play, gone, gone + seconds):
            yield (
                f"{person.name} was gone at {clock(gone)}, and membership {membership.number}"
                f" (delay {membership.delay_ms} ms) stayed for {seconds:.1f} s"
            )


def log_problems(play: Play) -> list[str]:
    """Tracebacks and errors in Synapse's logs."""
    found = []
    unusable = 0
    for process in play.synapse.processes:
        for record in re.split(r"\n(?=\d{4}-\d\d-\d\d )", process.log_text()):
            if not re.search(r"^[^\n]* - (ERROR|CRITICAL) - |Traceback", record):
                continue
            if "cannot be used, calls cannot be started" in record:
                # When it has too much to do LiveKit answers 503 itself.
                unusable += "it answers 503" not in record
            elif not (
                # Synapse's own delayed events: one of somebody who has left the room, and one that
                # Synapse sends twice at its start.
                " - synapse.handlers.delayed_events - " in record
                and ("not in room" in record or "No row found (delayed_events)" in record)
            ):
                found.append(f"in {process.log}: {record[:200]} … {record[-300:]}")
    # Each process finds out by itself: first that a connection breaks, then that there is none.
    outages = sum(outage.what in ("livekit", "both") for outage in play.outages)
    allowed = 2 * outages * len(play.synapse.processes)
    if unusable > allowed:
        found.append(f"{unusable} lines of LiveKit that cannot be used, for {outages} outages")
    return found


def pending(play: Play) -> list[str]:
    """Delayed leaves that Synapse still has, of those who have hung up and been seen."""
    found = []
    for person in play.people:
        if not person.is_in_room or person.wants:
            continue
        try:
            pending = person.user.delayed()
        except WrongAnswer:
            continue
        for event in pending:
            for membership in person.memberships.values():
                if event["delay_id"] == membership.delay_id and not _waits_for_its_delay(
                    play, person, membership
                ):
                    found.append(f"{person.name} has gone, and their delayed leave is still there")
    return found
