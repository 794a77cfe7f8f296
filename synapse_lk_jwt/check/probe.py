# SPDX-License-Identifier: Apache-2.0
"""Asks over HTTP and keeps what a client would stumble over: TLS, headers that are there twice."""

import asyncio
import http.client
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import attr

from synapse_lk_jwt.compat.forward_proxy import ForwardProxy
from synapse_lk_jwt.untrusted import parse_json

TIMEOUT_SEC = 10
MAX_ANSWER_BYTES = 1024 * 1024


class NoAnswer(Exception):
    """Nobody answered. The text says why."""


class Refused(NoAnswer):
    """Nothing listens there."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Answer:
    """An HTTP response.

    Attributes:
        status: the status.
        headers: names and values, as often as they came.
        body: the body.
    """

    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes

    def all(self, name: str) -> list[str]:
        """All values of a header."""
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def get(self, name: str) -> str:
        """The first value of a header, or an empty string."""
        return next(iter(self.all(name)), "")

    @property
    def is_html(self) -> bool:
        """Whether it is a web page: a proxy's, or of whatever else is there."""
        return self.get("Content-Type").startswith("text/html")

    @property
    def json(self) -> Any:
        """The body as JSON, None if it is something else."""
        try:
            return parse_json(self.body)
        except ValueError:
            return None


class Probe(Protocol):
    """Asks over HTTP."""

    async def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Answer:
        """Asks, and takes any answer; redirects are up to the implementation.

        Raises:
            NoAnswer: if there is none within ten seconds.
        """
        ...


class HttpProbe:
    """Asks from a process of its own, with Python's HTTP client in threads.

    It trusts what OpenSSL trusts (`SSL_CERT_FILE` changes that), and follows no redirect. A URL
    such as `http://%2Frun%2Fsynapse.sock/path` is of a Unix socket.
    """

    def __init__(
        self,
        connect_to: Mapping[tuple[str, int], tuple[str, int]],
        *,
        verifies: bool = True,
        proxy: ForwardProxy | None = None,
    ) -> None:
        """
        Args:
            connect_to: where to connect for a host and port, if not there.
            verifies: whether certificates must be valid.
            proxy: what to send all requests through, as Synapse's client does: `http` requests with
                their whole URL, `https` ones in a tunnel (CONNECT).
        """
        self._connect_to = connect_to
        self._verifies = verifies
        self._proxy = proxy

    async def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Answer:
        """As `Probe` has it."""
        asked = asyncio.to_thread(self._request, method, url, dict(headers or {}), body)
        try:
            return await asyncio.wait_for(asked, TIMEOUT_SEC + 1)
        except (asyncio.TimeoutError, TimeoutError):
            raise NoAnswer(f"no answer within {TIMEOUT_SEC} s") from None
        except ConnectionRefusedError:
            raise Refused("the connection is refused: nothing listens there") from None
        except socket.gaierror as e:
            raise NoAnswer(f"its name cannot be resolved ({e.strerror})") from None
        except ssl.SSLCertVerificationError as e:
            raise NoAnswer(f"its certificate is not valid ({e.verify_message})") from None
        except ssl.SSLError as e:
            raise NoAnswer(f"it does not speak TLS as it should ({e.reason})") from None
        except ValueError:
            # Of a port, a host or a path.
            raise NoAnswer("this is no address") from None
        except (OSError, http.client.HTTPException) as e:
            text = getattr(e, "strerror", None) or type(e).__name__
            raise NoAnswer(f"the connection broke ({text})") from None

    def _request(
        self, method: str, url: str, headers: dict[str, str], body: bytes | None
    ) -> Answer:
        deadline = time.monotonic() + TIMEOUT_SEC
        connection = self._connection(url)
        try:
            parts = urlsplit(url)
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            if self._proxy is not None and parts.scheme == "http":
                path = f"http://{parts.netloc}{path}"
                if self._proxy.authorization is not None:
                    headers["Proxy-Authorization"] = self._proxy.authorization
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            received = b""
            # Each part may take its time, and all of them must not.
            while len(received) < MAX_ANSWER_BYTES and (part := response.read1(65536)):
                received += part
                if time.monotonic() > deadline:
                    raise TimeoutError
            return Answer(response.status, response.getheaders(), received)
        finally:
            connection.close()

    def _connection(self, url: str) -> http.client.HTTPConnection:
        parts = urlsplit(url)
        host = unquote(parts.netloc if "%2F" in parts.netloc else parts.hostname or "")
        if host.startswith("/"):
            return _UnixConnection(host)
        is_tls = parts.scheme == "https"
        port = parts.port or (443 if is_tls else 80)
        address = self._connect_to.get((host, port), (host, port))
        if is_tls:
            return _TlsConnection(host, port, address, self._proxy, self._verifies)
        return _Connection(host, port, address, self._proxy)


class _Connection(http.client.HTTPConnection):
    """A connection that may go to another address than it says, or through a proxy."""

    def __init__(
        self, host: str, port: int, address: tuple[str, int], proxy: ForwardProxy | None
    ) -> None:
        super().__init__(host, port, timeout=TIMEOUT_SEC)
        self._address = address if proxy is None else (proxy.host, proxy.port)
        self._proxy = proxy

    def connect(self) -> None:
        self.sock = socket.create_connection(self._address, self.timeout)
        if self._proxy is not None and self._proxy.is_tls:
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(self.sock, server_hostname=self._proxy.host)


class _TlsConnection(_Connection):
    default_port = 443

    def __init__(
        self,
        host: str,
        port: int,
        address: tuple[str, int],
        proxy: ForwardProxy | None,
        verifies: bool,
    ) -> None:
        super().__init__(host, port, address, proxy)
        self._verifies = verifies

    def connect(self) -> None:
        if self._proxy is not None and self._proxy.is_tls:
            # Python's TLS does not run inside itself.
            raise NoAnswer("this command cannot use https through a proxy that takes https itself")
        super().connect()
        if self._proxy is not None:
            self._open_tunnel(self._proxy)
        context = ssl.create_default_context()
        if not self._verifies:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        self.sock = context.wrap_socket(self.sock, server_hostname=self.host)

    def _open_tunnel(self, proxy: ForwardProxy) -> None:
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"CONNECT {host}:{self.port} HTTP/1.1", f"Host: {host}:{self.port}"]
        if proxy.authorization is not None:
            lines.append(f"Proxy-Authorization: {proxy.authorization}")
        self.sock.sendall("\r\n".join((*lines, "", "")).encode("ascii"))
        response = http.client.HTTPResponse(self.sock, method="CONNECT")
        response.begin()
        if response.status != 200:
            raise NoAnswer(f"the proxy answers {response.status}")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_SEC)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
