# SPDX-License-Identifier: Apache-2.0
"""Kills Synapse, LiveKit and clients at random, and checks that room and SFU agree at the end."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from testbed.process import MissingTool, ProcessDied, TimedOut
from tests.chaos import verdict
from tests.chaos.play import POLL_SEC, Play

# Until LiveKit has noticed the dead clients, all others have reconnected, and two polls have
# passed.
QUIET_SEC = verdict.GHOST_SEC + 30

# With more native clients, the run would test the machine and not the module.
USERS_PER_CORE = 10


def run(
    directory: Path, seconds: float, seed: int, participants: int, has_workers: bool = False
) -> list[str]:
    """Runs the chaos, prints what happened, and returns the problems that it found.

    Args:
        directory: for files and logs.
        seconds: how long servers and clients are killed.
        seed: decides what happens, as far as the timing of the machine allows.
        participants: how many users there are at a time.
        has_workers: whether Synapse has workers, on PostgreSQL.

    Raises:
        MissingTool
    """
    play = Play(directory, seed, participants, has_workers)
    wrong: list[str] = []
    with play.running():
        play.begin()
        play.disturb(seconds)
        play.webhooks.is_faithful = True
        began = time.monotonic()
        wrong += verdict.wait_for(lambda: verdict.disagreements(play), QUIET_SEC)
        quiet_sec = time.monotonic() - began
        inside = sum(user.wants for user in play.users)
        wrong += verdict.wait_for(lambda: verdict.leftovers(play), 2 * POLL_SEC)
        play.close()
        wrong += verdict.wait_for(lambda: verdict.disagreements(play), QUIET_SEC)
        wrong += verdict.wait_for(lambda: verdict.leftovers(play), 2 * POLL_SEC)
        wrong += verdict.wait_for(lambda: verdict.pending(play), 5)
        wrong += verdict.wait_for(lambda: verdict.forgotten_calls(play), 3 * POLL_SEC)
        wrong += verdict.history(play)
    wrong += verdict.log_problems(play)
    _print(play, inside, quiet_sec)
    return wrong


def _print(play: Play, inside: int, quiet_sec: float) -> None:
    print(f"\n{'done':44}times")
    for what, times in sorted(play.counts.items()):
        print(f"{what:44}{times:5}")
    for what, times in sorted(play.webhooks.counts.items()):
        print(f"{'webhook ' + what:44}{times:5}")
    print(f"\n{'found':44}")
    print(f"{'users in calls at the end':44}{inside:5}")
    print(f"{'seconds until room and SFU agreed':44}{quiet_sec:5.1f}")
    events = [event for seen in play.events.values() for event in seen]
    print(f"{'memberships':44}{sum(event.number is not None for event in events):5}")
    print(f"{'leaves':44}{sum(event.number is None for event in events):5}")
    due = sum(len(outage.due) for outage in play.outages)
    print(f"{'delayed leaves due when Synapse came up':44}{due:5}")
    _print_times(
        "seconds from disconnect to leave",
        [ghost[2] for user in play.users for ghost in verdict.ghosts(play, user)],
    )
    _print_times(
        "seconds from leaving the room to removal",
        [
            max(0.0, min(until for since, until in user.inside if until > at - 1) - at)
            for user in play.users
            for at in user.left_room
            if any(since < at < until for since, until in user.inside)
        ],
    )


def _print_times(what: str, times: Sequence[float]) -> None:
    if times:
        print(
            f"{what:44}{len(times):5}  median {statistics.median(times):.2f}, at most"
            f" {max(times):.1f}"
        )


def main() -> int:
    """Run the command and return its exit status."""
    most = min(50, USERS_PER_CORE * (os.cpu_count() or 1))
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="duration of the outages")
    parser.add_argument("--seed", type=int, default=1, help="decides what happens")
    parser.add_argument(
        "--participants",
        type=int,
        default=most,
        help=f"users at a time, here {most}",
    )
    parser.add_argument("--workers", action="store_true", help="Synapse with workers")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    directory = Path(tempfile.mkdtemp(prefix="synapse-lk-jwt-chaos-"))
    print(
        f"{options.participants} users, {options.seconds:g} s, seed {options.seed},"
        f" {'workers on PostgreSQL' if options.workers else 'one Synapse on SQLite'}",
        flush=True,
    )
    try:
        wrong = run(directory, options.seconds, options.seed, options.participants, options.workers)
    except KeyboardInterrupt:
        print("\nStopped.")
        wrong, status = [], 130
    except MissingTool as e:
        print(f"✘ {e}")
        wrong, status = [], 1
    except (ProcessDied, TimedOut) as e:
        wrong, status = [str(e)], 1
    else:
        status = 1 if wrong else 0
    if wrong:
        print("\n" + "\n".join(f"✘ {what}" for what in wrong))
        print(f"\nThe logs are in {directory}")
        return status
    shutil.rmtree(directory, ignore_errors=True)
    if status == 0:
        print("\nRoom and SFU agree. No leave was lost or sent twice.")
    return status


if __name__ == "__main__":
    sys.exit(main())
