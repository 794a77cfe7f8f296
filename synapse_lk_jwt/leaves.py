# SPDX-License-Identifier: Apache-2.0
"""Delegated delayed leaves at work: asks the SFU, sends the leaves, and looks at the clock.

What to do when is decided in `delegation.py`, and kept in the database by `store.py`.
"""

import logging
from collections.abc import Collection, Iterable

from livekit.protocol.models import ParticipantInfo
from synapse.api.errors import SynapseError

from synapse_lk_jwt.delegation import Action, Happened
from synapse_lk_jwt.homeserver import Homeserver
from synapse_lk_jwt.sfu.rooms import RoomService, SfuError
from synapse_lk_jwt.store import Store, Taken, Task, Tracked

logger = logging.getLogger(__name__)

CLOCK_MS = 1_000


class DelayedLeaves:
    """Looks after the delayed leaves that clients have handed over."""

    def __init__(self, homeserver: Homeserver, store: Store, rooms: RoomService) -> None:
        self._homeserver = homeserver
        self._store = store
        self._rooms = rooms
        self._under_way: set[tuple[Action, str]] = set()
        if homeserver.has_delayed_events:
            homeserver.repeat(CLOCK_MS, "synapse_lk_jwt_due", self._do_what_is_due)

    async def take_on(
        self,
        user_id: str,
        room_id: str,
        livekit_room: str,
        identities: Collection[str],
        delay_id: str,
    ) -> bool:
        """Takes on a delayed leave. Never depends on the SFU, and may be asked again.

        Args:
            user_id: a local user, verified.
            room_id: the Matrix room.
            livekit_room: the LiveKit room that the user takes part in.
            identities: the participant identities that the user may have there.
            delay_id: the delayed event.

        Returns:
            False if the user has no such delayed event in that room.
        """
        taken, task = await self._store.take_on(
            user_id, room_id, livekit_room, identities, delay_id
        )
        if task is not None:
            self.begin([task])
        return taken is not Taken.NO_SUCH_EVENT

    def begin(self, tasks: Iterable[Task]) -> None:
        """Does what is to be done, without anybody waiting for it."""
        for task in tasks:
            # A slow SFU, or room, is not asked again by the clock meanwhile.
            if (task.action, task.delay_id) not in self._under_way:
                self._homeserver.run_in_background("synapse_lk_jwt_delegation", self._do, task)

    async def polled(
        self, delegations: Iterable[Tracked], participants: Iterable[ParticipantInfo]
    ) -> None:
        """Takes notice of what a poll has found.

        Args:
            delegations: those of one LiveKit room, as they were ahead of the poll.
            participants: who is in that room, as the SFU lists them.
        """
        listed = {p.identity: p for p in participants}
        for delegation in delegations:
            sids = connected(
                [listed[identity] for identity in delegation.identities if identity in listed],
                delegation.identities,
                is_known=delegation.is_connected,
            )
            if not sids:
                if delegation.is_connected:
                    happened = Happened.ABSENT_AT_POLL
                    self.begin(await self._store.happened(delegation.delay_id, happened))
            elif not delegation.is_settled or not (sids.items() <= delegation.identities.items()):
                await self._store.seen(delegation.delay_id, delegation.livekit_room, sids)

    async def _do_what_is_due(self) -> None:
        # All of it: what is left for the next second would be more every second, and too late in
        # the end.
        is_all = False
        while not is_all:
            tasks, is_all = await self._store.due()
            self.begin(tasks)

    async def _do(self, task: Task) -> None:
        mark = (task.action, task.delay_id)
        self._under_way.add(mark)
        try:
            do = self._send if task.action is Action.SEND else self._ask
            happened = await do(task)
        finally:
            self._under_way.discard(mark)
        if happened is not None:
            self.begin(await self._store.happened(task.delay_id, happened))

    async def _ask(self, task: Task) -> Happened | None:
        try:
            participants = await self._rooms.list_participants(task.livekit_room)
        except SfuError:
            # It has been logged, and tells nothing of anybody. The clock asks again.
            return None
        sids = connected(participants, task.identities, is_known=task.is_connected)
        if not sids:
            return Happened.ABSENT
        await self._store.seen(task.delay_id, task.livekit_room, sids)
        return None

    async def _send(self, task: Task) -> Happened | None:
        assert task.leave is not None
        try:
            await self._homeserver.send(task.leave)
        except SynapseError as e:
            if 400 <= e.code < 500 and e.code != 429:
                logger.info("The room does not take the delayed leave %s: %s", task.delay_id, e)
                return Happened.OVER
            cause = str(e)
        except Exception as e:
            cause = f"{type(e).__name__}: {e}"
        else:
            return Happened.OVER
        logger.warning("The delayed leave %s is tried again, it failed: %s", task.delay_id, cause)
        return Happened.NOT_SENT


def connected(
    participants: Iterable[ParticipantInfo], identities: Collection[str], *, is_known: bool
) -> dict[str, str]:
    """Which of the identities are connected, with their sessions.

    Args:
        participants: as the SFU lists them.
        identities: participant identities; `#` twins of them do not count.
        is_known: whether they have been connected before. One who never was is only on its way
            until it is ACTIVE, and may still break off.
    """
    gone = ParticipantInfo.State.DISCONNECTED
    up = ParticipantInfo.State.ACTIVE
    return {
        p.identity: p.sid
        for p in participants
        if p.identity in identities and (p.state != gone if is_known else p.state == up)
    }
