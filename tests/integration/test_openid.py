# SPDX-License-Identifier: Apache-2.0
"""OpenID tokens of another homeserver: a real one, and hostile ones."""

import json
import os
import selectors
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testbed import service
from testbed.process import wait_until
from testbed.sets import Homeservers
from testbed.synapse import write_certificate

UNAUTHORIZED = {"errcode": "M_UNAUTHORIZED", "error": "The OpenID token is not valid"}


def test_forged_openid_token_is_rejected_and_blocks_no_other_user(homeservers: Homeservers) -> None:
    alice, rita = homeservers.user_of_a(), homeservers.user_of_b()
    room_id = homeservers.room_of_both(alice, rita)
    secret = "a-forged-token-that-can-be-recognised"
    token = {"access_token": secret, "matrix_server_name": homeservers.b.server_name}
    body = service.sfu_get_body(rita, room_id, openid_token=token)

    answer = service.post(homeservers.a.client_url, "/sfu/get", body)

    assert (answer.status, answer.json) == (401, UNAUTHORIZED)
    # A still sends requests to B, and accepts B's real tokens.
    assert alice.profile(rita.user_id).status == 200
    body = service.sfu_get_body(rita, room_id)
    service.post(homeservers.a.client_url, "/sfu/get", body).ok()
    assert "/sfu/get" in homeservers.a.log_text()
    for synapse in (homeservers.a, homeservers.b):
        assert secret not in synapse.log_text()
        assert body["openid_token"]["access_token"] not in synapse.log_text()


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Callable[[Callable[[ssl.SSLSocket], None]], str]]:
    """A function that starts a homeserver, whose answers another function writes."""
    write_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    listeners: list[socket.socket] = []
    over = threading.Event()

    def serve(listener: socket.socket, answer: Callable[[ssl.SSLSocket], None]) -> None:
        while not over.is_set():
            try:
                raw, _ = listener.accept()
                with context.wrap_socket(raw, server_side=True) as connection:
                    connection.recv(65536)
                    answer(connection)
            except OSError:
                continue

    def make(answer: Callable[[ssl.SSLSocket], None]) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        threading.Thread(target=serve, args=(listener, answer), daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    yield make
    over.set()
    for listener in listeners:
        listener.close()


def _json(content: object) -> bytes:
    body = json.dumps(content).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body


_sent_endlessly = [0]


def _endless(connection: ssl.SSLSocket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    # Ends when Synapse closes the connection. If the limit is broken, it ends after 1 GiB.
    for _ in range(16 * 1024):
        connection.sendall(b"x" * 65536)
        _sent_endlessly[0] += 65536


def _endlessly(connection: ssl.SSLSocket, first: bytes, again: bytes) -> None:
    connection.sendall(b"HTTP/1.1 " + first + b"\r\n")
    again *= 65536 // len(again)
    # It ends as `_endless` does.
    for _ in range(16 * 1024):
        connection.sendall(again)
        _sent_endlessly[0] += len(again)


def _slow(connection: ssl.SSLSocket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(60):
        connection.sendall(b" ")
        time.sleep(0.5)  # The slowness of this server. No test waits for it.


def _silent(connection: ssl.SSLSocket) -> None:
    connection.recv(1)


def _no_tls(connection: ssl.SSLSocket) -> None:
    os.write(connection.fileno(), b"this is no TLS record" * 10)


ANSWERS: dict[str, Callable[[ssl.SSLSocket], None]] = {
    "user of another server": lambda c: c.sendall(_json({"sub": "@rita:example.org"})),
    "not a string": lambda c: c.sendall(_json({"sub": ["@rita:example.org"]})),
    "not a user ID": lambda c: c.sendall(_json({"sub": "rita"})),
    "not an object": lambda c: c.sendall(_json([])),
    "not JSON": lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno"),
    "not HTTP": lambda c: c.sendall(b"no\r\n\r\n"),
    "redirect": lambda c: c.sendall(
        b"HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
    ),
    "drops": lambda c: None,
    "bad status line": lambda c: c.sendall(b"HTTP/1.1 abc def\r\n\r\n"),
    "header without colon": lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nno\r\n\r\n"),
    "bad length": lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"),
    "two lengths": lambda c: c.sendall(
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"
    ),
    "unknown encoding": lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: odd\r\n\r\nno"),
    "bad chunk": lambda c: c.sendall(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"
    ),
    "cut chunk": lambda c: c.sendall(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nab"
    ),
    "cut body": lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"),
    "cut headers": lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nContent-"),
    "not UTF-8": lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xff"),
    "control character in sub": lambda c: c.sendall(
        _json({"sub": f"@ri\n:127.0.0.1:{c.getsockname()[1]}"})
    ),
    "resets": lambda c: c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)),
    "no TLS any more": _no_tls,
    "huge": lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n{"),
    "endless": _endless,
    "endless headers": lambda c: _endlessly(c, b"200 OK", b"a: b\r\n"),
    "endless header": lambda c: _endlessly(c, b"200 OK\r\na: b", b" b\r\n"),
    "endless header line": lambda c: _endlessly(c, b"200 OK", b"a"),
    "endless continuation": lambda c: _endlessly(
        c, b"100 Continue\r\n", b"HTTP/1.1 100 Go\r\n\r\n"
    ),
    "slow": _slow,
    "silent": _silent,
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_openid_token_of_hostile_homeserver_gets_401_within_bounds_of_time_and_memory(
    kind: str, homeservers: Homeservers, hostile: Callable[..., str]
) -> None:
    alice = homeservers.user_of_a()
    room_id = alice.create_room()
    token = {"access_token": "token", "matrix_server_name": hostile(ANSWERS[kind])}
    body = service.sfu_get_body(alice, room_id, openid_token=token)
    memory = homeservers.a.main.memory()
    mark = homeservers.a.main.log_size()
    _sent_endlessly[0] = 0
    began = time.monotonic()

    answer = service.post(homeservers.a.client_url, "/sfu/get", body)

    assert (answer.status, answer.json) == (401, UNAUTHORIZED), answer
    assert time.monotonic() - began < 12
    assert "Traceback" not in homeservers.a.main.log_text(mark)
    assert homeservers.a.main.memory() - memory < 8 * 1024 * 1024
    # The connection was closed. The buffers of both sides may hold more than the limit.
    assert _sent_endlessly[0] < 32 * 1024 * 1024


ODD_SERVERS = {
    "no listener": "127.0.0.1:1",
    "no TLS": "",
    "name that does not exist": "nowhere.invalid:8448",
    "not a DNS name": "xn--a:8448",
    "no route": "255.255.255.255:8448",
    "unspecified": "[::]:1",
}


@pytest.mark.parametrize("kind", ODD_SERVERS)
def test_openid_token_of_unreachable_homeserver_gets_401_and_no_traceback(
    kind: str, homeservers: Homeservers
) -> None:
    alice = homeservers.user_of_a()
    room_id = alice.create_room()
    # Federation needs TLS, but A's listener for clients has none.
    server = ODD_SERVERS[kind] or homeservers.a.client_url.removeprefix("http://")
    token = {"access_token": "token", "matrix_server_name": server}
    body = service.sfu_get_body(alice, room_id, openid_token=token)
    mark = homeservers.a.main.log_size()
    answer = service.post(homeservers.a.client_url, "/sfu/get", body)
    assert (answer.status, answer.json) == (401, UNAUTHORIZED), answer
    assert "Traceback" not in homeservers.a.main.log_text(mark)


LINGER: dict[str, bytes] = {
    "keeps it open": b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n",
    "says it will close it": b"HTTP/1.1 401 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("kind", LINGER)
def test_openid_requests_to_hostile_homeservers_leave_no_connections_open(
    kind: str, homeservers: Homeservers, tmp_path: Path
) -> None:
    """Requests with 300 server names of a host that never closes a connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    write_certificate(tmp_path)
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(300)]
    held: list[ssl.SSLSocket] = []
    over = threading.Event()

    def serve() -> None:
        with selectors.DefaultSelector() as selector:
            for listener in listeners:
                selector.register(listener, selectors.EVENT_READ)
            while not over.is_set():
                for key, _ in selector.select(timeout=0.2):
                    assert isinstance(key.fileobj, socket.socket)
                    connection = context.wrap_socket(key.fileobj.accept()[0], server_side=True)
                    # The server neither reads the request to its end nor closes the connection.
                    held.append(connection)
                    connection.recv(65536)
                    connection.sendall(LINGER[kind])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    alice = homeservers.user_of_a()
    room_id = alice.create_room()
    token = alice.openid_token()
    pid = homeservers.a.main.pid
    before = len(os.listdir(f"/proc/{pid}/fd"))
    try:
        for listener in listeners:
            server = f"127.0.0.1:{listener.getsockname()[1]}"
            other = {**token, "access_token": "forged", "matrix_server_name": server}
            body = service.sfu_get_body(alice, room_id, openid_token=other)
            assert service.post(homeservers.a.client_url, "/sfu/get", body).status == 401
        assert len(held) == 300
        # Synapse closes them a few seconds after the last request, although the server closes none.
        wait_until(
            lambda: len(os.listdir(f"/proc/{pid}/fd")) <= before + 5, "descriptors closed", 20
        )
    finally:
        over.set()
        thread.join()
        for open_socket in [*held, *listeners]:
            open_socket.close()


def test_openid_token_of_hostile_homeserver_for_local_user_is_rejected(
    homeservers: Homeservers, hostile: Callable[..., str]
) -> None:
    alice = homeservers.user_of_a()
    room_id = alice.create_room()
    server = hostile(lambda c: c.sendall(_json({"sub": alice.user_id})))
    token = {"access_token": "token", "matrix_server_name": server}
    body = service.sfu_get_body(alice, room_id, openid_token=token)
    answer = service.post(homeservers.a.client_url, "/sfu/get", body)
    assert (answer.status, answer.json) == (401, UNAUTHORIZED), answer
