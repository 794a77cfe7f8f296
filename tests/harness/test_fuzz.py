# SPDX-License-Identifier: Apache-2.0
"""Requests with random changes get an answer of the contract, and log no secret."""

import copy
import json
import logging
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness.base import SECRET, ModuleTestCase

TOKEN = "the-openid-token-of-alice"

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from(
        [2**53, -(2**63), 10**400, 1e308, "", "!", "@", ":", "!a:b", "@a:b", "a" * 600]
    ),
    st.floats(allow_nan=True),
    st.text(max_size=20),
    st.sampled_from(["\0", "!\0", "\ud800", "@a:\udfff", "0:0", "[::1]", "x.org:0", "é.org"]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
FIELDS = {
    "sfu_get": [
        "room", "openid_token", "openid_token/access_token", "openid_token/matrix_server_name",
        "device_id", "delay_id", "delay_timeout",
    ],
    "get_token": [
        "room_id", "slot_id", "openid_token", "openid_token/access_token",
        "openid_token/matrix_server_name", "member", "member/id", "member/claimed_user_id",
        "member/claimed_device_id", "delay_id", "delay_timeout",
    ],
    "homeserver": ["url", "room_id", "slot_id", "member_id", "member", "server_name"],
}  # fmt: skip
ANSWERS: dict[int, set[str | None]] = {
    200: {None},
    400: {"M_BAD_JSON", "M_NOT_JSON", "M_INVALID_PARAM"},
    401: {"M_UNAUTHORIZED"},
    403: {"M_FORBIDDEN"},
    404: {"M_NOT_FOUND"},
    413: {"M_TOO_LARGE"},
}

fuzz = settings(
    max_examples=1500,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)


class FuzzTests(ModuleTestCase):
    def ask(self, kind: str, body: bytes) -> None:
        with self.assertLogs(level=logging.INFO) as logs:
            # assertLogs fails if nothing was logged.
            logging.getLogger().info("request")
            if kind == "homeserver":
                channel = self.post_homeserver(body)
            else:
                channel = self.post("/sfu/get" if kind == "sfu_get" else "/get_token", body)
        assert channel.json_body.get("errcode") in ANSWERS[channel.code], (body, channel.result)
        for record in logs.records:
            assert record.exc_info is None, record.getMessage()
            assert record.levelno < logging.ERROR, record.getMessage()
            for secret in (TOKEN, SECRET):
                assert secret not in record.getMessage()

    def valid(self, kind: str) -> Any:
        token = {"access_token": TOKEN, "matrix_server_name": "test"}
        delay = {"delay_id": "id", "delay_timeout": 1000}
        if kind == "sfu_get":
            return self.sfu_get_body(openid_token=token, **delay)
        if kind == "get_token":
            return self.get_token_body(openid_token=token, **delay)
        return self.homeserver_body()

    def test_endpoints_with_random_fields_answer_as_the_contract_says(self) -> None:
        self.get_success(self.store.insert_open_id_token(TOKEN, 2**52, self.alice))

        @fuzz
        @given(st.data())
        def test(data: st.DataObject) -> None:
            kind = data.draw(st.sampled_from(sorted(FIELDS)))
            body = copy.deepcopy(self.valid(kind))
            for field in data.draw(st.lists(st.sampled_from(FIELDS[kind]), min_size=1, max_size=3)):
                holder = body
                *path, name = field.split("/")
                for part in path:
                    holder = holder.get(part) if isinstance(holder, dict) else None
                if not isinstance(holder, dict):
                    continue
                if data.draw(st.booleans()) or name not in holder:
                    holder[name] = data.draw(ODD)
                else:
                    del holder[name]
            self.ask(kind, json.dumps(body).encode())

        test()

    def test_endpoints_with_random_bytes_answer_as_the_contract_says(self) -> None:
        @fuzz
        @given(st.data())
        def test(data: st.DataObject) -> None:
            kind = data.draw(st.sampled_from(sorted(FIELDS)))
            body = bytearray(json.dumps(self.valid(kind)).encode())
            for _ in range(data.draw(st.integers(1, 3))):
                at = data.draw(st.integers(0, len(body)))
                body[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
            self.ask(kind, bytes(body))

        test()
