# SPDX-License-Identifier: Apache-2.0
"""HTTP requests of the checks. They show TLS errors and duplicate headers, as clients see them.

A check that only the command runs calls `Probe.send`, which blocks. A check that a running Synapse
repeats is a generator of requests (`Steps`). It sends no request itself, so that Synapse can run it
with its own client on its reactor.
"""

import http.client
import io
import socket
import ssl
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import attr

from synapse_lk_jwt.compat.forward_proxy import ForwardProxy
from synapse_lk_jwt.untrusted import parse_json

T = TypeVar("T")

# The limits of one request, its answer included.
TIMEOUT_SEC = 10
MAX_ANSWER_BYTES = 1024 * 1024


class NoAnswer(Exception):
    """The server sent no answer. The text names the cause."""


class Refused(NoAnswer):
    """Nothing listens at the address."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Request:
    """An HTTP request.

    Attributes:
        method: the method.
        url: the whole URL.
        headers: names and values.
        body: the body, if any.
    """

    method: str
    url: str
    headers: Mapping[str, str] = attr.ib(factory=dict, repr=False)
    body: bytes | None = None


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Answer:
    """An HTTP response.

    Attributes:
        status: the status.
        headers: names and values, duplicates included.
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
        """Whether it is a web page, of a proxy or of another server."""
        return self.get("Content-Type").startswith("text/html")

    @property
    def json(self) -> Any:
        """The body as JSON; None if it is not JSON."""
        try:
            return parse_json(self.body)
        except ValueError:
            return None


# Yields requests, is sent the answers, and returns the result. `NoAnswer` is thrown into it.
Steps = Generator[Request, Answer, T]


class Probe:
    """Sends requests, one after the other, with Python's HTTP client.

    It trusts what OpenSSL trusts (`SSL_CERT_FILE` changes that), and follows no redirect. A URL
    such as `http://%2Frun%2Fsynapse.sock/path` names a Unix socket.
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
            connect_to: the address to connect to instead of a host and port.
            verifies: whether certificates must be valid.
            proxy: the forward proxy for all requests. As Synapse's client does, `http` requests
                name their whole URL, and `https` requests open a tunnel (CONNECT).
        """
        self._connect_to = connect_to
        self._verifies = verifies
        self._proxy = proxy

    def send(self, request: Request) -> Answer:
        """Sends a request and returns any answer.

        Raises:
            NoAnswer: if no answer arrives within ten seconds.
        """
        try:
            return self._send(request)
        except TimeoutError:
            raise NoAnswer(f"no answer within {TIMEOUT_SEC} s") from None
        except ConnectionRefusedError:
            raise Refused("the connection is refused: nothing listens there") from None
        except socket.gaierror as e:
            raise NoAnswer(f"its name cannot be resolved ({e.strerror})") from None
        except ssl.SSLCertVerificationError as e:
            raise NoAnswer(f"its certificate is not valid ({e.verify_message})") from None
        except ssl.SSLError as e:
            raise NoAnswer(f"it does not speak TLS ({e.reason})") from None
        except ValueError:
            # Python raises this for an invalid port, host or path.
            raise NoAnswer("this is not a valid URL") from None
        except (OSError, http.client.HTTPException) as e:
            text = getattr(e, "strerror", None) or type(e).__name__
            raise NoAnswer(f"the connection broke ({text})") from None

    def run(self, steps: Steps[T]) -> T:
        """Sends all requests of a check and returns its result.

        Raises:
            NoAnswer: if the check does not handle it.
        """
        try:
            request = next(steps)
            while True:
                try:
                    answer = self.send(request)
                except NoAnswer as e:
                    request = steps.throw(e)
                else:
                    request = steps.send(answer)
        except StopIteration as e:
            result: T = e.value
            return result

    def _send(self, request: Request) -> Answer:
        deadline = time.monotonic() + TIMEOUT_SEC
        parts = urlsplit(request.url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = dict(request.headers)
        if self._proxy is not None and parts.scheme == "http":
            path = f"http://{parts.netloc}{path}"
            if self._proxy.authorization is not None:
                headers["Proxy-Authorization"] = self._proxy.authorization
        connection = self._connection(request.url, deadline)
        try:
            connection.request(request.method, path, request.body, headers)
            response = connection.getresponse()
            body = response.read(MAX_ANSWER_BYTES)
            return Answer(response.status, response.getheaders(), body)
        finally:
            connection.close()

    def _connection(self, url: str, deadline: float) -> http.client.HTTPConnection:
        parts = urlsplit(url)
        host = unquote(parts.netloc if "%2F" in parts.netloc else parts.hostname or "")
        if host.startswith("/"):
            return _UnixConnection(host, deadline)
        is_tls = parts.scheme == "https"
        port = parts.port or (443 if is_tls else 80)
        address = self._connect_to.get((host, port), (host, port))
        if is_tls:
            return _TlsConnection(host, port, address, self._proxy, deadline, self._verifies)
        return _Connection(host, port, address, self._proxy, deadline)


class _BoundedSocket:
    """A socket for `http.client` whose whole use ends at a deadline.

    A timeout of the socket itself is for each read, and a server that sends one byte at a time
    would never reach it.
    """

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self))

    def recv_into(self, buffer: Any) -> int:
        self._limit()
        return self._sock.recv_into(buffer)

    def sendall(self, data: bytes) -> None:
        self._limit()
        self._sock.sendall(data)

    def close(self) -> None:
        self._sock.close()

    def _limit(self) -> None:
        self._sock.settimeout(_seconds_until(self._deadline))


class _Reader(io.RawIOBase):
    def __init__(self, sock: _BoundedSocket) -> None:
        self._sock = sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._sock.recv_into(buffer)


def _seconds_until(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


class _Connection(http.client.HTTPConnection):
    """A connection to a chosen address, or through a proxy."""

    def __init__(
        self,
        host: str,
        port: int,
        address: tuple[str, int],
        proxy: ForwardProxy | None,
        deadline: float,
    ) -> None:
        super().__init__(host, port)
        self._address = address if proxy is None else (proxy.host, proxy.port)
        self._proxy = proxy
        self._deadline = deadline

    def connect(self) -> None:
        self.sock = _BoundedSocket(self._open(), self._deadline)

    def _open(self) -> socket.socket:
        sock = socket.create_connection(self._address, _seconds_until(self._deadline))
        if self._proxy is not None and self._proxy.is_tls:
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=self._proxy.host)
        return sock


class _TlsConnection(_Connection):
    default_port = 443

    def __init__(
        self,
        host: str,
        port: int,
        address: tuple[str, int],
        proxy: ForwardProxy | None,
        deadline: float,
        verifies: bool,
    ) -> None:
        super().__init__(host, port, address, proxy, deadline)
        self._verifies = verifies

    def _open(self) -> socket.socket:
        if self._proxy is not None and self._proxy.is_tls:
            # Python's TLS does not run inside itself.
            raise NoAnswer(
                "this command cannot send https requests through a proxy that is itself https"
            )
        sock = super()._open()
        if self._proxy is not None:
            self._open_tunnel(sock, self._proxy)
        context = ssl.create_default_context()
        if not self._verifies:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context.wrap_socket(sock, server_hostname=self.host)

    def _open_tunnel(self, sock: socket.socket, proxy: ForwardProxy) -> None:
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"CONNECT {host}:{self.port} HTTP/1.1", f"Host: {host}:{self.port}"]
        if proxy.authorization is not None:
            lines.append(f"Proxy-Authorization: {proxy.authorization}")
        sock.sendall("\r\n".join((*lines, "", "")).encode("ascii"))
        response = http.client.HTTPResponse(
            _BoundedSocket(sock, self._deadline),  # type: ignore[arg-type]
            method="CONNECT",
        )
        response.begin()
        if response.status != 200:
            raise NoAnswer(f"the proxy answers {response.status}")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, deadline: float) -> None:
        super().__init__("localhost")
        self._path = path
        self._deadline = deadline

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(_seconds_until(self._deadline))
        sock.connect(self._path)
        self.sock = _BoundedSocket(sock, self._deadline)
