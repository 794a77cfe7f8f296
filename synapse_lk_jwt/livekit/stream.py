# SPDX-License-Identifier: Apache-2.0
"""Reads protobuf answers of LiveKit as a stream, and copies only the fields that are needed.

A participant controls the size of most of its entry in ListParticipants: track names and metadata
can have megabytes. If answers were read as a whole, one participant could prevent the listing of
the others. So the reader skips these fields, and an answer of any size needs little memory.
The encoding: https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Callable, Mapping

# The first field of ListRoomsResponse and ListParticipantsResponse holds the items.
ITEMS_FIELD = 1

# An item up to this size is copied whole, which is faster than copying chosen fields.
SMALL_ITEM_BYTES = 4096

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


class Unreadable(Exception):
    """The bytes are not a protobuf message."""


def _varint(data: bytes | bytearray, start: int) -> tuple[int, int] | None:
    """The number at a position, and its end; None if more bytes are needed."""
    value = shift = 0
    for position in range(start, min(len(data), start + _MAX_VARINT_BYTES)):
        value |= (data[position] & 0x7F) << shift
        if data[position] < 0x80:
            return value, position + 1
        shift += 7
    if len(data) >= start + _MAX_VARINT_BYTES:
        raise Unreadable("a number is too long")
    return None


def _field_header(header: bytes | bytearray) -> tuple[int, int, int] | None:
    """Number and wire type of a field, and how many bytes of it follow; None if more are needed."""
    tag = _varint(header, 0)
    if tag is None:
        return None
    key, end = tag
    number, wire_type = key >> 3, key & 7
    if wire_type in (_FIXED64, _FIXED32):
        return number, wire_type, 8 if wire_type == _FIXED64 else 4
    if wire_type not in (_VARINT, _BYTES):
        raise Unreadable("a field has an unknown wire type")
    value = _varint(header, end)
    if value is None:
        return None
    return number, wire_type, value[0] if wire_type == _BYTES else 0


class FieldReader:
    """Reads one message and copies chosen fields of it."""

    def __init__(self, limits: Mapping[int, int]) -> None:
        """
        Args:
            limits: the numbers of the fields to copy, and the largest size of each in bytes. A
                longer one is skipped like a field that is not listed.
        """
        self._limits = limits
        self._copied = bytearray()
        # A field header of which not all bytes have arrived.
        self._header = bytearray()
        # Bytes of the current field that are still to be copied, or skipped.
        self._left = 0
        self._is_copying = False
        self.too_long: set[int] = set()
        """The numbers of listed fields that were skipped because they exceed their limit."""

    def write(self, data: bytes) -> None:
        """Reads the next bytes.

        Raises:
            Unreadable: if they cannot be part of a message.
        """
        position = 0
        while position < len(data):
            if self._left:
                end = min(len(data), position + self._left)
                if self._is_copying:
                    self._copied += data[position:end]
                self._left -= end - position
                position = end
            else:
                self._header.append(data[position])
                position += 1
                self._begin_field()

    def finish(self) -> bytes:
        """The copied fields as a message.

        Raises:
            Unreadable: if the message is incomplete.
        """
        if self._left or self._header:
            raise Unreadable("the message is incomplete")
        return bytes(self._copied)

    def _begin_field(self) -> None:
        """Starts to copy or skip a field once its header is complete."""
        header = _field_header(self._header)
        if header is None:
            return
        number, _, self._left = header
        limit = self._limits.get(number)
        self._is_copying = limit is not None and self._left <= limit
        if self._is_copying:
            self._copied += self._header
        elif limit is not None:
            self.too_long.add(number)
        self._header.clear()


class ItemsReader:
    """Reads a message whose field `ITEMS_FIELD` is a list of messages, one item after the other."""

    def __init__(
        self, limits: Mapping[int, int], receive: Callable[[bytes, frozenset[int]], None]
    ) -> None:
        """
        Args:
            limits: what to copy of each item, as for `FieldReader`.
            receive: called with each item and with the numbers of its fields that exceed their
                limit. Small items hold all of their fields.
        """
        self._limits = limits
        self._receive = receive
        self._header = bytearray()
        self._item: FieldReader | None = None
        self._left = 0

    def write(self, data: bytes) -> None:
        """Reads the next bytes.

        Raises:
            Unreadable: if they cannot be part of a message.
        """
        position = 0
        while position < len(data):
            if not self._left:
                self._header.append(data[position])
                position += 1
                if not self._begin_field():
                    continue
                available = len(data) - position
                if self._item is not None and self._left <= min(SMALL_ITEM_BYTES, available):
                    end = position + self._left
                    self._receive(data[position:end], frozenset())
                    self._item, self._left, position = None, 0, end
                    continue
            end = min(len(data), position + self._left)
            if self._item is not None:
                self._item.write(data[position:end])
            self._left -= end - position
            position = end
            if not self._left and self._item is not None:
                item, self._item = self._item, None
                self._receive(item.finish(), frozenset(item.too_long))

    def finish(self) -> None:
        """Checks that the answer was complete.

        Raises:
            Unreadable: if it was not.
        """
        if self._left or self._header:
            raise Unreadable("the answer is incomplete")

    def _begin_field(self) -> bool:
        """Starts an item, or the skipping of another field; False if the header is incomplete."""
        header = _field_header(self._header)
        if header is None:
            return False
        number, wire_type, self._left = header
        self._header.clear()
        is_item = (number, wire_type) == (ITEMS_FIELD, _BYTES)
        self._item = FieldReader(self._limits) if is_item else None
        if is_item and not self._left:
            self._receive(b"", frozenset())
            self._item = None
        return True
