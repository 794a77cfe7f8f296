# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st
from livekit.protocol.models import ParticipantInfo, Room, TrackInfo
from livekit.protocol.room import ListParticipantsResponse, ListRoomsResponse

from synapse_lk_jwt.livekit.stream import FieldReader, ItemsReader, Unreadable

LIMITS = {1: 64, 2: 1000, 3: 0, 6: 0, 15: 4096}


def chunks(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def read(data: bytes, size: int = 65536) -> list[tuple[ParticipantInfo, frozenset[int]]]:
    items: list[tuple[ParticipantInfo, frozenset[int]]] = []
    reader = ItemsReader(
        LIMITS, lambda item, too_long: items.append((ParticipantInfo.FromString(item), too_long))
    )
    for chunk in chunks(data, size):
        reader.write(chunk)
    reader.finish()
    return items


def large_participant(identity: str) -> ParticipantInfo:
    return ParticipantInfo(
        sid="PA_1",
        identity=identity,
        state=ParticipantInfo.State.ACTIVE,
        tracks=[TrackInfo(sid="TR_1", name="n" * 6_000)] * 3,
        metadata="m" * 50_000,
        joined_at=1_700_000_000,
        attributes={"synapse_lk_jwt": "sealed"},
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000, 10**9])
def test_items_reader_large_participants_in_chunks_keeps_only_listed_fields(size: int) -> None:
    present = [large_participant("@a:hs:1"), large_participant("@b:hs:2")]
    data = ListParticipantsResponse(participants=present).SerializeToString()
    items = read(data, size)
    assert [item.identity for item, _ in items] == ["@a:hs:1", "@b:hs:2"]
    for item, too_long in items:
        assert too_long == frozenset()
        assert dict(item.attributes) == {"synapse_lk_jwt": "sealed"}
        assert (item.sid, item.joined_at) == ("PA_1", 1_700_000_000)
        assert item.state == ParticipantInfo.State.ACTIVE
        assert not item.tracks
        assert not item.metadata


def test_items_reader_identity_above_the_limit_is_reported_and_not_copied() -> None:
    present = [large_participant("x" * 5_000)]
    ((item, too_long),) = read(ListParticipantsResponse(participants=present).SerializeToString())
    assert too_long == {2}
    assert item.identity == ""
    assert item.sid == "PA_1"


def test_items_reader_small_items_are_copied_whole() -> None:
    rooms = [Room(name=f"room {n}", num_participants=n) for n in range(100)]
    data = ListRoomsResponse(rooms=rooms).SerializeToString()
    items: list[Room] = []
    reader = ItemsReader({}, lambda item, _: items.append(Room.FromString(item)))
    reader.write(data)
    reader.finish()
    assert items == rooms


def test_items_reader_empty_items_are_items() -> None:
    assert len(read(ListParticipantsResponse(participants=[ParticipantInfo()]).SerializeToString()))


@pytest.mark.parametrize("cut", [1, 2, 100])
def test_items_reader_answer_that_is_cut_off_is_unreadable(cut: int) -> None:
    data = ListParticipantsResponse(participants=[large_participant("a")]).SerializeToString()
    with pytest.raises(Unreadable):
        read(data[:-cut])


@pytest.mark.parametrize("data", [b"<html>", b"\xff" * 20, b"\x0b"])
def test_items_reader_other_bytes_are_unreadable(data: bytes) -> None:
    with pytest.raises(Unreadable):
        read(data)


@given(st.binary(max_size=300), st.integers(1, 50))
def test_items_reader_any_bytes_are_read_or_unreadable(data: bytes, size: int) -> None:
    reader = ItemsReader(LIMITS, lambda item, too_long: None)
    try:
        for chunk in chunks(data, size):
            reader.write(chunk)
        reader.finish()
    except Unreadable:
        pass


def test_field_reader_one_message_keeps_only_listed_fields() -> None:
    reader = FieldReader(LIMITS)
    for chunk in chunks(large_participant("@a:hs:1").SerializeToString(), 100):
        reader.write(chunk)
    found = ParticipantInfo.FromString(reader.finish())
    assert found.identity == "@a:hs:1"
    assert not found.tracks
