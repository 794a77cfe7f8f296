# SPDX-License-Identifier: Apache-2.0
"""Request bodies: read, checked field by field, and turned into attrs classes.

Synapse's own body parsers write a malformed body into the log, and ours hold bearer tokens: so the
checks are done here, and no message quotes anything but the name of a field.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attr
from synapse.api.errors import Codes, SynapseError
from synapse.http.site import SynapseRequest

from synapse_lk_jwt.auth.openid import OpenIdToken
from synapse_lk_jwt.identifiers import is_clean, is_room_id, is_server_name, is_user_id
from synapse_lk_jwt.livekit.naming import DEFAULT_SLOT
from synapse_lk_jwt.untrusted import parse_json

T = TypeVar("T")

MAX_BODY_BYTES = 64 * 1024
MAX_STRING_BYTES = 512
MAX_URL_BYTES = 2048
# The largest integer that every JSON implementation keeps exact.
MAX_INTEGER = 2**53 - 1


def bad_json(field: str, problem: str) -> SynapseError:
    """The error for a body with something wrong in a field."""
    return SynapseError(400, f"{field}: {problem}", Codes.BAD_JSON)


def read_body(request: SynapseRequest, max_bytes: int = MAX_BODY_BYTES) -> bytes:
    """The body of a request.

    Raises:
        SynapseError: 413 `M_TOO_LARGE`.
    """
    assert request.content is not None
    body: bytes = request.content.read(max_bytes + 1)
    if len(body) > max_bytes:
        raise SynapseError(413, f"Body is larger than {max_bytes} bytes", Codes.TOO_LARGE)
    return body


def is_body_empty(request: SynapseRequest) -> bool:
    """Whether a request has no body."""
    assert request.content is not None
    is_empty = not request.content.read(1)
    request.content.seek(0)
    return is_empty


def read_json_object(request: SynapseRequest) -> "Fields":
    """The body of a request, which must be a JSON object.

    Raises:
        SynapseError: 413 `M_TOO_LARGE`, 400 `M_NOT_JSON` or 400 `M_BAD_JSON`.
    """
    body = read_body(request)
    try:
        content = parse_json(body)
    except ValueError:
        raise SynapseError(400, "Body is not JSON", Codes.NOT_JSON) from None
    if not isinstance(content, dict):
        raise bad_json("body", "must be a JSON object")
    return Fields(content)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Fields:
    """A JSON object whose fields are asked for by name and kind.

    Every method raises the error for a bad body, naming the field, unless the value is as it says.
    """

    _values: Mapping[str, Any] = attr.ib(repr=False)
    _path: str = ""

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def name_of(self, name: str) -> str:
        """The whole name of a field, for messages."""
        return f"{self._path}{name}"

    def object(self, name: str) -> "Fields":
        """A JSON object."""
        value = self._value(name)
        if not isinstance(value, dict):
            raise bad_json(self.name_of(name), "must be an object")
        return Fields(value, f"{self.name_of(name)}.")

    def string(self, name: str, max_bytes: int = MAX_STRING_BYTES) -> str:
        """A string that is not empty, too long, or impossible to store."""
        value = self._value(name)
        if not isinstance(value, str):
            raise bad_json(self.name_of(name), "must be a string")
        if not value:
            raise bad_json(self.name_of(name), "must not be empty")
        if not is_clean(value):
            raise bad_json(self.name_of(name), "must not contain NUL or lone surrogates")
        if len(value.encode("utf-8")) > max_bytes:
            raise bad_json(self.name_of(name), f"must not be longer than {max_bytes} bytes")
        return value

    def optional(self, name: str, check: Callable[[str], T], zero: str | int = "") -> T | None:
        """What another method gives for a field; None if the field is absent.

        `null` and the zero value of the field's type count as absent: typed clients send these.
        """
        value = self._values.get(name)
        is_zero = type(value) is type(zero) and value == zero
        return None if value is None or is_zero else check(name)

    def positive_integer(self, name: str) -> int:
        """An integer from 1 to 2^53 - 1."""
        value = self._value(name)
        if type(value) is not int or not 1 <= value <= MAX_INTEGER:
            raise bad_json(self.name_of(name), "must be an integer from 1 to 2^53 - 1")
        return value

    def room_id(self, name: str) -> str:
        """A Matrix room ID."""
        value = self.string(name)
        if not is_room_id(value):
            raise bad_json(self.name_of(name), "must be a room ID")
        return value

    def user_id(self, name: str) -> str:
        """A Matrix user ID."""
        value = self.string(name)
        if not is_user_id(value):
            raise bad_json(self.name_of(name), "must be a user ID")
        return value

    def url(self, name: str) -> str:
        """A URL, which may be longer than other strings. Its form is not checked."""
        return self.string(name, MAX_URL_BYTES)

    def server_name(self, name: str) -> str:
        """A Matrix server name."""
        value = self.string(name)
        if not is_server_name(value):
            raise bad_json(self.name_of(name), "must be a server name")
        return value

    def _value(self, name: str) -> Any:
        if name not in self._values:
            raise bad_json(self.name_of(name), "is missing")
        return self._values[name]


def _openid_token(fields: Fields) -> OpenIdToken:
    token = fields.object("openid_token")
    return OpenIdToken(token.string("access_token"), token.server_name("matrix_server_name"))


def _delay_id(fields: Fields, *, mandatory: bool = False) -> str | None:
    """The delayed event (MSC4140) that a client wants to hand over, if any."""
    if not mandatory:
        delay_id = fields.optional("delay_id", fields.string)
        delay_timeout = fields.optional("delay_timeout", fields.positive_integer, zero=0)
        if delay_id is None and delay_timeout is None:
            return None
    # One without the other is an error that names the other.
    delay_id = fields.string("delay_id")
    fields.positive_integer("delay_timeout")
    return delay_id


@attr.s(auto_attribs=True, frozen=True, slots=True)
class SfuGetRequest:
    """The body of `/sfu/get`.

    Attributes:
        room_id: the Matrix room.
        slot_id: the slot; this endpoint has one only.
        openid_token: says who asks.
        device_id: the device, empty for clients that do not name it.
        delay_id: the delayed event to take over, if any.
    """

    room_id: str
    slot_id: str
    openid_token: OpenIdToken
    device_id: str
    delay_id: str | None

    @classmethod
    def from_json(cls, fields: Fields) -> "SfuGetRequest":
        """Checks the fields of a body.

        Raises:
            SynapseError: 400 `M_BAD_JSON`, naming the first field that is wrong.
        """
        device_id = fields.optional("device_id", fields.string) or ""
        if re.match(r"[0-9]+:", device_id):
            # '@a:host' with device '8448:X' would be the same participant as '@a:host:8448' with X.
            raise bad_json("device_id", "must not begin with digits and a colon")
        return cls(
            room_id=fields.room_id("room"),
            slot_id=DEFAULT_SLOT,
            openid_token=_openid_token(fields),
            device_id=device_id,
            delay_id=_delay_id(fields),
        )


@attr.s(auto_attribs=True, frozen=True, slots=True)
class GetTokenRequest:
    """The body of the service's `/get_token` and `/delegate_delayed_leave`.

    Attributes:
        room_id: the Matrix room.
        slot_id: the slot in it.
        openid_token: says who asks.
        member_id: the MatrixRTC member's ID.
        claimed_user_id: who the client says it is.
        claimed_device_id: the device that the client says it is.
        delay_id: the delayed event to take over, if any.
    """

    room_id: str
    slot_id: str
    openid_token: OpenIdToken
    member_id: str
    claimed_user_id: str
    claimed_device_id: str
    delay_id: str | None

    @classmethod
    def from_json(cls, fields: Fields, *, must_delegate: bool = False) -> "GetTokenRequest":
        """Checks the fields of a body.

        Args:
            fields: the body.
            must_delegate: whether there must be a delayed event to take over.

        Raises:
            SynapseError: 400 `M_BAD_JSON`, naming the first field that is wrong.
        """
        member = fields.object("member")
        return cls(
            room_id=fields.room_id("room_id"),
            slot_id=fields.string("slot_id"),
            openid_token=_openid_token(fields),
            member_id=member.string("id"),
            claimed_user_id=member.user_id("claimed_user_id"),
            claimed_device_id=member.string("claimed_device_id"),
            delay_id=_delay_id(fields, mandatory=must_delegate),
        )


def _member_id(fields: Fields) -> str:
    """The MatrixRTC member's ID, as the homeserver endpoints take it."""
    member_id = fields.optional("member_id", fields.string)
    if member_id is not None:
        return member_id
    # Clients and lk-jwt-service 0.7 send the form that the MSC had before it was accepted.
    member = fields.optional("member", fields.object)
    return fields.string("member_id") if member is None else member.string("id")


@attr.s(auto_attribs=True, frozen=True, slots=True)
class HomeserverGetTokenRequest:
    """The body of MSC4195's client-server `get_token`.

    Attributes:
        url: the SFU.
        room_id: the Matrix room.
        slot_id: the slot in it.
        member_id: the MatrixRTC member's ID.
        server_name: the homeserver whose SFU it is; None for this one.
    """

    url: str
    room_id: str
    slot_id: str
    member_id: str
    server_name: str | None

    @classmethod
    def from_json(cls, fields: Fields) -> "HomeserverGetTokenRequest":
        """Checks the fields of a body.

        Raises:
            SynapseError: 400 `M_BAD_JSON`, naming the first field that is wrong.
        """
        return cls(
            url=fields.url("url"),
            room_id=fields.room_id("room_id"),
            slot_id=fields.string("slot_id"),
            member_id=_member_id(fields),
            server_name=fields.optional("server_name", fields.server_name),
        )


@attr.s(auto_attribs=True, frozen=True, slots=True)
class HomeserverDelegateRequest:
    """The body of MSC4195's client-server `delegate_delayed_leave`.

    Attributes:
        url: the SFU; None for the only one of this homeserver.
        room_id: the Matrix room.
        slot_id: the slot in it.
        member_id: the MatrixRTC member's ID.
        delay_id: the delayed event to take over.
    """

    url: str | None
    room_id: str
    slot_id: str
    member_id: str
    delay_id: str

    @classmethod
    def from_json(cls, fields: Fields) -> "HomeserverDelegateRequest":
        """Checks the fields of a body.

        Raises:
            SynapseError: 400 `M_BAD_JSON`, naming the first field that is wrong.
        """
        return cls(
            url=fields.optional("url", fields.url),
            room_id=fields.room_id("room_id"),
            slot_id=fields.string("slot_id"),
            member_id=_member_id(fields),
            delay_id=fields.string("delay_id"),
        )


@attr.s(auto_attribs=True, frozen=True, slots=True)
class FederationGetTokenRequest:
    """The body of MSC4195's server-server `get_token`.

    Attributes:
        user_id: the user that the token is for.
        url: the SFU.
        room_id: the Matrix room.
        slot_id: the slot in it.
        member_id: the MatrixRTC member's ID.
    """

    user_id: str
    url: str
    room_id: str
    slot_id: str
    member_id: str

    @classmethod
    def from_json(cls, fields: Fields) -> "FederationGetTokenRequest":
        """Checks the fields of a body.

        Raises:
            SynapseError: 400 `M_BAD_JSON`, naming the first field that is wrong.
        """
        return cls(
            user_id=fields.user_id("user_id"),
            url=fields.url("url"),
            room_id=fields.room_id("room_id"),
            slot_id=fields.string("slot_id"),
            member_id=_member_id(fields),
        )
