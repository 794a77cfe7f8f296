# SPDX-License-Identifier: Apache-2.0
"""Which request bodies the endpoints accept, field by field."""

import json
from typing import Any

import attr
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synapse.api.errors import SynapseError

from synapse_lk_jwt.api import client_server, federation
from synapse_lk_jwt.api.fields import from_json
from synapse_lk_jwt.api.service import DelegateDelayedLeaveBody, GetTokenBody, SfuGetBody

BODIES: dict[type[Any], dict[str, Any]] = {
    SfuGetBody: {
        "room": "!room:example.org",
        "openid_token": {"access_token": "token", "matrix_server_name": "example.org"},
        "device_id": "DEVICE",
        "delay_id": "id",
        "delay_timeout": 1,
    },
    GetTokenBody: {
        "room_id": "!room:example.org",
        "slot_id": "m.call#ROOM",
        "openid_token": {"access_token": "token", "matrix_server_name": "example.org"},
        "member": {
            "id": "member",
            "claimed_user_id": "@alice:example.org",
            "claimed_device_id": "DEVICE",
        },
        "delay_id": "id",
        "delay_timeout": 1,
    },
    client_server.GetTokenBody: {
        "url": "wss://sfu.example.org",
        "room_id": "!room:example.org",
        "slot_id": "m.call#ROOM",
        "member_id": "member",
        "server_name": "example.org",
    },
    client_server.DelegateDelayedLeaveBody: {
        "url": "wss://sfu.example.org",
        "room_id": "!room:example.org",
        "slot_id": "m.call#ROOM",
        "member_id": "member",
        "delay_id": "id",
    },
    federation.GetTokenBody: {
        "user_id": "@alice:example.org",
        "url": "wss://sfu.example.org",
        "room_id": "!room:example.org",
        "slot_id": "m.call#ROOM",
        "member_id": "member",
    },
}
BODIES[DelegateDelayedLeaveBody] = BODIES[GetTokenBody]

LONG = "x" * 513
MISSING = object()
STRING = [MISSING, None, 1, "", "\0", "\udfff", LONG]
OPTIONAL_STRING = [1, "\0", "\udfff", LONG]
ROOM_ID = [MISSING, None, 1, "", "room", "!", "!\0", "!\ud800", f"!{LONG}"]
USER_ID = [MISSING, None, 1, "", "alice", "@alice", "@a:b_c"]
SERVER_NAME = [1, "a_b", "a b", "a:b", "a:-1", "a: 1", "a:99999", "[", "a/b", "é.org"]
OBJECT = [MISSING, None, 1, [], "x"]
URL = [1, "x" * 2049, "\0"]
TIMEOUT = ["1", -1, 1.5, True, 2**53]
OPENID_TOKEN = {
    "openid_token": [*OBJECT, ""],
    "openid_token.access_token": STRING,
    "openid_token.matrix_server_name": [MISSING, None, "", *SERVER_NAME],
}
MSC4195 = {"room_id": ROOM_ID, "slot_id": STRING, "member_id": STRING}
MEMBER = {
    "room_id": ROOM_ID,
    "slot_id": STRING,
    "member": OBJECT,
    "member.id": STRING,
    "member.claimed_user_id": USER_ID,
    "member.claimed_device_id": STRING,
}
WRONG: dict[type[Any], dict[str, list[Any]]] = {
    SfuGetBody: {
        **OPENID_TOKEN,
        "room": ROOM_ID,
        "device_id": [*OPTIONAL_STRING, "8448:X", "1:"],
        "delay_id": STRING,
        "delay_timeout": [MISSING, None, 0, *TIMEOUT],
    },
    GetTokenBody: {**OPENID_TOKEN, **MEMBER, "delay_id": STRING},
    DelegateDelayedLeaveBody: {
        **OPENID_TOKEN,
        **MEMBER,
        "delay_id": STRING,
        "delay_timeout": [MISSING, None, 0, *TIMEOUT],
    },
    client_server.GetTokenBody: {
        **MSC4195,
        "url": [MISSING, None, "", *URL],
        "server_name": SERVER_NAME,
    },
    client_server.DelegateDelayedLeaveBody: {**MSC4195, "url": URL, "delay_id": STRING},
    federation.GetTokenBody: {
        **MSC4195,
        "user_id": USER_ID,
        "url": [MISSING, None, "", *URL],
    },
}


def with_field(body: dict[str, Any], name: str, value: object) -> dict[str, Any]:
    """A copy of a body in which one field has another value."""
    body = json.loads(json.dumps(body))
    holder = body
    *path, last = name.split(".")
    for part in path:
        holder = holder[part]
    if value is MISSING:
        del holder[last]
    else:
        holder[last] = value
    return body


@pytest.mark.parametrize("kind", BODIES)
def test_body_with_all_fields_is_accepted(kind: type[Any]) -> None:
    body = attr.asdict(from_json(kind, {**BODIES[kind], "unknown": {}}))
    assert body == BODIES[kind]


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (kind, name, value)
        for kind, fields in WRONG.items()
        for name, values in fields.items()
        for value in values
    ],
)
def test_body_with_wrong_field_is_rejected_with_its_name(
    kind: type[Any], name: str, value: object
) -> None:
    with pytest.raises(SynapseError) as e:
        from_json(kind, with_field(BODIES[kind], name, value))
    assert (e.value.code, e.value.errcode) == (400, "M_BAD_JSON")
    assert e.value.msg.startswith(f"{name}: ")


@pytest.mark.parametrize("kind", BODIES)
def test_body_repr_holds_no_openid_token(kind: type[Any]) -> None:
    body = BODIES[kind]
    if "openid_token" in body:
        body = with_field(body, "openid_token.access_token", "secret")
    assert "secret" not in repr(from_json(kind, body))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from(["!a:b", "@a:b", "0:", "\0", "!\0", "\ud800", "@a:\udfff", "x" * 600]),
    lambda values: st.lists(values, max_size=2) | st.dictionaries(st.text(), values, max_size=2),
    max_leaves=5,
)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(list(BODIES)),
    st.dictionaries(
        st.sampled_from(sorted({name for body in BODIES.values() for name in body})), JSON
    ),
)
def test_body_with_any_values_is_accepted_or_rejected_as_bad_json(
    kind: type[Any], changes: dict[str, Any]
) -> None:
    try:
        from_json(kind, {**BODIES[kind], **changes})
    except SynapseError as e:
        assert (e.code, e.errcode) == (400, "M_BAD_JSON")  # noqa: PT017
