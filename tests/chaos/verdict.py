# SPDX-License-Identifier: Apache-2.0
"""What must be true during a run, and after the last outage."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

from testbed.http import WrongAnswer
from tests.chaos.play import FIRST_TICK_SEC, POLL_SEC, Play, clock
from tests.chaos.simulated_user import Membership, SimulatedUser

# LiveKit needs this long to notice a dead client (21 s were measured). The homeserver then needs
# two polls, each of which is ten seconds late at worst.
NOTICED_SEC = 30.0
GHOST_SEC = NOTICED_SEC + 2 * POLL_SEC + 10.0

# The module may not have noticed a connection that is shorter than this.
MOMENT_SEC = 3.0

# A leave that is being sent cannot be stopped, and sending takes a moment on a busy machine.
ON_ITS_WAY_SEC = 2.0

# How long Synapse takes to send the leaves that fell due while it was down.
SENDING_SEC = 5.0

# The module keeps calls that the SFU does not list for this long, as `synapse_lk_jwt/monitor.py`
# says.
FORGET_CALLS_MS = 600_000


def wait_for(find: Callable[[], list[str]], timeout: float) -> list[str]:
    """Waits until there are no more problems, and returns those that remain after the timeout."""
    deadline = time.monotonic() + timeout
    while (found := find()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def disagreements(play: Play) -> list[str]:
    """Users for whom the room and the SFU disagree."""
    return list(_disagreements(play))


def _disagreements(play: Play) -> Iterator[str]:
    inside = {
        livekit_room: {
            participant["identity"]
            for participant in play.livekit.participants(livekit_room)
            if participant["state"] != "DISCONNECTED"
        }
        for livekit_room in {user.livekit_room for user in play.users}
        if livekit_room
    }
    for user in play.users:
        is_inside = user.identity in inside.get(user.livekit_room, ())
        number = play.current(user)
        if user.wants:
            if not is_inside:
                yield f"{user.name} is not connected, but tries to be"
            if number is None:
                yield f"{user.name} is connected, but has no membership"
            continue
        if is_inside:
            yield f"{user.name} is connected, but must not be"
        if number is None or number <= user.last_in_room or not user.is_in_room:
            continue
        membership = user.memberships.get(number)
        if membership is None or not _waits_for_its_delay(play, user, membership):
            yield f"{user.name} has membership {number}, but is not connected"


def _waits_for_its_delay(play: Play, user: SimulatedUser, membership: Membership) -> bool:
    """Whether only the delay can end this membership, and it has not passed.

    That is so if the client died before the homeserver could see it connected.
    """
    last_started = max(membership.scheduled, membership.delegated or 0)
    is_over = time.time() > last_started + membership.delay_ms / 1000 + SENDING_SEC
    return not _was_seen(play, user, membership) and not is_over


def _was_seen(play: Play, user: SimulatedUser, membership: Membership) -> bool:
    """Whether a connection lasted so long that the homeserver must have seen it in a poll."""
    delegated = membership.delegated
    return delegated is not None and any(
        until - max(since, delegated) - _down_sec(play, max(since, delegated), until)
        > POLL_SEC + MOMENT_SEC
        for since, until in user.inside
    )


def _down_sec(play: Play, since: float, until: float) -> float:
    return sum(
        max(0.0, min(outage.until, until) - max(outage.since, since)) for outage in play.outages
    )


def leftovers(play: Play) -> list[str]:
    """Rows of the module's tables that belong to no membership any more."""
    return list(_leftovers(play))


def _leftovers(play: Play) -> Iterator[str]:
    alive = set()
    for user in play.users:
        number = play.current(user)
        membership = user.memberships.get(number or 0)
        if membership is not None and (user.wants or _waits_for_its_delay(play, user, membership)):
            alive.add(membership.delay_id)
    for delay_id, user_id, phase in play.rows(
        "SELECT delay_id, user_id, phase FROM synapse_lk_jwt_delegations"
    ):
        if delay_id not in alive:
            yield f"the delegation {delay_id} of {user_id} is {phase}, but its membership has ended"
    for (delay_id,) in play.rows(
        "SELECT DISTINCT delay_id FROM synapse_lk_jwt_identities WHERE delay_id NOT IN"
        " (SELECT delay_id FROM synapse_lk_jwt_delegations)"
    ):
        yield f"identities of {delay_id}, which has no delegation"


def forgotten_calls(play: Play) -> list[str]:
    """Calls that the module keeps although LiveKit does not list them.

    Makes such calls look older first, so that the module deletes them at its next poll.
    """
    there = {room["name"] for room in play.livekit.rooms()}
    gone = {name for (name,) in play.rows("SELECT livekit_room FROM synapse_lk_jwt_calls")} - there
    for name in gone:
        play.rows(
            f"UPDATE synapse_lk_jwt_calls SET seen_ts = {1000 * time.time() - FORGET_CALLS_MS:.0f}"
            f" WHERE livekit_room = '{name}' AND seen_ts > 0"
        )
    return [f"the call {name} has ended, but is still in the table" for name in gone]


def history(play: Play) -> list[str]:
    """Problems during the run, which may be over by now."""
    found = [*play.trouble]
    sent, sent_at_start = _sent_by_synapse(play)
    for user in play.users:
        if user.trouble is not None:
            found.append(f"{user.name} failed: {user.trouble}")
        found += _wrong_leaves(play, user, sent, sent_at_start)
        found += _ghosts(play, user)
        found += [
            f"{user.name} was removed at {clock(at)} without a reason"
            for at in user.removed
            if any(since < at - 0.5 and at + 0.5 < until for since, until in user.wanted)
        ]
    return found


def _wrong_leaves(
    play: Play, user: SimulatedUser, sent: set[str], sent_at_start: set[str]
) -> Iterator[str]:
    seen = play.events.get((user.room_id, user.key), [])
    for before, event in pairwise(seen):
        if event.number is not None:
            continue
        if before.number is None:
            # Synapse may send a leave twice that fell due while it was down, or that a client sends
            # at the time that it falls due. Synapse also accepts one leave from the client and one
            # from the module while neither is in the room state.
            both = {before.event_id, event.event_id}
            if not (both <= sent or both & sent_at_start) and not any(
                since - 0.5 <= max(before.at, event.at) <= until for since, until in user.leaving
            ):
                yield f"{user.name} has two leaves in a row: {before.event_id}, {event.event_id}"
            continue
        membership = user.memberships.get(before.number)
        if (
            membership is not None
            and membership.delegated is not None
            # Before the delegation, the client had to restart the leave.
            and membership.delegated + ON_ITS_WAY_SEC < event.at
            and user.stayed(membership.delegated, event.at)
            and user.was_inside(event.at - MOMENT_SEC, event.at)
            and event.event_id not in sent_at_start
        ):
            yield (
                f"{user.name} was connected, and membership {before.number} (delay"
                f" {membership.delay_ms} ms) was ended at {clock(event.at)}: {event.event_id}"
            )


def _sent_by_synapse(play: Play) -> tuple[set[str], set[str]]:
    """Leaves that Synapse sent without the module, when they fell due or a client sent them.

    Returns:
        The IDs of all such events, and of those that fell due while a process was down.
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


def ghosts(play: Play, user: SimulatedUser) -> Iterator[tuple[float, Membership, float]]:
    """When a user disconnected, the membership that remained, and for how many seconds."""
    seen = play.events.get((user.room_id, user.key), [])
    for before, event in pairwise(seen):
        membership = user.memberships.get(before.number or 0)
        if event.number is not None or membership is None or membership.number <= user.last_in_room:
            continue
        gone = max((until for _, until in user.wanted if until <= event.at), default=None)
        if gone is not None and gone > before.at:
            yield gone, membership, event.at - gone


def _ghosts(play: Play, user: SimulatedUser) -> Iterator[str]:
    for gone, membership, seconds in ghosts(play, user):
        bound_sec = GHOST_SEC
        if not _was_seen(play, user, membership):
            bound_sec = max(GHOST_SEC, membership.delay_ms / 1000 + SENDING_SEC)
        if seconds > bound_sec + _down_sec(play, gone, gone + seconds):
            yield (
                f"{user.name} disconnected at {clock(gone)}, but membership {membership.number}"
                f" (delay {membership.delay_ms} ms) stayed for {seconds:.1f} s"
            )


def log_problems(play: Play) -> list[str]:
    """Unexpected tracebacks and errors in Synapse's logs."""
    found = []
    unusable = 0
    for process in play.synapse.processes:
        for record in re.split(r"\n(?=\d{4}-\d\d-\d\d )", process.log_text()):
            if not re.search(r"^[^\n]* - (ERROR|CRITICAL) - |Traceback", record):
                continue
            if "cannot be used, so calls cannot be started" in record:
                # LiveKit itself answers 503 when it is overloaded.
                unusable += "it answers 503" not in record
            elif not (
                # Synapse logs an error for the delayed event of a user who left the room, and for
                # one that it sends twice at its start.
                " - synapse.handlers.delayed_events - " in record
                and ("not in room" in record or "No row found (delayed_events)" in record)
            ):
                found.append(f"in {process.log}: {record[:200]} … {record[-300:]}")
    # Each process logs two lines: that a connection broke, and that LiveKit rejects new ones.
    outages = sum(outage.what in ("livekit", "both") for outage in play.outages)
    allowed = 2 * outages * len(play.synapse.processes)
    if unusable > allowed:
        found.append(f"{unusable} lines of LiveKit that cannot be used, for {outages} outages")
    return found


def pending(play: Play) -> list[str]:
    """Delayed leaves that Synapse still has of users who disconnected and were seen in a poll."""
    found = []
    for user in play.users:
        if not user.is_in_room or user.wants:
            continue
        try:
            pending = user.account.delayed()
        except WrongAnswer:
            continue
        ids = {event["delay_id"] for event in pending}
        found += [
            f"{user.name} disconnected, but the delayed leave still exists"
            for membership in user.memberships.values()
            if membership.delay_id in ids and not _waits_for_its_delay(play, user, membership)
        ]
    return found
