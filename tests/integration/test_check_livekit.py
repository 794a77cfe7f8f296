# SPDX-License-Identifier: Apache-2.0
"""Checks of LiveKit: its address, key and clock, the access rule, and webhooks."""

import contextlib
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from synapse_lk_jwt.check import command, probe, webhooks
from synapse_lk_jwt.livekit.tokens import MUST_NOT_CREATE
from testbed.check import Checker
from testbed.livekit import LiveKit
from testbed.nginx import UPGRADE, Servers, proxy
from testbed.process import wait_until
from testbed.public import Public
from testbed.service import PREFIX
from testbed.sets import module_config, running
from testbed.skips import missing_tool
from testbed.synapse import Synapse


@dataclass(frozen=True)
class Other:
    """Another LiveKit behind nginx, for tests to start with something wrong."""

    livekit: LiveKit
    nginx: Servers

    def restart(self, extra_config: Mapping[str, Any]) -> None:
        self.livekit.extra_config = dict(extra_config)
        # It waits for participants before it ends.
        self.livekit.process.kill()
        self.livekit.start()
        self.livekit.wait_ready()

    def named(self, **more: Any) -> dict[str, Any]:
        """The module's options that name it."""
        url = self.nginx.url("other").replace("https:", "wss:")
        return {"livekit_url": url, "livekit_internal_url": self.livekit.api_url, **more}


@pytest.fixture
def other(public: Public, tmp_path: Path) -> Iterator[Other]:
    livekit = LiveKit(tmp_path)
    servers = {"other": proxy(livekit.api_url, "/", *UPGRADE)}
    nginx = Servers(tmp_path, servers, public.synapse.directory)
    try:
        with running(nginx):
            yield Other(livekit, nginx)
    finally:
        livekit.process.kill()


# Where LiveKit is


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://127.0.0.1:1", "the connection is refused"),
        ("http://livekit.invalid:7880", "its name cannot be resolved"),
        ("https://127.0.0.1:{livekit}", "it does not speak TLS"),
        ("http://127.0.0.1:{synapse}", "a web page (404) answers"),
        ("https://127.0.0.1:{nginx}", "a web page (404) answers"),
        ("http://127.0.0.1:{nginx}", "a web page (400) answers"),
        ("http://127.0.0.1:{media}", "the connection broke (Connection reset by peer)"),
    ],
)
def test_livekit_that_does_not_run_is_one_problem(url: str, text: str, public: Public) -> None:
    url = url.format(
        livekit=public.livekit.port,
        synapse=public.synapse.client_url.rpartition(":")[2],
        nginx=public.nginx.port("matrix"),
        media=public.livekit.tcp_port,
    )
    report = public.check.run(module={"livekit_internal_url": url})
    finding = report.the("wrong", "LiveKit")
    assert url in finding.text
    assert text in finding.text
    assert finding.file == "changed.json, below 'config:' of the module"
    assert "livekit_internal_url" in finding.pasted
    assert report.bad == {"LiveKit": "wrong"}, str(report)
    assert report.skipped == {"auto_create", "access rule", "livekit_url", "webhooks"}
    assert report.status == 1


def test_livekit_that_hangs_is_reported_in_time(
    public: Public, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "TIMEOUT_SEC", 1)
    # The system accepts connections, and no program answers them.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        report = public.check.run(module={"livekit_internal_url": url})
    assert "no answer within 1 s" in report.the("wrong", "LiveKit").text


def test_livekit_with_an_invalid_certificate_is_wrong(public: Public) -> None:
    url = public.nginx.url("livekit")
    checker = Checker(public.synapse)
    finding = checker.run(module={"livekit_internal_url": url}).the("wrong", "LiveKit")
    assert "its certificate is not valid (self-signed certificate)" in finding.text
    line = finding.pasted["livekit_internal_url"]
    assert line == "http://127.0.0.1:7880"


def test_web_page_in_place_of_livekit_is_wrong(public: Public, tmp_path: Path) -> None:
    page = "default_type text/html; return 200 '<html>Welcome</html>';"
    nginx = Servers(tmp_path, {"page": page}, public.synapse.directory)
    with running(nginx):
        report = public.check.run(module={"livekit_internal_url": nginx.url("page")})
    assert "a web page (200) answers" in report.the("wrong", "LiveKit").text


# API key and secret


def test_api_key_that_livekit_does_not_know_is_wrong(public: Public) -> None:
    report = public.check.run(module={"livekit_key": "APIother"})
    finding = report.the("wrong", "LiveKit")
    assert "does not know the API key 'APIother'" in finding.text
    assert finding.file == "LiveKit's configuration (livekit.yaml); then restart LiveKit"
    assert list(finding.pasted["keys"]) == ["APIother"]


def test_secret_that_differs_from_livekits_is_wrong(public: Public, other: Other) -> None:
    other.livekit.secret = "another-secret-of-thirty-two-characters"
    other.restart({})
    report = public.check.run(module=other.named())
    finding = report.the("wrong", "LiveKit")
    assert "knows the API key 'APIrealparts' with another secret" in finding.text
    assert finding.file == "changed.json, below 'config:' of the module"
    # As configured, in a form that is not a second option for the same secret.
    assert list(finding.pasted) == ["livekit_secret"]
    assert report.bad == {"LiveKit": "wrong"}, str(report)


@pytest.mark.parametrize("text", ["invalid token: eyJ", "invalid authorization token: no"])
def test_check_livekit_rejects_the_token_in_old_or_new_words_names_the_secret(
    text: str, public: Public, tmp_path: Path
) -> None:
    answer = f"default_type text/plain; return 401 '{text}';"
    nginx = Servers(tmp_path, {"livekit": answer}, public.synapse.directory)
    with running(nginx):
        report = public.check.run(module={"livekit_internal_url": nginx.url("livekit")})
    finding = report.the("wrong", "LiveKit")
    assert "knows the API key 'APIrealparts' with another secret" in finding.text


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("\ufeff{secret}\r\n", None),
        ('"{secret}"', "begins and ends with quotes"),
        ("APIrealparts: {secret}", "looks like 'key: secret'"),
    ],
)
def test_secret_file_with_a_mistake_is_named_with_the_mistake(
    content: str, hint: str | None, public: Public, tmp_path: Path
) -> None:
    file = tmp_path / "livekit_secret"
    file.write_text(content.format(secret=public.livekit.secret))
    file.chmod(0o600)
    report = public.check.run(module={"livekit_secret": None, "livekit_secret_path": str(file)})
    if hint is None:
        assert report.bad == {}, str(report)
        return
    assert any(hint in finding.text for finding in report.all("warning", "module"))
    finding = report.the("wrong", "LiveKit")
    assert finding.file == f"{file} (livekit_secret_path)"
    assert "the secret below 'keys:' in livekit.yaml for APIrealparts" in finding.lines[0]


@pytest.mark.parametrize("option", ["livekit_url", "livekit_internal_url"])
def test_livekit_url_with_a_wrong_path_names_the_option_and_the_url(
    option: str, public: Public
) -> None:
    url = {
        "livekit_url": public.nginx.url("livekit").replace("https:", "wss:"),
        "livekit_internal_url": public.livekit.api_url,
    }[option]
    module: dict[str, Any] = {option: f"{url}/wrong"}
    if option == "livekit_url":
        module["livekit_internal_url"] = None
    finding = public.check.run(module=module).the("wrong", "LiveKit")
    assert finding.pasted == {option: url}
    assert public.check.run(module={**module, **finding.pasted}).bad == {}


# Clocks


def test_clocks_that_are_far_apart_are_wrong(tmp_path: Path) -> None:
    if shutil.which("faketime") is None:
        missing_tool("faketime is missing: apt-get install faketime")
    # Go reads the time from the kernel directly, so `faketime` has no effect on it.
    wrapper = ["faketime", "-f", "+10m"]
    livekit = LiveKit(tmp_path)
    late = Synapse("late", tmp_path, module_config(livekit))
    late.main.command = [*wrapper, *late.main.command]
    with running(livekit, late):
        report = Checker(late).start(wrapper=wrapper)
        wait_until(lambda: "clocks: differ: LiveKit's is" in late.log_text(), "line in the log")
    finding = report.the("wrong", "clocks")
    assert finding.text.endswith("behind this machine's, so LiveKit rejects every token")
    seconds = int(finding.text.split()[3])
    assert abs(seconds - 600) <= 1, finding
    assert finding.lines == ["timedatectl set-ntp true"]
    assert report.the("ok", "processes")
    assert report.status == 1
    assert late.log_text().count("clocks: differ: LiveKit's is") == 1


@pytest.mark.parametrize(("ahead_sec", "text"), [(30, "behind"), (-30, "ahead of")])
def test_clocks_that_are_a_little_apart_are_a_warning(
    ahead_sec: int, text: str, public: Public, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_now_ms", lambda: int((time.time() + ahead_sec) * 1000))
    report = public.check.run()
    assert (
        f"s {text} this machine's. LiveKit rejects every token if they differ by 60 s"
        in report.the("warning", "clocks").text
    )
    assert report.bad == {"clocks": "warning"}, str(report)
    assert report.status == 0


# The access rule


def test_auto_create_on_restricting_list_is_a_warning(public: Public, other: Other) -> None:
    other.livekit.auto_create = True
    other.livekit.webhook_urls = public.livekit.webhook_urls
    other.restart({})
    report = public.check.run(module=other.named())
    finding = report.the("warning", "auto_create")
    assert "see a connection error" in finding.text
    assert report.the("ok", "access rule")
    assert report.bad == {"auto_create": "warning"}, str(report)
    assert report.status == 0
    assert other.livekit.rooms() == []

    report = public.check.run(module=other.named(full_access_homeservers=["*"]))
    assert report.the("ok", "auto_create")
    assert report.the("ok", "access rule")

    other.restart(finding.pasted)
    assert public.check.run(module=other.named()).bad == {}


def test_line_that_livekits_file_has_already_is_replaced_by_a_restart(
    public: Public, other: Other, tmp_path: Path
) -> None:
    other.livekit.auto_create = True
    other.livekit.webhook_urls = public.livekit.webhook_urls
    other.restart({})
    file = tmp_path / "livekit.yaml"
    file.write_text("room:\n  auto_create: false\n  max_participants: 5\n")
    report = public.check.run("--livekit-config", str(file), module=other.named())
    finding = report.the("warning", "auto_create")
    assert f"{file} already has the lines for this. Restart LiveKit" in finding.text
    assert finding.lines[0].startswith("systemctl restart livekit")

    file.write_text("room:\n  auto_create: true\n")
    report = public.check.run("--livekit-config", str(file), module=other.named())
    finding = report.the("warning", "auto_create")
    assert finding.file == f"{file}; then restart LiveKit"
    assert finding.pasted == {"room": {"auto_create": False}}


@pytest.mark.parametrize("content", [None, "a: [", "text", "\xff"])
def test_livekit_config_that_is_none_is_named(
    content: str | None, public: Public, tmp_path: Path
) -> None:
    file = tmp_path / "livekit.yaml"
    if content is not None:
        file.write_text(content, encoding="latin-1")
    report = public.check.run("--livekit-config", str(file))
    assert report.status == 2
    assert f"Cannot check: {str(file)!r}" in report.errors


# A LiveKit that resolves the preset behaves as an old one that does not know the claim.
KNOWS_THE_PRESET: dict[str, Any] = {"room_configurations": {MUST_NOT_CREATE: {}}}


@pytest.mark.parametrize("auto_create", [False, True])
def test_livekit_that_creates_rooms_for_restricted_users_is_wrong(
    auto_create: bool, public: Public, other: Other
) -> None:
    other.livekit.webhook_urls = public.livekit.webhook_urls
    other.restart({"room": {"auto_create": auto_create, **KNOWS_THE_PRESET}})
    report = public.check.run(module=other.named())
    finding = report.the("wrong", "access rule")
    assert "LiveKit created a room at /whip/v1" in finding.text
    assert "LiveKit 1.8.2 and newer enforce it" in finding.text
    assert "full_access_homeservers has no effect" in finding.text
    # Everything else is still checked.
    assert report.the("ok", "webhooks")
    assert report.status == 1
    assert other.livekit.rooms() == []

    report = public.check.run(module=other.named(full_access_homeservers="*"))
    assert "Guests can start calls" in report.the("warning", "access rule").text
    assert report.status == 0


@pytest.mark.parametrize("refusal", ["return 404 'no page'", "return 403", "deny all"])
def test_access_rule_on_livekit_without_whip_is_checked_at_rtc(
    refusal: str, public: Public, other: Other, tmp_path: Path
) -> None:
    (tmp_path / "front").mkdir()
    block = proxy(other.livekit.api_url, "/", *UPGRADE) + f"location /whip {{ {refusal}; }}"
    front = Servers(tmp_path / "front", {"livekit": block}, public.synapse.directory)
    module = other.named(livekit_internal_url=front.url("livekit"))
    other.livekit.webhook_urls = public.livekit.webhook_urls
    with running(front):
        for auto_create in (True, False):
            other.restart({"room": {"auto_create": auto_create}})
            assert public.check.run(module=module).the("ok", "access rule")

        other.restart({"room": {"auto_create": True, **KNOWS_THE_PRESET}})
        finding = public.check.run(module=module).the("wrong", "access rule")
        assert "LiveKit created a room at /rtc" in finding.text
        assert finding.pasted == {"room": {"auto_create": False}}
        assert other.livekit.rooms() == []

        other.restart({"room": {"auto_create": False, **KNOWS_THE_PRESET}})
        assert public.check.run(module=module).the("ok", "access rule")


ENDLESS = b"HTTP/1.1 200 OK\r\nContent-Type: application/sdp\r\n\r\n" + b"v=0\r\n" * 100_000


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n", ENDLESS])
def test_whip_that_hangs_or_answers_endlessly_ends_the_check_in_time(
    answer: bytes,
    public: Public,
    other: Other,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe, "TIMEOUT_SEC", 3)
    other.livekit.webhook_urls = public.livekit.webhook_urls
    other.restart({})
    (tmp_path / "front").mkdir()
    with hanging(answer) as url:
        block = proxy(other.livekit.api_url, "/", *UPGRADE) + proxy(
            url, "/whip", "proxy_buffering off;"
        )
        front = Servers(tmp_path / "front", {"livekit": block}, public.synapse.directory)
        with running(front):
            began = time.monotonic()
            report = public.check.run(module=other.named(livekit_internal_url=front.url("livekit")))
            took = time.monotonic() - began
    finding = report.the("warning", "access rule")
    assert "cannot be tested: /whip/v1" in finding.text
    assert report.bad == {"access rule": "warning"}, str(report)
    assert took < 10


@contextlib.contextmanager
def hanging(answer: bytes) -> Iterator[str]:
    """A server that begins an answer, and neither ends it nor closes the connection."""
    connections: list[socket.socket] = []

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connections.append(connection)
                connection.recv(65536)
                for _ in range(100 if len(answer) > 1000 else 1):
                    connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    for connection in connections:
        connection.close()


# Webhooks


@pytest.mark.parametrize(
    "webhook",
    [
        {},
        {"webhook": {"api_key": "APIrealparts", "urls": ["{synapse}/sfu_webhook"]}},
        {"webhook": {"api_key": "APIrealparts", "urls": ["http://127.0.0.1:1{P}/sfu_webhook"]}},
    ],
)
def test_webhooks_that_do_not_arrive_are_wrong_and_the_lines_fix_it(
    webhook: dict[str, Any], public: Public, other: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "WEBHOOK_SEC", 1)
    for settings in webhook.values():
        url = settings["urls"][0].format(synapse=public.synapse.client_url, P=PREFIX)
        webhook = {"webhook": {**settings, "urls": [url]}}
    other.restart(webhook)
    report = public.check.run(module=other.named())
    finding = report.the("wrong", "webhooks")
    assert "do not arrive" in finding.text
    assert "livekit.yaml" in str(finding.file)
    assert report.bad == {"webhooks": "wrong"}, str(report)

    other.restart(finding.pasted)
    monkeypatch.undo()
    assert public.check.run(module=other.named()).bad == {}


def test_webhooks_signed_with_another_key_are_wrong_and_the_lines_fix_it(
    public: Public, other: Other
) -> None:
    second = "the-secret-of-the-second-key-of-livekit"
    keys = {other.livekit.key: other.livekit.secret, "APIsecond": second}
    webhook = {"api_key": "APIsecond", "urls": public.livekit.webhook_urls}
    other.restart({"keys": keys, "webhook": webhook})
    report = public.check.run(module=other.named())
    finding = report.the("wrong", "webhooks")
    assert "none was signed with livekit_key" in finding.text
    assert report.bad == {"webhooks": "wrong"}, str(report)
    assert second not in str(report)

    other.restart({"keys": keys, **finding.pasted})
    assert public.check.run(module=other.named()).bad == {}
