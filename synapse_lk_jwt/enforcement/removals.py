# SPDX-License-Identifier: Apache-2.0
"""Removes users from the calls of a Matrix room after its memberships or its ACL have changed."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping

import attr
from synapse.util.async_helpers import concurrently_execute

from synapse_lk_jwt.auth.room_access import RoomAccess, RoomAccessRule
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.delegation.tables import DelegationTable
from synapse_lk_jwt.enforcement.participants import ParticipantEnforcer, Reason, Removal
from synapse_lk_jwt.enforcement.recheck_list import RecheckList
from synapse_lk_jwt.livekit.errors import SfuError
from synapse_lk_jwt.livekit.naming import device_identity
from synapse_lk_jwt.livekit.participants import CallParticipant, is_shared
from synapse_lk_jwt.livekit.room_cache import RoomCache
from synapse_lk_jwt.livekit.tables import CallTable
from synapse_lk_jwt.work import NotDone, WorkByKey

logger = logging.getLogger(__name__)

# How many calls of one Matrix room are listed at a time. Each answer takes about a millisecond of
# Synapse's main thread, for which everything else waits. A room can have very many calls.
CONCURRENT_CALLS = 3

# How many times in a row a room is listed if it has more participants, or longer identities, than
# one listing can hold.
MAX_LISTINGS = 5

RETRY_MS = 2_000

# A change with this key concerns all users of a room.
ALL_USERS = "*"


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Change:
    """A change in the state of a Matrix room.

    Attributes:
        since_ms: when this process read it, in milliseconds since the epoch.
        position: the position in the stream up to which all changes before it were read.
    """

    since_ms: int
    position: int


class RoomRemovals:
    """Processes the changes of each Matrix room, one room independently of the others."""

    def __init__(
        self,
        homeserver: Homeserver,
        calls: CallTable,
        delegations: DelegationTable,
        rooms: RoomCache,
        access: RoomAccessRule,
        enforcer: ParticipantEnforcer,
        rechecks: RecheckList,
    ) -> None:
        """
        Args:
            homeserver: the members of Matrix rooms and the devices of local users.
            calls: the calls of a Matrix room.
            delegations: the identities that users may have.
            rooms: ends calls.
            access: the rule that decides which users may stay.
            enforcer: checks and removes the participants of one call.
            rechecks: the rooms in which a removed user may join again with an older token.
        """
        self._homeserver = homeserver
        self._calls = calls
        self._delegations = delegations
        self._rooms = rooms
        self._access = access
        self._enforcer = enforcer
        self._rechecks = rechecks
        self._work: WorkByKey[Change] = WorkByKey(
            homeserver, "synapse_lk_jwt_remove", self._process_room, postpone_failures=True
        )

    def start(self) -> None:
        """Starts to retry failed removals, on the process that runs background tasks."""
        self._homeserver.background.repeat(RETRY_MS, "synapse_lk_jwt_retry", self._retry)

    async def _retry(self) -> None:
        self._work.retry()

    def add(self, room_id: str, changed: dict[str, Change]) -> None:
        """Adds changes to process in the background.

        Args:
            room_id: the Matrix room.
            changed: users whose membership changed, or ALL_USERS after a change of the ACL.
        """
        self._work.add(room_id, changed)

    def __contains__(self, room_id: str) -> bool:
        """Whether some changes of a Matrix room are not processed yet."""
        return room_id in self._work

    def unprocessed(self) -> Iterator[Change]:
        """All changes that are not processed yet."""
        return self._work.unfinished()

    async def _process_room(self, room_id: str, changed: Mapping[str, Change]) -> None:
        """Removes users from the calls of a Matrix room.

        Raises:
            NotDone: if a request to LiveKit failed. The work is retried later.
        """
        try:
            await self._process_room_or_fail(room_id, changed)
        except SfuError:
            # The client has logged the failure.
            raise NotDone() from None

    async def _process_room_or_fail(self, room_id: str, changed: Mapping[str, Change]) -> None:
        homeserver = self._homeserver
        livekit_rooms = (await self._calls.in_rooms([room_id])).get(room_id, [])
        if not await homeserver.rooms.is_host_joined(homeserver.server_name, room_id):
            for livekit_room in livekit_rooms:
                await self._end_call(livekit_room, room_id)
            return
        # Most users whose membership changes may stay. They cause no request to LiveKit.
        out = {
            user_id: Reason("left", change.since_ms)
            for user_id, change in changed.items()
            if user_id != ALL_USERS and not (await self._access_of(user_id, room_id)).is_allowed
        }
        acl = changed.get(ALL_USERS)
        if not out and acl is None:
            return
        self._rechecks.add(room_id)
        reason = None if acl is None else Reason("server_acl", acl.since_ms)
        failures: list[SfuError] = []

        async def process(livekit_room: str) -> None:
            try:
                await self._remove_from_call(livekit_room, room_id, reason, out)
            except SfuError as e:
                failures.append(e)

        await concurrently_execute(process, livekit_rooms, CONCURRENT_CALLS)
        if failures:
            raise failures[0]

    async def _access_of(self, user_id: str, room_id: str) -> RoomAccess:
        return await self._access.of_participant(user_id, room_id, has_membership_changed=True)

    async def _end_call(self, livekit_room: str, room_id: str) -> None:
        """Ends a call of a Matrix room that this homeserver has left.

        If participants hold tokens of another homeserver, it uses the call as well. The call
        continues there, without the users of this homeserver.
        """
        homeserver = self._homeserver
        listing = await self._enforcer.list_participants(livekit_room)
        if not is_shared(listing.participants, homeserver.server_name):
            await self._rooms.delete_room(livekit_room)
            await self._calls.forget([livekit_room])
            logger.info("Ended a call of %r, which this homeserver has left", room_id)
            return
        # The tokens of its users still work, because LiveKit's room stays.
        self._rechecks.add(room_id)
        why = "this homeserver has left the room"
        reason = Reason("left", listing.requested_ts)
        removals = [
            Removal(p.identity, p.user_id, why, reason)
            for p in listing.participants
            if p.user_id is not None
            and (
                homeserver.is_mine(p.user_id)
                or (p.owner and p.owner.is_issued_by(homeserver.server_name))
            )
        ]
        await self._enforcer.remove(livekit_room, room_id, removals)

    async def _remove_from_call(
        self,
        livekit_room: str,
        room_id: str,
        reason: Reason | None,
        out: Mapping[str, Reason],
    ) -> None:
        """Removes users from one call of a Matrix room, however large its listing is."""
        for _ in range(MAX_LISTINGS):
            listing = await self._enforcer.list_participants(livekit_room)
            has_removed = await self._enforcer.check_participants(
                livekit_room, room_id, listing, reason, out
            )
            if listing.is_complete:
                return
            if not has_removed:
                break
        await self._remove_unlisted(livekit_room, room_id, out)

    async def _remove_unlisted(
        self, livekit_room: str, room_id: str, out: Mapping[str, Reason]
    ) -> None:
        """Removes users from a call that cannot be listed as a whole.

        This first removes the identities that are known without a listing. If the rest of the call
        still cannot be listed, this ends the call, because it may contain a user who must leave.
        """
        why = "the user may not be in the call any more"
        for user_id, reason in out.items():
            identities = await self._known_identities(livekit_room, user_id)
            removals = [Removal(identity, user_id, why, reason) for identity in identities]
            await self._enforcer.remove(livekit_room, room_id, removals)
        listing = await self._enforcer.list_participants(livekit_room)
        await self._enforcer.remove_too_long(livekit_room, room_id, listing)
        if not listing.is_complete and not listing.too_long:
            await self._end_unlistable_call(livekit_room, room_id, listing.participants)

    async def _known_identities(self, livekit_room: str, user_id: str) -> Collection[str]:
        """The identities in the database that a user may have in a call."""
        known = set(await self._delegations.identities_of_user(livekit_room, user_id))
        for device_id in await self._homeserver.users.device_ids(user_id):
            known.add(device_identity(user_id, device_id))
        return known

    async def _end_unlistable_call(
        self, livekit_room: str, room_id: str, listed: Iterable[CallParticipant]
    ) -> None:
        """Ends a call, unless another homeserver uses it as well."""
        if is_shared(listed, self._homeserver.server_name):
            logger.warning(
                "LiveKit's list of the participants of a call of %r is too long to find the users"
                " who left the room. The call continues because another homeserver uses it as well",
                room_id,
            )
            return
        await self._rooms.delete_room(livekit_room)
        logger.warning(
            "Ended a call of %r: LiveKit's list of its participants is too long to find the users"
            " who left the room",
            room_id,
        )
