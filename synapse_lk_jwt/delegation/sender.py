# SPDX-License-Identifier: Apache-2.0
"""Sends the leaves of delegations, and reports what the room did with each of them."""

import logging
from collections.abc import Awaitable, Callable, Mapping

import attr
from synapse.api.errors import SynapseError
from synapse.util.async_helpers import concurrently_execute

from synapse_lk_jwt import metrics
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.delegation.state_machine import SENDING_MS, Signal, Trigger
from synapse_lk_jwt.delegation.tables import Leave
from synapse_lk_jwt.work import WorkByKey

logger = logging.getLogger(__name__)

# How often the background process reads overdue delegations. It then sends their leaves.
CLOCK_MS = 1_000

# How many leaves of one room are sent at a time. Synapse stores events of a room that wait together
# in one batch. Compared with 10 at a time, 100 leaves took twice the CPU time with 2, and three
# quarters of it with 50. But a user's message in that room waits for all leaves sent before it.
CONCURRENT_SENDS = 10


@attr.s(auto_attribs=True, frozen=True, slots=True, kw_only=True)
class SendLeave:
    """A task: send a leave.

    Attributes:
        delay_id: the delegation.
        livekit_room: the LiveKit room that the participant was in.
        leave: the leave.
        trigger: why it is sent, if that has just been decided; None for another attempt.
    """

    delay_id: str
    livekit_room: str
    leave: Leave
    trigger: Trigger | None


class LeaveSender:
    """Sends leaves, room by room: a room that is slow delays no other one.

    Attributes, all private:
        _sending: the delegations whose leaves this process sends or will send. The values are the
            times until which no other process sends them, in milliseconds since the epoch.
    """

    def __init__(
        self, homeserver: Homeserver, report: Callable[[str, Signal], Awaitable[None]]
    ) -> None:
        """
        Args:
            homeserver: sends the events.
            report: gets the delay ID of each leave, and SENT, REJECTED or SEND_FAILED.
        """
        self._homeserver = homeserver
        self._report = report
        self._sending: dict[str, int] = {}
        self._work: WorkByKey[SendLeave] = WorkByKey(
            homeserver, "synapse_lk_jwt_send", self._send_all
        )

    def add(self, task: SendLeave) -> None:
        """Sends a leave in the background, unless this process is sending it already."""
        # While a room is slow, its leaves become due repeatedly.
        if task.delay_id not in self._sending:
            now_ts = self._homeserver.clock.time_msec()
            self._sending[task.delay_id] = now_ts + SENDING_MS - CLOCK_MS
            self._work.add(task.livekit_room, {task.delay_id: task})

    async def _send_all(self, _: str, tasks: Mapping[str, SendLeave]) -> None:
        try:
            await concurrently_execute(self._send, tasks.values(), CONCURRENT_SENDS)
        finally:
            for delay_id in tasks:
                self._sending.pop(delay_id, None)

    async def _send(self, task: SendLeave) -> None:
        is_late = self._homeserver.clock.time_msec() >= self._sending[task.delay_id]
        if is_late and not self._homeserver.runs_background_tasks:
            # The leave has waited for other leaves of a large call. By now the process that runs
            # background tasks sends it, or will send it next.
            return
        signal = await self._try_to_send(task)
        try:
            await self._report(task.delay_id, signal)
        except self._homeserver.database.error as e:
            # This error must not stop the other leaves of the call. This one becomes due again.
            logger.error(
                "Could not store the result of sending the delayed leave %s: %s. The module will"
                " check the room and try again",
                task.delay_id,
                e,
            )

    async def _try_to_send(self, task: SendLeave) -> Signal:
        try:
            await self._homeserver.events.send(task.leave.event)
        except SynapseError as e:
            if 400 <= e.code < 500 and e.code != 429:
                logger.info("The room rejected the delayed leave %s: %s", task.delay_id, e)
                metrics.leave_failures.labels("refused").inc()
                return Signal.REJECTED
            cause = str(e)
        except (self._homeserver.database.error, OSError) as e:
            cause = f"{type(e).__name__}: {e}"
        except Exception as e:
            # Even a programming error must not lose a leave.
            logger.exception("Could not send the delayed leave %s", task.delay_id)
            cause = type(e).__name__
        else:
            taken_ms = self._homeserver.clock.time_msec() - task.leave.gone_ts
            metrics.leave_seconds.observe(max(0, taken_ms) / 1000)
            return Signal.SENT
        metrics.leave_failures.labels("failed").inc()
        logger.warning(
            "Could not send the delayed leave %s: %s. The module will try again",
            task.delay_id,
            cause,
        )
        return Signal.SEND_FAILED
