# SPDX-License-Identifier: Apache-2.0
"""Matrix rooms: their members and servers, and what the admin or the room forbids."""

from collections.abc import Collection
from typing import Protocol

from synapse.api.constants import EventTypes
from synapse.util.stringutils import parse_server_name

from synapse_lk_jwt.compat.database import Database
from synapse_lk_jwt.compat.self_test import Feature


class RoomStore(Protocol):
    """The parts of Synapse's store that this file uses."""

    async def is_room_blocked(self, room_id: str) -> bool | None: ...

    async def get_rooms_for_user(self, user_id: str) -> Collection[str]: ...

    async def is_host_joined(self, room_id: str, host: str) -> bool: ...

    async def get_current_hosts_in_room(self, room_id: str) -> Collection[str]: ...

    async def is_partial_state_room(self, room_id: str) -> bool: ...


class ServerAcl(Protocol):
    """The parts of Synapse's parsed `m.room.server_acl` that this file uses."""

    def server_matches_acl_event(self, server_name: str) -> bool: ...


class StateController(Protocol):
    """The parts of Synapse's controller of room state that this file uses."""

    async def get_server_acl_for_room(self, room_id: str) -> ServerAcl | None: ...


class StorageControllers(Protocol):
    """The parts of Synapse's storage controllers that this file uses."""

    @property
    def state(self) -> StateController: ...


class RoomHomeServer(Protocol):
    """The parts of Synapse's `HomeServer` that this file uses."""

    def get_storage_controllers(self) -> StorageControllers: ...


class Rooms:
    """The rooms that this homeserver is in."""

    def __init__(
        self, hs: RoomHomeServer, store: RoomStore, database: Database, off: Collection[Feature]
    ) -> None:
        self._hs = hs
        self._store = store
        self._database = database
        self._off = off

    async def is_joined(self, user_id: str, room_id: str) -> bool:
        """Whether a user, of any server, is joined to a room that this homeserver is in. Cached."""
        return room_id in await self._store.get_rooms_for_user(user_id)

    async def membership(self, user_id: str, room_id: str) -> str | None:
        """A user's membership of a room that this homeserver is in; one database read."""
        membership = await self._database.pool.simple_select_one_onecol(
            table="current_state_events",
            keyvalues={"room_id": room_id, "type": EventTypes.Member, "state_key": user_id},
            retcol="membership",
            allow_none=True,
            desc="synapse_lk_jwt_membership",
        )
        return None if membership is None else str(membership)

    async def is_host_joined(self, server_name: str, room_id: str) -> bool:
        """Whether a user of that server is joined to a room that this homeserver is in. Cached."""
        return bool(await self._store.is_host_joined(room_id, server_name))

    async def host_in_room(self, server_name: str, room_id: str) -> str | None:
        """A server that takes part in a room, as the room spells its name; None if it does not.

        Synapse's `is_host_joined` raises on SQLite if the room has the name with other capitals.
        """
        hosts = await self._store.get_current_hosts_in_room(room_id)
        if server_name in hosts:
            return server_name
        return next((host for host in hosts if host.lower() == server_name.lower()), None)

    async def has_partial_state(self, room_id: str) -> bool:
        """Whether this homeserver has just joined the room and does not know all members yet."""
        return Feature.PARTIAL_STATE not in self._off and bool(
            await self._store.is_partial_state_room(room_id)
        )

    async def acl_allows(self, server_name: str, room_id: str) -> bool:
        """Whether the room's `m.room.server_acl` allows the server. Cached."""
        if Feature.SERVER_ACLS in self._off:
            return True
        state = self._hs.get_storage_controllers().state
        acl = await state.get_server_acl_for_room(room_id)
        # ACLs match host names, which have no port.
        host, _ = parse_server_name(server_name)
        return acl is None or acl.server_matches_acl_event(host)

    async def is_blocked(self, room_id: str) -> bool:
        """Whether the admin has blocked a room, or shut it down and blocked it. Cached."""
        return Feature.BLOCKED_ROOMS not in self._off and bool(
            await self._store.is_room_blocked(room_id)
        )

    async def select_blocked(self, room_ids: Collection[str]) -> set[str]:
        """The subset of many rooms that the admin has blocked; a database read."""
        return await self._database.select_matching(
            "SELECT room_id FROM blocked_rooms WHERE", "room_id", room_ids
        )
