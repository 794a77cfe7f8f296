# SPDX-License-Identifier: Apache-2.0
"""Checks the participants of a call, and removes those that must not be in it."""

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Literal

import attr
from synapse.util.async_helpers import concurrently_execute

from synapse_lk_jwt import metrics
from synapse_lk_jwt.auth.room_access import RoomAccess, RoomAccessRule
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.enforcement.owners import ParticipantOwners
from synapse_lk_jwt.enforcement.recheck_list import RecheckList
from synapse_lk_jwt.livekit.client import RoomService
from synapse_lk_jwt.livekit.errors import SfuError
from synapse_lk_jwt.livekit.participants import Listing

logger = logging.getLogger(__name__)

# How many participants of one call are removed at a time.
CONCURRENT_REQUESTS = 10

RemovalCause = Literal["left", "server_acl", "joined", "poll", "recheck", "identity_too_long"]


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Reason:
    """Why participants are checked or removed.

    Attributes:
        cause: the cause, as the metric of removals names it.
        since_ms: when the module learned of it, in milliseconds since the epoch.
    """

    cause: RemovalCause
    since_ms: int


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Removal:
    """A participant that must not be in a call.

    Attributes:
        identity: its whole participant identity.
        who: the user, or a description where the user does not matter, for the log.
        why: the reason in words, for the log.
        reason: the reason.
    """

    identity: str
    who: str
    why: str
    reason: Reason


class ParticipantEnforcer:
    """Removes participants whose users may not be in a call of the Matrix room."""

    def __init__(
        self,
        homeserver: Homeserver,
        rooms: RoomService,
        access: RoomAccessRule,
        owners: ParticipantOwners,
        rechecks: RecheckList,
    ) -> None:
        """
        Args:
            homeserver: the server name and the clock.
            rooms: the SFU.
            access: the rule that decides.
            owners: the users of participants who can replace the attributes of their token.
            rechecks: the rooms in which a removed user may join again with an older token.
        """
        self._homeserver = homeserver
        self._rooms = rooms
        self._access = access
        self._owners = owners
        self._rechecks = rechecks

    async def list_participants(self, livekit_room: str) -> Listing:
        """The participants of a LiveKit room, with their users.

        Raises:
            SfuError: if LiveKit does not list them.
        """
        listing = await self._rooms.list_participants(livekit_room)
        return await self._owners.resolve_listing(livekit_room, listing)

    async def check_participants(
        self,
        livekit_room: str,
        room_id: str,
        listing: Listing,
        reason: Reason | None,
        changed: Mapping[str, Reason] | None = None,
    ) -> bool:
        """Removes those of the participants whose users may not be in the call.

        Args:
            livekit_room: the LiveKit room.
            room_id: the Matrix room.
            listing: the participants, from `list_participants`.
            reason: why all of them are checked. None to check only those of `changed`.
            changed: the users whose membership has changed, each with a reason of its own.

        Returns:
            Whether a participant had to be removed.

        Raises:
            SfuError: if LiveKit did not remove one of them. All others are removed.
        """
        removals = await self._refused(room_id, listing, reason, changed or {})
        if removals:
            # LiveKit has sent each of these participants a token that works after the removal.
            self._rechecks.add(room_id)
        removals += _too_long(listing)
        await self.remove(livekit_room, room_id, removals)
        return bool(removals)

    async def _refused(
        self, room_id: str, listing: Listing, reason: Reason | None, changed: Mapping[str, Reason]
    ) -> list[Removal]:
        """The participants whose users may not be in the call. Each user is checked once."""
        known: dict[tuple[str, bool], RoomAccess] = {}
        refused = []
        for participant in listing.participants:
            user_id = participant.user_id
            why = None if user_id is None else changed.get(user_id, reason)
            if user_id is None or why is None:
                continue
            is_issued_here = participant.is_issued_by(self._homeserver.server_name)
            access = known.get((user_id, is_issued_here))
            if access is None:
                access = known[user_id, is_issued_here] = await self._access.of_participant(
                    user_id,
                    room_id,
                    is_issued_here=is_issued_here,
                    has_membership_changed=user_id in changed,
                )
            if not access.is_allowed:
                refused.append(Removal(participant.identity, user_id, access.value, why))
        return refused

    async def remove_too_long(self, livekit_room: str, room_id: str, listing: Listing) -> None:
        """Removes participants with a longer identity than any client has, of any user.

        Raises:
            SfuError: if LiveKit did not remove one of them.
        """
        await self.remove(livekit_room, room_id, _too_long(listing))

    async def remove(self, livekit_room: str, room_id: str, removals: Collection[Removal]) -> None:
        """Removes participants. If LiveKit fails to remove one, the others are still removed.

        Args:
            livekit_room: the LiveKit room.
            room_id: the Matrix room.
            removals: the participants.

        Raises:
            SfuError: if LiveKit did not remove one of them.
        """
        failures: list[SfuError] = []
        # A participant can have hundreds of duplicate connections, which get one log line.
        removed: Counter[tuple[str, str]] = Counter()

        async def remove(removal: Removal) -> None:
            try:
                was_there = await self._rooms.remove_participant(livekit_room, removal.identity)
            except SfuError as e:
                failures.append(e)
                return
            if was_there:
                removed[removal.who, removal.why] += 1
                taken_ms = self._homeserver.clock.time_msec() - removal.reason.since_ms
                seconds = metrics.removal_seconds.labels(removal.reason.cause)
                seconds.observe(max(0, taken_ms) / 1000)

        await concurrently_execute(remove, removals, CONCURRENT_REQUESTS)
        for (who, why), number in removed.items():
            times = f" ({number} connections)" if number > 1 else ""
            logger.info("Removed %r from a call of %r%s: %s", who, room_id, times, why)
        if failures:
            raise failures[0]


def _too_long(listing: Listing) -> list[Removal]:
    reason = Reason("identity_too_long", listing.requested_ts)
    return [
        Removal(
            identity,
            "a participant of an unknown user",
            "no client has an identity of this length",
            reason,
        )
        for identity in listing.too_long
    ]
