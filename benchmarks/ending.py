# SPDX-License-Identifier: Apache-2.0
"""How long leaves take when a large call ends, compared with Synapse's own state events."""

import asyncio
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from benchmarks import calls
from benchmarks.calls import Participant
from benchmarks.leaves import POLL_SEC, webhook
from benchmarks.load import run
from benchmarks.setting import StubSfu, as_json, http_request, module_config, port
from testbed import service
from testbed.member import MEMBER
from testbed.process import stop_all, wait_until
from testbed.synapse import Synapse

PARTICIPANTS = 1000
# Synapse persists the events of a room one by one, so that more connections gain nothing.
CONNECTIONS = 16
GOAL = 1.3


def _state(participants: Sequence[Participant], content: object) -> list[bytes]:
    """The requests with which participants set their memberships."""
    return [
        http_request(
            "PUT",
            f"/_matrix/client/v3/rooms/{quote(p.room_id)}/state/{MEMBER}/{quote(p.key)}",
            as_json(content),
            f"Bearer {p.user.access_token}",
        )
        for p in participants
    ]


def _send(synapse: Synapse, requests: Sequence[bytes]) -> float:
    result = asyncio.run(run(port(synapse.client_url), list(requests), CONNECTIONS, 600))
    return result.seconds


def _end(
    synapse: Synapse, sfu: StubSfu, participants: Sequence[Participant], is_one_webhook: bool
) -> float:
    """Seconds from the first webhook until the last leave was sent."""
    calls.join(sfu, participants)
    # The module deletes a call from its table only after `room_finished`.
    if not synapse.select("SELECT 1 FROM synapse_lk_jwt_calls"):
        calls.note_calls(synapse, participants[:1])
    calls.delegate(synapse, participants)
    if is_one_webhook:
        webhooks = [webhook("room_finished", participants[0].livekit_room, "", {})]
        sfu.put("/gone", {participants[0].livekit_room: {}})
    else:
        webhooks = [
            webhook("participant_left", p.livekit_room, p.identity, p.attributes)
            for p in participants
        ]
        calls.leave(sfu, participants)
    began_ms = int(1000 * time.time())
    _send(synapse, webhooks)

    def all_are_sent() -> bool:
        time.sleep(0.2)
        return calls.leaves_since(synapse, began_ms)[0] >= len(participants)

    def none_is_left() -> bool:
        return synapse.select("SELECT COUNT(*) FROM synapse_lk_jwt_delegations") == [(0,)]

    wait_until(all_are_sent, "all leaves", 600)
    wait_until(none_is_left, "the end of all delegations", 60)
    return (calls.leaves_since(synapse, began_ms)[1] - began_ms) / 1000


def measure(directory: Path, rounds: int, is_quick: bool) -> None:
    """Runs the benchmark and prints the table.

    Args:
        directory: for all files.
        rounds: how often the call ends in each way.
        is_quick: whether a tenth of the participants is enough.
    """
    number = PARTICIPANTS // 10 if is_quick else PARTICIPANTS
    sfu = StubSfu(directory)
    synapse = Synapse("ending", directory, module_config(sfu, POLL_SEC))
    try:
        sfu.start()
        synapse.start()
        synapse.wait_ready()
        users = calls.users(synapse, number)
        room_id = calls.room(users)
        participants = [Participant(user, room_id, service.SLOT, "DEVICE") for user in users]
        print(
            f"\na call of {number:,} participants with delegated leaves ends at once, {rounds}"
            f" rounds, medians (goal: within {GOAL} x)"
        )
        print(f"{'':30}{'leaves, s':>10}{'CPU s':>8}{'Synapse, s':>12}{'CPU s':>8}{'ratio':>8}")
        _send(synapse, _state(participants, {"warms": "up"}))
        for what, is_one_webhook in (("participant_left for each", False), ("room_finished", True)):
            seen = []
            for count in range(rounds):
                used = synapse.main.cpu_seconds()
                itself = _send(synapse, _state(participants, {what: count}))
                cpu_itself = synapse.main.cpu_seconds() - used
                used = synapse.main.cpu_seconds()
                leaves = _end(synapse, sfu, participants, is_one_webhook)
                cpu = synapse.main.cpu_seconds() - used
                seen.append((leaves, cpu, itself, cpu_itself, leaves / itself))
            median = [statistics.median(column) for column in zip(*seen, strict=True)]
            print(
                f"{what:30}{median[0]:10.1f}{median[1]:8.1f}{median[2]:12.1f}{median[3]:8.1f}"
                f"{median[4]:8.2f}  {'met' if median[4] <= GOAL else 'missed'}",
                flush=True,
            )
    finally:
        stop_all([sfu.process, *synapse.processes])
