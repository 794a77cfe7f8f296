# SPDX-License-Identifier: Apache-2.0
"""What is said to the SFU, byte by byte: Synapse's own HTTP client on a network of memory."""

import logging
from typing import Any

from harness_base import SECRET, ModuleTestCase
from livekit.api import TokenVerifier
from livekit.protocol.models import Room
from livekit.protocol.room import CreateRoomRequest
from synapse.api.errors import Codes
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.protocol import connectionDone
from wire import Connection

PROTOBUF = "Content-Type: application/protobuf"
JSON = "Content-Type: application/json"
HTML = "Content-Type: text/html"


class SfuWireTests(ModuleTestCase):
    module_config = {"livekit_internal_url": "http://sfu.internal:7880/livekit/"}

    def prepare(self, reactor: Any, clock: Any, hs: Any) -> None:
        super().prepare(reactor, clock, hs)
        del hs.get_simple_http_client().request
        self.reactor.lookups["sfu.internal"] = "10.1.2.3"
        self.token = self.openid_token()

    def start(self) -> Any:
        """Asks for a token, as far as Synapse gets without the SFU."""
        channel = self.post(
            "/sfu/get", self.sfu_get_body(openid_token=self.token), await_result=False
        )
        self.pump(0.005)
        return channel

    def connection(self, number: int = -1) -> Connection:
        return Connection(self.reactor, number)

    def accept(self) -> Connection:
        connection = self.connection().accept()
        self.pump(0.005)
        return connection

    def room(self) -> bytes:
        return Room(name="x", num_participants=1).SerializeToString()

    def connections(self) -> int:
        return len(self.reactor.tcpClients)

    def assert_unavailable(self, channel: Any) -> None:
        self.pump(0.005)
        error = self.assert_error(channel, 503, Codes.UNKNOWN)
        assert error == "Unable to create room on SFU"
        assert channel.headers.getRawHeaders("Access-Control-Allow-Origin") == ["*"]

    def assert_served(self, channel: Any) -> dict[str, Any]:
        self.pump(0.005)
        return self.assert_token(channel)

    def test_the_request(self) -> None:
        channel = self.start()
        connection = self.accept()
        assert connection.address == ("10.1.2.3", 7880)
        request = connection.request()
        assert request.line == "POST /livekit/twirp/livekit.RoomService/CreateRoom HTTP/1.1"
        assert request.headers["content-type"] == "application/protobuf"
        kind, _, token = request.headers["authorization"].partition(" ")
        assert kind == "Bearer"
        claims = TokenVerifier("APIkey", SECRET).verify(token, verify_signature=False)
        assert claims.video is not None
        assert claims.video.room_create
        assert not claims.video.room_join
        assert not claims.video.room_admin
        asked = CreateRoomRequest.FromString(request.body)
        connection.respond(self.room(), PROTOBUF)
        said = self.assert_served(channel)
        assert asked == CreateRoomRequest(
            name=said["video"]["room"], empty_timeout=300, departure_timeout=20
        )
        assert self.connections() == 1

    def test_an_answer_in_pieces(self) -> None:
        channel = self.start()
        connection = self.accept()
        body = self.room()
        answer = f"HTTP/1.1 200 OK\r\n{PROTOBUF}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        for byte in answer + body:
            connection.send(bytes([byte]))
            self.reactor.advance(0.05)
        self.assert_served(channel)

    def test_no_name_and_no_connection(self) -> None:
        with self.assertLogs("synapse_lk_jwt", logging.ERROR) as logs:
            channel = self.start()
            for number in (1, 2):
                assert self.connections() == number
                self.connection().refuse(ConnectionRefusedError())
                self.pump(0.005)
            self.assert_unavailable(channel)
            del self.reactor.lookups["sfu.internal"]
            self.assert_unavailable(self.start())
            assert self.connections() == 2
        refused, unknown = logs.output
        assert "http://sfu.internal:7880/livekit" in refused
        assert "refused" in refused
        assert "sfu.internal" in unknown

    def test_a_connection_that_breaks_is_tried_once_more(self) -> None:
        for cleanly in (True, False):
            for sent in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nx"):
                channel = self.start()
                before = self.connections()
                connection = self.accept()
                connection.send(sent)
                connection.drop(cleanly=cleanly)
                self.pump(0.005)
                assert self.connections() == before + 1, (cleanly, sent)
                self.accept().respond(Room(name="x").SerializeToString(), PROTOBUF)
                self.assert_served(channel)
                # Idle connections are kept, and would be used by the next round.
                self.reactor.advance(300)

    def test_but_not_three_times(self) -> None:
        channel = self.start()
        for _ in range(2):
            self.accept().drop()
            self.pump(0.005)
        self.assert_unavailable(channel)
        assert self.connections() == 2

    def test_what_the_sfu_refuses_is_not_tried_again(self) -> None:
        for status, header, body in (
            ("400 Bad", JSON, b'{"code": "malformed", "msg": "no"}'),
            ("401 No", JSON, b'{"code": "unauthenticated", "msg": "invalid token"}'),
            ("404 No", "Content-Type: text/plain", b"404 page not found"),
            ("429 Slow", JSON, b'{"code": "resource_exhausted", "msg": "no"}'),
            ("500 No", JSON, b'{"code": "internal", "msg": "no"}'),
            ("502 Bad Gateway", HTML, b"<html>"),
            ("503 No", HTML, b"<html>"),
            ("200 OK", HTML, b"<html>"),
            ("200 OK", PROTOBUF, b"\xff\xff\xff"),
        ):
            channel = self.start()
            before = self.connections()
            connection = self.accept()
            connection.respond(body, header, "Connection: close", status=status)
            self.assert_unavailable(channel)
            assert self.connections() == before, status

    def test_a_redirect_is_not_followed(self) -> None:
        self.reactor.lookups["elsewhere"] = "10.6.6.6"
        for status in ("301 M", "302 M", "303 M", "307 M", "308 M"):
            with self.assertLogs("synapse_lk_jwt", logging.ERROR) as logs:
                channel = self.start()
                before = self.connections()
                self.accept().respond(
                    b"", "Location: http://elsewhere:1/x", "Connection: close", status=status
                )
                self.assert_unavailable(channel)
            assert self.connections() == before, status
            (line,) = logs.output
            assert "redirect" in line.lower(), line
            assert "elsewhere" in line, line

    def test_the_limit_of_ten_seconds_holds_for_everything_together(self) -> None:
        def connecting() -> None:
            pass

        def silent() -> None:
            self.accept()

        def stalling() -> None:
            self.accept().send(f"HTTP/1.1 200 OK\r\n{PROTOBUF}\r\n\r\nx".encode())

        for stall in (connecting, silent, stalling):
            channel = self.start()
            stall()
            self.reactor.advance(8)
            self.pump(0.005)
            assert not channel.is_finished(), stall.__name__
            self.reactor.advance(2)
            self.assert_unavailable(channel)

    def test_a_second_try_has_what_is_left_of_the_ten_seconds(self) -> None:
        channel = self.start()
        first = self.accept()
        self.reactor.advance(9)
        first.drop()
        self.pump(0.005)
        second = self.accept()
        assert self.connections() == 2
        assert not channel.is_finished()
        self.reactor.advance(1)
        self.assert_unavailable(channel)
        assert not second.is_open
        assert self.connections() == 2

    def test_whoever_stalls_is_hung_up_on(self) -> None:
        for sent in (b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n\r\nx"):
            channel = self.start()
            before = self.connections()
            connection = self.accept()
            connection.send(sent)
            self.reactor.advance(10)
            self.assert_unavailable(channel)
            assert not connection.is_open, sent
            assert self.connections() == before, sent

    def test_an_endless_answer(self) -> None:
        channel = self.start()
        connection = self.accept()
        connection.send(f"HTTP/1.1 200 OK\r\n{PROTOBUF}\r\n\r\n".encode())
        sent = 0
        while connection.is_open and sent < 100:
            connection.send(b"x" * 65_536)
            sent += 1
        assert sent <= 17
        self.assert_unavailable(channel)
        assert self.connections() == 1

    def test_a_failure_is_shared_and_then_forgotten(self) -> None:
        channels = [self.start() for _ in range(3)]
        assert self.connections() == 1
        self.accept().respond(b"<html>", HTML, "Connection: close", status="502 Bad")
        for channel in channels:
            self.assert_unavailable(channel)
        channel = self.start()
        assert self.connections() == 2
        self.accept().respond(self.room(), PROTOBUF)
        self.assert_served(channel)

    def test_whoever_hangs_up_takes_nobody_along(self) -> None:
        first, second = self.start(), self.start()
        first.request.connectionLost(connectionDone)
        self.pump(0.005)
        self.accept().respond(self.room(), PROTOBUF)
        self.assert_served(second)

    def test_what_the_sfu_says_cannot_bring_a_token_into_the_log(self) -> None:
        with self.assertLogs(level=logging.DEBUG) as logs:
            tokens = []
            for status, header, answer in (
                ("401 No", JSON, '{{"code": "unauthenticated", "msg": "invalid token: {}"}}'),
                ("500 No", JSON, '{{"code": "internal", "msg": "{0} {0}"}}'),
                ("500 No", JSON, '{{"code": "{}", "msg": "x"}}'),
                ("500 No", "Content-Type: text/plain", "{}"),
                ("500 {}", "Content-Type: text/plain", "x"),
                ("500 No", "Content-Type: {}", "x"),
                ("200 OK", PROTOBUF, "{}"),
                ("302 Found", "Location: http://elsewhere/{}", "x"),
            ):
                channel = self.start()
                connection = self.accept()
                token = connection.request().headers["authorization"].split()[1]
                tokens.append(token)
                connection.respond(
                    answer.format(token).encode(),
                    header.format(token),
                    "Connection: close",
                    status=status.format(token),
                )
                self.assert_unavailable(channel)
        text = "\n".join(record.getMessage() for record in logs.records)
        for secret in (SECRET, self.token["access_token"], *tokens):
            assert secret not in text, secret

    def test_health_does_not_depend_on_it(self) -> None:
        channel = self.start()
        self.connection().refuse(ConnectionRefusedError())
        healthz = "/_synapse/client/livekit/jwt/healthz"
        health = self.make_request("GET", healthz, shorthand=False)
        assert (health.code, health.json_body) == (200, {})
        self.connection().refuse(ConnectionRefusedError())
        self.assert_unavailable(channel)
