# SPDX-License-Identifier: Apache-2.0
import pytest

from synapse_lk_jwt.poll_schedule import MIN_SWEPT, SWEEP_MS, ListedRoom, PollSchedule

POLL_MS = 30_000
ALICE = "@alice:example.org"


def schedule_of(*names: str) -> PollSchedule:
    """A schedule that has listed rooms, one millisecond after the other from zero."""
    schedule = PollSchedule(POLL_MS)
    for listed_ms, name in enumerate(names):
        room = ListedRoom(listed_ms, 1, frozenset([ALICE]), is_ours=True)
        schedule.note(name, room)
    return schedule


@pytest.mark.parametrize(
    ("name", "participants", "inactive", "is_listed"),
    [
        ("new", 1, (), True),
        ("new", 0, (), False),
        ("known", 1, (), False),
        ("known", 2, (), True),
        ("known", 0, (), True),
        ("known", 1, (ALICE,), True),
        ("known", 1, ("@bob:example.org",), False),
    ],
)
def test_schedule_room_that_may_have_changed_is_listed(
    name: str, participants: int, inactive: tuple[str, ...], is_listed: bool
) -> None:
    changed = schedule_of("known").changed({name: participants}, set(inactive))
    assert changed == ({name} if is_listed else set())


def test_schedule_room_that_was_not_checked_as_a_whole_is_listed_again() -> None:
    schedule = schedule_of("room")
    schedule.forget("room")
    assert schedule.changed({"room": 1}, set()) == {"room"}


def test_schedule_room_that_livekit_does_not_name_is_forgotten() -> None:
    schedule = schedule_of("here", "empty", "gone")
    schedule.keep({"here": 1, "empty": 0})
    assert set(schedule.listed()) == {"here", "empty"}
    assert schedule.users == {ALICE}


@pytest.mark.parametrize(("all_of_them", "number"), [(False, MIN_SWEPT), (True, 50)])
def test_schedule_quiet_rooms_listed_longest_ago_are_first(all_of_them: bool, number: int) -> None:
    names = [f"room {n}" for n in range(50)]
    share = schedule_of(*names).share_of_quiet(set(names), 100, all_of_them=all_of_them)
    assert share == set(names[:number])


def test_schedule_lists_every_quiet_room_within_the_sweep() -> None:
    names = [f"room {n}" for n in range(1_000)]
    share = schedule_of(*names).share_of_quiet(set(names), 2_000, all_of_them=False)
    assert len(share) == 1_000 * POLL_MS // SWEEP_MS


def test_schedule_lists_all_overdue_rooms() -> None:
    names = [f"room {n}" for n in range(50)]
    share = schedule_of(*names).share_of_quiet(set(names), SWEEP_MS, all_of_them=False)
    assert share == set(names)


def test_schedule_lists_no_room_that_is_not_quiet() -> None:
    share = schedule_of("quiet", "busy").share_of_quiet({"quiet"}, 0, all_of_them=True)
    assert share == {"quiet"}


@pytest.mark.parametrize(
    ("name", "is_ours"), [("ours", True), ("theirs", False), ("unknown", True)]
)
def test_schedule_unknown_room_counts_as_own(name: str, is_ours: bool) -> None:
    schedule = schedule_of("ours")
    schedule.note("theirs", ListedRoom(0, 1, frozenset(), is_ours=False))
    assert schedule.is_ours(name) is is_ours
