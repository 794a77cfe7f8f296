# SPDX-License-Identifier: Apache-2.0
"""Delayed events (MSC4140) of local users, in Synapse's own table.

A change to a delayed event and the record of that change must be committed together. Synapse's
handler cannot do that, so these functions run in the caller's transaction.
"""

from collections.abc import Sequence
from typing import Any

import attr
from synapse.storage._base import db_to_json
from synapse.storage.database import LoggingTransaction
from synapse.types import JsonDict, get_localpart_from_id
from synapse.util.clock import Clock

# The names of the field that makes an event sticky: MSC4354's own, and the one that Synapse reads
# until it adopts MSC4354's.
STICKY_FIELDS = ("sticky", "msc4354_sticky")


@attr.s(auto_attribs=True, frozen=True, slots=True)
class DelayedEvent:
    """A delayed event of a local user.

    Attributes:
        room_id: the room that it will be sent to.
        type: its type.
        state_key: its state key, None for a message event.
        delay_ms: milliseconds between the start, or a restart, and the sending.
        event: the event, as `Events.send` takes it.
    """

    room_id: str
    type: str
    state_key: str | None
    delay_ms: int
    event: JsonDict


def has_delayed_events(config: Any) -> bool:
    """Whether users may schedule delayed events, by Synapse's configuration."""
    server = config.server
    # Synapse 1.140 has `max_event_delay_ms` only.
    if hasattr(server, "msc4140_enabled"):
        return bool(server.msc4140_enabled)
    return bool(getattr(server, "max_event_delay_ms", None))


def max_event_delay_ms(config: Any) -> int | None:
    """The longest delay of a delayed event in milliseconds; None if users may schedule none."""
    server = config.server
    # Synapse 1.140 has `max_event_delay_ms` only.
    duration = getattr(server, "max_event_delay_duration", None)
    if duration is not None:
        return int(duration.as_millis()) or None
    delay_ms: int | None = getattr(server, "max_event_delay_ms", None)
    return delay_ms


class DelayedEvents:
    """Reads and changes delayed events.

    Attributes:
        are_enabled: whether users may schedule delayed events (`max_event_delay_duration`), and the
            module can accept delegations of them.
    """

    def __init__(self, clock: Clock, *, are_enabled: bool) -> None:
        self._clock = clock
        self.are_enabled = are_enabled
        # Whether the table keeps finalised events; None until the table was read.
        self._keeps_finalised: bool | None = None

    def get(self, txn: LoggingTransaction, delay_id: str, user_id: str) -> DelayedEvent | None:
        """A delayed event of a local user, unless Synapse has sent it or is about to send it."""
        txn.execute(
            f"SELECT * FROM delayed_events WHERE {self._is_pending(txn)}",
            (delay_id, get_localpart_from_id(user_id)),
        )
        values = txn.fetchone()
        if values is None:
            return None
        assert txn.description is not None
        # Newer versions of Synapse have more columns.
        row = dict(zip((column[0] for column in txn.description), values, strict=True))
        event = _to_event(row, user_id)
        if event is None:
            return None
        return DelayedEvent(
            row["room_id"], row["event_type"], row["state_key"], row["delay"], event
        )

    def restart(self, txn: LoggingTransaction, delay_id: str, user_id: str) -> bool:
        """Restarts a delayed event; returns whether it still exists.

        Synapse's timer on the main process fires at the old time, finds no event to send, and is
        set to the new time.
        """
        txn.execute(
            f"UPDATE delayed_events SET send_ts = delay + ? WHERE {self._is_pending(txn)}",
            (self._clock.time_msec(), delay_id, get_localpart_from_id(user_id)),
        )
        return txn.rowcount > 0

    def restart_all(self, txn: LoggingTransaction, query: str, args: Sequence[object]) -> int:
        """Restarts the delayed events whose delay IDs a query selects; returns how many."""
        txn.execute(
            f"UPDATE delayed_events SET send_ts = delay + ?"
            f" WHERE delay_id IN ({query}) AND {self._unsent(txn)}",
            (self._clock.time_msec(), *args),
        )
        return txn.rowcount

    def cancel(self, txn: LoggingTransaction, delay_id: str, user_id: str) -> None:
        """Cancels a delayed event as Synapse does, which may keep it as finalised."""
        if not self._has_finalised(txn):
            self.remove(txn, delay_id, user_id)
            return
        txn.execute(
            f"UPDATE delayed_events SET finalised_ts = ? WHERE {self._is_pending(txn)}",
            (self._clock.time_msec(), delay_id, get_localpart_from_id(user_id)),
        )

    def remove(self, txn: LoggingTransaction, delay_id: str, user_id: str) -> bool:
        """Removes a delayed event in order to send it; returns whether it still existed.

        The event is not kept as finalised. Without an event ID it would count as cancelled. If a
        client also sends it, Synapse would answer with a conflict.
        """
        txn.execute(
            f"DELETE FROM delayed_events WHERE {self._is_pending(txn)}",
            (delay_id, get_localpart_from_id(user_id)),
        )
        return txn.rowcount > 0

    def _is_pending(self, txn: LoggingTransaction) -> str:
        """A condition on `delayed_events` with two parameters: the delay ID, the localpart."""
        return f"delay_id = ? AND user_localpart = ? AND {self._unsent(txn)}"

    def _unsent(self, txn: LoggingTransaction) -> str:
        """A condition on `delayed_events`: Synapse has not begun to send the event."""
        condition = "NOT is_processed"
        return f"{condition} AND finalised_ts IS NULL" if self._has_finalised(txn) else condition

    def _has_finalised(self, txn: LoggingTransaction) -> bool:
        """Whether this Synapse keeps delayed events that were sent or cancelled.

        https://github.com/element-hq/synapse/pull/19038 adds the column.
        """
        if self._keeps_finalised is None:
            txn.execute("SELECT * FROM delayed_events LIMIT 0")
            assert txn.description is not None
            self._keeps_finalised = "finalised_ts" in {column[0] for column in txn.description}
        return self._keeps_finalised


def _to_event(row: dict[str, Any], user_id: str) -> JsonDict | None:
    """The event in a row of the table; None if its content cannot be decoded."""
    try:
        content = db_to_json(row["content"])
    except (ValueError, RecursionError):
        # Synapse cannot send it either.
        return None
    event: JsonDict = {
        "type": row["event_type"],
        "room_id": row["room_id"],
        "sender": user_id,
        "content": content,
    }
    if row["state_key"] is not None:
        event["state_key"] = row["state_key"]
    if row["origin_server_ts"] is not None:
        event["origin_server_ts"] = row["origin_server_ts"]
    if row.get("sticky_duration_ms") is not None:
        # Synapse reads one of these fields and ignores the other.
        sticky = {"duration_ms": row["sticky_duration_ms"]}
        event.update(dict.fromkeys(STICKY_FIELDS, sticky))
    return event
