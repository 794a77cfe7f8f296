# SPDX-License-Identifier: Apache-2.0
"""An SFU that is down, hangs, or rejects the secret: a Matrix error, and one line in the log."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed import service
from testbed.http import Answer
from testbed.livekit import LiveKit
from testbed.matrix import User
from testbed.sets import module_config, running
from testbed.synapse import Synapse


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Synapse, LiveKit]]:
    directory: Path = tmp_path_factory.mktemp("one")
    livekit = LiveKit(directory)
    synapse = Synapse("d", directory, module_config(livekit))
    with running(livekit, synapse):
        yield synapse, livekit


def ask(synapse: Synapse, alice: User, slot: str) -> Answer:
    body = service.get_token_body(alice, alice.create_room(), slot_id=slot)
    return service.post(synapse.client_url, "/get_token", body)


def test_token_while_the_sfu_is_down_is_rejected_until_it_is_back(
    one: tuple[Synapse, LiveKit],
) -> None:
    synapse, livekit = one
    alice = synapse.register("alice")
    ask(synapse, alice, "slot").ok()
    livekit.stop()
    for _ in range(3):
        answer = ask(synapse, alice, "slot")
        assert (answer.status, answer.json) == (
            503,
            {"errcode": "M_UNKNOWN", "error": "Unable to create room on SFU"},
        )
        assert answer.headers["access-control-allow-origin"] == "*"
    log = synapse.log_text()
    assert log.count("calls cannot be started: no connection: Connection was refused") == 1, log
    assert service.post(synapse.client_url, "/get_token", b"").status == 400
    livekit.start()
    livekit.wait_ready()
    ask(synapse, alice, "slot").ok()
    assert synapse.log_text().count("can be used again") == 1
    assert "Traceback" not in synapse.log_text()


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Type: application/protobuf\r\n\r\n"]
)
def test_token_while_the_sfu_hangs_is_rejected_in_time(
    answer: bytes, one: tuple[Synapse, LiveKit]
) -> None:
    synapse, livekit = one
    connections = []
    others = []

    def hang(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                # The check at start sends other requests.
                if b"CreateRoom" in connection.recv(65536):
                    connections.append(connection)
                else:
                    others.append(connection)
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=hang, args=(listener,), daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        # Without polls, so that only the token request is sent.
        synapse.module_config = module_config(
            livekit, livekit_internal_url=url, sanity_check_interval=0
        )
        synapse.restart()
        alice = synapse.register(f"alice{len(answer)}")
        began = time.monotonic()
        status = ask(synapse, alice, "slot").status
        took = time.monotonic() - began
        listener.shutdown(socket.SHUT_RDWR)
    assert status == 503
    assert 9 < took < 12
    assert "no answer within 10 s" in synapse.log_text()
    assert len(connections) == 1
    if answer:
        # Synapse's own client would drop a silent connection only after a minute.
        connections[0].settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert connections[0].recv(1) == b""


def test_token_with_a_wrong_secret_is_reported_in_the_log(one: tuple[Synapse, LiveKit]) -> None:
    synapse, livekit = one
    wrong = "another-secret-of-thirty-two-characters"
    synapse.module_config = module_config(livekit, livekit_secret=wrong)
    synapse.restart()
    answer = ask(synapse, synapse.register("bob"), "slot")
    assert answer.status == 503, answer
    assert "it rejected livekit_secret (401)" in synapse.log_text()
    assert wrong not in synapse.log_text()
