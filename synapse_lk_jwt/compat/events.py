# SPDX-License-Identifier: Apache-2.0
"""Sending events of local users, and finding events that were sent."""

from typing import Any, Protocol

from synapse.module_api import ModuleApi, Requester
from synapse.storage._base import db_to_json
from synapse.storage.database import LoggingTransaction
from synapse.types import JsonDict, create_requester

from synapse_lk_jwt.delegation.state_machine import ENCRYPTED_TYPE, MEMBERSHIP_TYPES, sticky_key

# How many of a sender's newest events are compared with one that may have been sent already. A user
# within Synapse's default rate limit sends 70 between two attempts.
MAX_COMPARED_EVENTS = 100


class EventStore(Protocol):
    """The parts of Synapse's store that this file uses."""

    async def is_guest(self, user_id: str) -> bool: ...


class EventCreationHandler(Protocol):
    """The parts of Synapse's handler that this file uses."""

    async def create_and_send_nonmember_event(
        self, requester: Requester, event_dict: dict[str, Any]
    ) -> object: ...


class EventHomeServer(Protocol):
    """The parts of Synapse's `HomeServer` that this file uses."""

    def get_event_creation_handler(self) -> EventCreationHandler: ...


class Events:
    """Sends and finds events."""

    def __init__(self, api: ModuleApi, hs: EventHomeServer, store: EventStore) -> None:
        self._api = api
        self._hs = hs
        self._store = store

    async def send(self, event: JsonDict) -> None:
        """Sends an event of a local user, from any process.

        A leave is sent without a rate limit, and also for a user who was deactivated. An encrypted
        event can have any content, so it is sent as Synapse sends a delayed event of the user.

        Raises:
            synapse.api.errors.SynapseError: if the room rejects it, or the user may not send it, or
                not now.
        """
        if event["type"] != ENCRYPTED_TYPE:
            await self._api.create_and_send_event_into_room(event)
            return
        user_id = event["sender"]
        requester = create_requester(user_id, is_guest=await self._store.is_guest(user_id))
        handler = self._hs.get_event_creation_handler()
        await handler.create_and_send_nonmember_event(requester, event)

    def newest_position(self, txn: LoggingTransaction) -> int:
        """The stream position of the newest event."""
        txn.execute("SELECT COALESCE(MAX(stream_ordering), 0) FROM events")
        (position,) = txn.fetchone() or (0,)
        return int(position)

    def has_sent(self, txn: LoggingTransaction, event: JsonDict, since: int) -> bool:
        """Whether an event, or a newer one that replaces it, was sent to its room.

        A state event is recognised by its type and state key, and a sticky membership by its type
        and sticky key. Any other event is recognised by its type and content.

        Args:
            txn: the transaction.
            event: as `send` takes it.
            since: the stream position after which to search.
        """
        which = (
            "stream_ordering > ? AND events.room_id = ? AND sender = ? AND type = ?"
            " AND rejection_reason IS NULL"
        )
        args = (since, event["room_id"], event["sender"], event["type"])
        if "state_key" in event:
            txn.execute(
                f"SELECT 1 FROM events WHERE {which} AND state_key = ? LIMIT 1",
                (*args, event["state_key"]),
            )
            return txn.fetchone() is not None
        txn.execute(
            f"SELECT json FROM events JOIN event_json USING (event_id) WHERE {which}"
            " AND state_key IS NULL ORDER BY stream_ordering DESC LIMIT ?",
            (*args, MAX_COMPARED_EVENTS),
        )
        content = event["content"]
        key = sticky_key(content) if event["type"] in MEMBERSHIP_TYPES else None
        sent = (db_to_json(row[0])["content"] for row in txn.fetchall())
        return any(other == content if key is None else sticky_key(other) == key for other in sent)
