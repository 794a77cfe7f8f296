# SPDX-License-Identifier: Apache-2.0
"""How endpoints read request bodies.

A body is an attrs class, which is the table of its fields. Each attribute has the name of the field
and the check of its value. `read_body` reads a request into such a class.

Synapse's own body parsers log a malformed body. Our bodies hold bearer tokens, so this module has
checks of its own, and an error message quotes nothing but the name of a field.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attr
from synapse.api.errors import Codes, SynapseError
from synapse.http.site import SynapseRequest
from synapse.types import JsonDict

from synapse_lk_jwt.identifiers import is_clean, is_room_id, is_server_name, is_user_id
from synapse_lk_jwt.untrusted import parse_json

T = TypeVar("T")

MAX_BODY_BYTES = 64 * 1024
MAX_STRING_BYTES = 512
MAX_URL_BYTES = 2048
# The largest integer that every JSON implementation keeps exact.
MAX_INTEGER = 2**53 - 1

# Returns the value of a field, given the field's whole name, or raises `bad_json`.
Check = Callable[[str, Any], T]
# Returns the value of an attribute, given the object, the path of the object in the body, and the
# name of the attribute.
_Read = Callable[[Mapping[str, Any], str, str], T]


def bad_json(field: str, problem: str) -> SynapseError:
    """The error for a body with an invalid field."""
    return SynapseError(400, f"{field}: {problem}", Codes.BAD_JSON)


# Reading


def read_body(request: SynapseRequest, kind: type[T]) -> T:
    """Reads the body of a request, which must be a JSON object.

    Args:
        request: the request.
        kind: the attrs class of the body.

    Raises:
        SynapseError: 413 `M_TOO_LARGE`, 400 `M_NOT_JSON`, or 400 `M_BAD_JSON`, which names the
            field.
    """
    assert request.content is not None
    body: bytes = request.content.read(MAX_BODY_BYTES + 1)
    if len(body) > MAX_BODY_BYTES:
        raise SynapseError(413, f"Body is larger than {MAX_BODY_BYTES} bytes", Codes.TOO_LARGE)
    try:
        content = parse_json(body)
    except ValueError:
        raise SynapseError(400, "Body is not JSON", Codes.NOT_JSON) from None
    if not isinstance(content, dict):
        raise bad_json("body", "must be a JSON object")
    return from_json(kind, content)


def from_json(kind: type[T], content: JsonDict, path: str = "") -> T:
    """Checks the fields of an object. Fields that the class does not have are ignored.

    Args:
        kind: the attrs class of the object.
        content: the object.
        path: the prefix of its fields' names in messages.

    Raises:
        SynapseError: 400 `M_BAD_JSON`, which names the first field that is wrong.
    """
    return kind(
        **{
            attribute.name: attribute.metadata["read"](content, path, attribute.name)
            for attribute in attr.fields(kind)  # type: ignore[arg-type]
        }
    )


# Declaring


def required(check: Check[T], *, is_secret: bool = False) -> T:
    """An attribute whose field must be present."""

    def read(content: Mapping[str, Any], path: str, name: str) -> T:
        if name not in content:
            raise bad_json(f"{path}{name}", "is missing")
        return check(f"{path}{name}", content[name])

    return _attribute(read, is_secret)


def optional(check: Check[T], zero: str | int = "") -> T | None:
    """An attribute whose field may be absent; it is None then.

    Args:
        check: the check of a field that is present.
        zero: the zero value of the field's type. It counts as absent, as `null` does, because
            clients in typed languages send it.
    """

    def read(content: Mapping[str, Any], path: str, name: str) -> T | None:
        value = content.get(name)
        is_zero = type(value) is type(zero) and value == zero
        return None if value is None or is_zero else check(f"{path}{name}", value)

    return _attribute(read)


def member_id() -> str:
    """The attribute `member_id` of MSC4195's bodies, the ID of the MatrixRTC member.

    Clients and lk-jwt-service 0.7 send it as `"member": {"id": …}`, the form that the MSC had
    before its acceptance.
    """

    def read(content: Mapping[str, Any], path: str, name: str) -> str:
        if content.get(name) in (None, "") and content.get("member") not in (None, ""):
            return nested(_Member)(f"{path}member", content["member"]).id
        if name not in content:
            raise bad_json(f"{path}{name}", "is missing")
        return string(f"{path}{name}", content[name])

    return _attribute(read)


def _attribute(read: _Read[T], is_secret: bool = False) -> T:
    attribute: T = attr.ib(metadata={"read": read}, repr=not is_secret)
    return attribute


# Checks


def nested(kind: type[T]) -> Check[T]:
    """The check of a JSON object.

    Args:
        kind: the attrs class of the object.
    """

    def check(name: str, value: Any) -> T:
        if not isinstance(value, dict):
            raise bad_json(name, "must be an object")
        return from_json(kind, value, f"{name}.")

    return check


def string(name: str, value: Any, max_bytes: int = MAX_STRING_BYTES) -> str:
    """A string that is not empty, not too long, and that PostgreSQL can store."""
    if not isinstance(value, str):
        raise bad_json(name, "must be a string")
    if not value:
        raise bad_json(name, "must not be empty")
    if not is_clean(value):
        raise bad_json(name, "must not contain NUL or lone surrogates")
    if len(value.encode("utf-8")) > max_bytes:
        raise bad_json(name, f"must not be longer than {max_bytes} bytes")
    return value


def url(name: str, value: Any) -> str:
    """A URL, which may be longer than other strings. Its form is not checked."""
    return string(name, value, MAX_URL_BYTES)


def room_id(name: str, value: Any) -> str:
    """A Matrix room ID."""
    return _matching(is_room_id, "a room ID", name, value)


def user_id(name: str, value: Any) -> str:
    """A Matrix user ID."""
    return _matching(is_user_id, "a user ID", name, value)


def server_name(name: str, value: Any) -> str:
    """A Matrix server name."""
    return _matching(is_server_name, "a server name", name, value)


def positive_integer(name: str, value: Any) -> int:
    """An integer from 1 to 2^53 - 1."""
    if type(value) is not int or not 1 <= value <= MAX_INTEGER:
        raise bad_json(name, "must be an integer from 1 to 2^53 - 1")
    return value


def _matching(is_valid: Callable[[str], bool], what: str, name: str, value: Any) -> str:
    if not is_valid(string(name, value)):
        raise bad_json(name, f"must be {what}")
    return str(value)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class _Member:
    """The `member` of MSC4195's bodies before its acceptance."""

    id: str = required(string)
