# SPDX-License-Identifier: Apache-2.0
"""What others send, decoded and logged."""

import pytest

from synapse_lk_jwt.untrusted import bounded_repr, parse_json

NOT_JSON = {
    "empty": b"",
    "text": b"secret",
    "not UTF-8": b'"\xff"',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "NaN": b"NaN",
    "Infinity": b'{"a": -Infinity}',
    "deeply nested": b"[" * 100_000,
    "two values": b"1 2",
}


def test_parse_json_of_an_object_returns_it() -> None:
    assert parse_json('{"a": [1, null, "\u00e4"]}'.encode()) == {"a": [1, None, "\u00e4"]}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
def test_parse_json_of_anything_else_raises_an_error_without_the_input(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"^not JSON$") as error:
        parse_json(body)
    assert error.value.__suppress_context__


HUGE = {
    "string": "x" * 100_000,
    "list": ["x" * 1000] * 1000,
    "dict": {"a" * 1000: "b" * 1000},
    "nested": [[[[["x" * 1000] * 10] * 10] * 10] * 10] * 10,
    "error": ValueError("x" * 100_000),
}


@pytest.mark.parametrize("value", HUGE.values(), ids=HUGE)
def test_bounded_repr_of_a_huge_value_is_short(value: object) -> None:
    assert len(bounded_repr(value)) <= 300


def test_bounded_repr_of_control_characters_escapes_them() -> None:
    assert bounded_repr("M_\n\x1b[31mFORGED") == r"'M_\n\x1b[31mFORGED'"
    assert bounded_repr("M_FORBIDDEN") == "'M_FORBIDDEN'"
