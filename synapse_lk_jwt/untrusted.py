# SPDX-License-Identifier: Apache-2.0
"""Decodes, and prepares for the log, what other servers, clients and participants send.

This file uses neither Twisted nor HTTP, because the core imports it.
"""

import json
from reprlib import Repr
from typing import Any, NoReturn

MAX_REPR = 300

_bounded = Repr()
_bounded.maxstring = _bounded.maxother = 200
_bounded.maxlevel = 2


def bounded_repr(value: object) -> str:
    """The value as a log line may show it: escaped, and at most 300 characters long."""
    return _bounded.repr(value)[:MAX_REPR]


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(name)


_decoder = json.JSONDecoder(parse_constant=_reject_constant)


def parse_json(body: bytes) -> Any:
    """Decodes JSON as RFC 8259 defines it: UTF-8, without NaN and Infinity.

    Raises:
        ValueError: if it is anything else. The message does not contain the input.
    """
    try:
        return _decoder.decode(body.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
