# SPDX-License-Identifier: Apache-2.0
"""Applies LiveKit's webhooks to delegations and calls.

Webhooks can be lost, repeated or out of order. So after a webhook about a leave the module queries
LiveKit, and the poll finds what no webhook has reported.
"""

from collections.abc import Mapping
from contextlib import suppress

import attr
from livekit.protocol import models
from livekit.protocol.models import DisconnectReason

from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.delegation.service import DelegationService
from synapse_lk_jwt.enforcement.owners import ParticipantOwners
from synapse_lk_jwt.enforcement.participants import ParticipantEnforcer, Reason
from synapse_lk_jwt.livekit.errors import SfuError
from synapse_lk_jwt.livekit.participants import CallParticipant, Listing, matrix_room
from synapse_lk_jwt.livekit.room_cache import RoomCache
from synapse_lk_jwt.livekit.tables import CallTable, TooManySlots
from synapse_lk_jwt.work import WorkByKey

# livekit-protocol has this enum since about 1.1.29.
RoomEndReason = getattr(models, "RoomEndReason", None)

PARTICIPANT_EVENTS = (
    "participant_joined",
    "participant_left",
    "participant_connection_aborted",
)

# After these reasons the participant reconnects. LiveKit ends the old session before the new one
# begins, and a shutdown of LiveKit does not mean that its participants have left the call.
NO_LEAVE = frozenset(
    {
        DisconnectReason.DUPLICATE_IDENTITY,
        DisconnectReason.MIGRATION,
        DisconnectReason.SERVER_SHUTDOWN,
        # LiveKit asks the client to reconnect after a fault in the negotiation.
        DisconnectReason.STATE_MISMATCH,
    }
)

# The same for a room that finished. Older livekit-protocol packages do not know the reasons.
NO_LEAVE_OF_ROOM = frozenset(
    value
    for name, value in (RoomEndReason.items() if RoomEndReason is not None else ())
    if name in ("ROOM_END_SERVER_SHUTDOWN", "ROOM_END_SUPERSEDED")
)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Webhook:
    """A verified webhook of LiveKit.

    Attributes:
        event: its name.
        livekit_room: the LiveKit room.
        participant: the participant. None if the event concerns no participant. Also None if the
            identity is too long, or the webhook is too large to be read as a whole.
        room_end_reason: why the room finished, a `RoomEndReason`; 0 if LiveKit does not say.
    """

    event: str
    livekit_room: str
    participant: CallParticipant | None
    room_end_reason: int = 0


class WebhookHandler:
    """Stores what webhooks report, and acts on it in the background.

    Attributes, all private:
        _joined: participants to check because they have just joined, by LiveKit room, and when.
        _unreadable: LiveKit rooms of webhooks that could not be read as a whole.
        _finished: LiveKit rooms that LiveKit reported as finished.
    """

    def __init__(
        self,
        homeserver: Homeserver,
        calls: CallTable,
        rooms: RoomCache,
        delegations: DelegationService,
        enforcer: ParticipantEnforcer,
        owners: ParticipantOwners,
    ) -> None:
        """
        Args:
            homeserver: runs the work in the background.
            calls: the calls of Matrix rooms.
            rooms: forgets a room that has finished.
            delegations: follows the participants whose leaves are delegated.
            enforcer: checks participants who joined.
            owners: the users of participants who can replace the attributes of their token.
        """
        self._homeserver = homeserver
        self._calls = calls
        self._rooms = rooms
        self._delegations = delegations
        self._enforcer = enforcer
        self._owners = owners
        self._joined: WorkByKey[tuple[CallParticipant, int]] = WorkByKey(
            homeserver, "synapse_lk_jwt_joined", self._check_joined
        )
        self._unreadable: WorkByKey[str] = WorkByKey(
            homeserver, "synapse_lk_jwt_unreadable", self._check_after_unreadable
        )
        self._finished: WorkByKey[str] = WorkByKey(
            homeserver, "synapse_lk_jwt_finished", self._check_after_finished
        )

    async def on_webhook(self, webhook: Webhook) -> None:
        """Notes a webhook before LiveKit gets its answer. LiveKit repeats it if this raises."""
        livekit_room = webhook.livekit_room
        if webhook.event == "room_finished":
            await self._on_room_finished(webhook)
        elif webhook.event not in PARTICIPANT_EVENTS:
            return
        elif webhook.participant is None:
            self._unreadable.add(livekit_room, {livekit_room: webhook.event})
        elif webhook.event == "participant_joined":
            await self._on_joined(livekit_room, webhook.participant)
        elif webhook.participant.can_be_stored:
            await self._on_left(livekit_room, webhook.participant)

    async def _on_room_finished(self, webhook: Webhook) -> None:
        livekit_room = webhook.livekit_room
        self._rooms.forget(livekit_room)
        if webhook.room_end_reason not in NO_LEAVE_OF_ROOM:
            await self._delegations.on_room_finished(livekit_room)
            self._finished.add(livekit_room, {livekit_room: webhook.event})

    async def _on_joined(self, livekit_room: str, participant: CallParticipant) -> None:
        if participant.can_be_stored:
            room_id = matrix_room([participant], self._homeserver.server_name)
            await self._delegations.on_joined(
                livekit_room, participant.identity, participant.sid, room_id
            )
        # The token may be older than the user's leave. A duplicate connection can have any
        # identity, also one that cannot be stored.
        now_ms = self._homeserver.clock.time_msec()
        self._joined.add(livekit_room, {participant.identity: (participant, now_ms)})

    async def _on_left(self, livekit_room: str, participant: CallParticipant) -> None:
        identity, sid = participant.identity, participant.sid
        if participant.disconnect_reason in NO_LEAVE:
            await self._delegations.on_session_replaced(livekit_room, identity, sid)
        else:
            await self._delegations.on_left(livekit_room, identity, sid)

    async def _check_joined(
        self, livekit_room: str, joined: dict[str, tuple[CallParticipant, int]]
    ) -> None:
        """Removes those of the participants who may not be in the call."""
        participants = [participant for participant, _ in joined.values()]
        room_id = matrix_room(participants, self._homeserver.server_name)
        if room_id is None:
            room_id = await self._calls.room_of(livekit_room)
        if room_id is None:
            return
        joined_ms = min(since_ms for _, since_ms in joined.values())
        participants = list(await self._owners.resolve(livekit_room, participants))
        # The client has logged a failure, and the poll checks again.
        with suppress(SfuError):
            await self._enforcer.check_participants(
                livekit_room, room_id, Listing(joined_ms, participants), Reason("joined", joined_ms)
            )

    async def _check_after_unreadable(self, livekit_room: str, _: Mapping[str, str]) -> None:
        """Checks a room after a webhook of which only the room could be read."""
        delegations = await self._delegations.tracked(livekit_room)
        room_id = await self._calls.room_of(livekit_room)
        try:
            # One listing serves all delegations of the room. A participant can cause many such
            # webhooks. A query and two writes for each delegation would amplify their load.
            listing = await self._enforcer.list_participants(livekit_room)
            await self._delegations.suspect_absent(delegations, listing)
            if room_id is not None:
                reason = Reason("joined", listing.requested_ts)
                await self._enforcer.check_participants(livekit_room, room_id, listing, reason)
        except SfuError:
            # The client has logged the failure. The timers of the delegations query again.
            await self._delegations.suspect_room(livekit_room)

    async def _check_after_finished(self, livekit_room: str, _: Mapping[str, str]) -> None:
        """Notes a call again if it has participants: LiveKit reported its end in error.

        Without that, users who leave the Matrix room would not be removed from the call until the
        poll lists it again.
        """
        # The client has logged a failure, or the Matrix room has too many slots. The poll lists the
        # room in both cases.
        with suppress(SfuError, TooManySlots):
            listing = await self._enforcer.list_participants(livekit_room)
            room_id = matrix_room(listing.participants, self._homeserver.server_name)
            if room_id is not None:
                await self._calls.note(livekit_room, room_id)
