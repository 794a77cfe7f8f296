# SPDX-License-Identifier: Apache-2.0
"""Sends one HTTP request, without retries, redirects, proxies or a connection pool."""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPSConnection
from typing import Any


class WrongAnswer(Exception):
    """An answer is not 2xx although the test expected success. The message shows the answer."""


@dataclass(frozen=True)
class Answer:
    """An HTTP answer; `headers` have lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    request: str

    @property
    def json(self) -> Any:
        """The body, parsed; raises WrongAnswer if it is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            raise WrongAnswer(f"not JSON: {self}") from None

    def ok(self) -> Any:
        """The parsed body of a success; raises WrongAnswer on anything else."""
        if not 200 <= self.status < 300:
            raise WrongAnswer(str(self))
        return self.json

    def __str__(self) -> str:
        return f"{self.request} -> {self.status} {self.body[:2000].decode('utf-8', 'replace')}"


def http(
    method: str,
    url: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = 60.0,
) -> Answer:
    """Send a request and return the answer, also if it is an error or a redirect.

    Args:
        method: the HTTP method.
        url: `http://host:port/path?query`, or the same with https. Certificates are not verified.
        body: bytes are sent as they are, None is no body, anything else is sent as JSON.
        headers: in addition to those that HTTP requires.
        timeout: seconds without a byte.

    Raises:
        OSError, http.client.HTTPException: if there is no answer at all.
    """
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    all_headers = dict(headers or {})
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode("ascii")
        all_headers.setdefault("Content-Type", "application/json")
    connection = HTTPConnection(host, timeout=timeout)
    if scheme == "https":
        unverified = ssl._create_unverified_context()
        connection = HTTPSConnection(host, timeout=timeout, context=unverified)
    try:
        connection.request(method, slash + path or "/", body, all_headers)
        response = connection.getresponse()
        return Answer(
            status=response.status,
            headers={name.lower(): value for name, value in response.getheaders()},
            body=response.read(),
            request=f"{method} {url}",
        )
    finally:
        connection.close()
