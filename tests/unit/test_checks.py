# SPDX-License-Identifier: Apache-2.0
"""Parts of the checks that need no server."""

import configparser
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from synapse_lk_jwt.check import livekit as livekit_checks
from synapse_lk_jwt.check import probe as probe_module
from synapse_lk_jwt.check import settings
from synapse_lk_jwt.check.command import _connect_to
from synapse_lk_jwt.check.livekit import LiveKitChecks
from synapse_lk_jwt.check.livekit_file import LiveKitFile
from synapse_lk_jwt.check.livekit_requests import LiveKit
from synapse_lk_jwt.check.probe import Answer, NoAnswer, Probe, Request
from synapse_lk_jwt.check.processes import Running
from synapse_lk_jwt.check.public import Public
from synapse_lk_jwt.check.report import LIVEKIT_YAML, as_text, ok, skipped, summary, warning, wrong
from synapse_lk_jwt.check.setup import Credentials, Setup
from synapse_lk_jwt.check.webhooks import webhook_url
from synapse_lk_jwt.check.well_known import WellKnown
from synapse_lk_jwt.compat.config import MAIN, Listener
from synapse_lk_jwt.compat.rate_limits import RatelimitSettings
from synapse_lk_jwt.config import parse_config

SECRET = "not-a-secret-at-all-but-long-enough"
REPLICATION = Listener("http://10.0.0.1:9093", ("replication",))
CLIENT = Listener("http://10.0.0.1:8008", ("client", "federation"))
SOCKET = Listener("http://%2Frun%2Fs.sock", ("client",))
LOCAL = Listener("http://127.0.0.1:8008", ("client", "federation"))
PREFIX = "/_synapse/client/livekit/jwt"
PUBLIC_HOOK = f"https://matrix.test{PREFIX}/sfu_webhook"


def make_setup(module: dict[str, Any] | None = None, **more: Any) -> Setup:
    config = {"livekit_url": "wss://sfu.test", "livekit_key": "APIkey", **(module or {})}
    rate = RatelimitSettings("rc", 1, 100)
    values: dict[str, Any] = {
        "module": parse_config({**config, "livekit_secret": SECRET}, {}),
        "files": ("homeserver.yaml",),
        "file_of": {},
        "server_name": "example.com",
        "public_baseurl": "https://matrix.test",
        "has_public_baseurl": True,
        "has_delayed_events": True,
        "max_event_delay_ms": 86_400_000,
        "has_msc4222": True,
        "rc_message": rate,
        "rc_delayed_event_mgmt": rate,
        "transports": [],
        "foci": None,
        "instance": MAIN,
        "background": MAIN,
        "listeners": (CLIENT,),
        "workers": {},
        "whitelist": None,
        "claims": {},
        "times_loaded": 1,
        **more,
    }
    return Setup(**values)


def running(setup: Setup, probe: Probe | None = None) -> Running:
    return Running(probe or Probe({}), setup, lambda: 0)


class Stub(Probe):
    """A server that answers each path in the same way, and all others with 404."""

    def __init__(self, answers: dict[str, Answer] | Answer) -> None:
        super().__init__({})
        self._answers = answers

    def send(self, request: Request) -> Answer:
        if isinstance(self._answers, Answer):
            return self._answers
        path = next((p for p in self._answers if request.url.endswith(p)), None)
        return Answer(404, [], b"") if path is None else self._answers[path]


def public(setup: Setup, probe: Probe) -> Public:
    return Public(probe, setup, running(setup, probe), LiveKit(setup, lambda: 0))


# Addresses in lines to paste


@pytest.mark.parametrize(
    ("listeners", "internal", "url"),
    [
        ((REPLICATION, CLIENT), "http://127.0.0.1:7880", f"http://10.0.0.1:8008{PREFIX}"),
        ((REPLICATION, CLIENT), "http://livekit:7880", f"http://10.0.0.1:8008{PREFIX}"),
        ((LOCAL,), "http://127.0.0.1:7880", f"http://127.0.0.1:8008{PREFIX}"),
        ((), "http://127.0.0.1:7880", f"http://127.0.0.1:8008{PREFIX}"),
        # LiveKit cannot reach these from another machine or container.
        ((LOCAL,), "http://livekit:7880", f"https://matrix.test{PREFIX}"),
        ((SOCKET,), "http://127.0.0.1:7880", f"https://matrix.test{PREFIX}"),
    ],
)
def test_webhook_url_is_an_address_that_livekit_can_reach(
    listeners: tuple[Listener, ...], internal: str, url: str
) -> None:
    setup = make_setup({"livekit_internal_url": internal}, listeners=listeners)
    assert webhook_url(running(setup)) == f"{url}/sfu_webhook"


@pytest.mark.parametrize(
    ("listeners", "service_url", "location", "proxy_pass"),
    [
        ((CLIENT,), None, PREFIX, "http://10.0.0.1:8008"),
        ((SOCKET,), None, PREFIX, "http://unix:/run/s.sock"),
        ((), None, PREFIX, "http://127.0.0.1:8008"),
        ((CLIENT,), "https://rtc.test/livekit/jwt", "/livekit/jwt/", "http://10.0.0.1:8008{}/"),
        ((SOCKET,), "https://rtc.test/rtc", "/rtc/", "http://unix:/run/s.sock:{}/"),
    ],
)
def test_lines_for_nginx_forward_the_advertised_path_to_the_configured_one(
    listeners: tuple[Listener, ...], service_url: str | None, location: str, proxy_pass: str
) -> None:
    module = {"service_url": service_url} if service_url else {}
    setup = make_setup(module, listeners=listeners)
    page = Answer(404, [("Content-Type", "text/html")], b"")
    (finding,) = (
        f
        for f in public(setup, Stub(page)).check({"transports": [], "not_served": ""})
        if f.check == "service"
    )
    assert finding.lines[0] == f"location {location} {{"
    assert finding.lines[1] == f"    proxy_pass {proxy_pass.format(PREFIX)};"


@pytest.mark.parametrize(
    ("module", "location", "proxy_pass"),
    [
        ({}, "/", "http://127.0.0.1:7880"),
        ({"livekit_internal_url": "http://10.0.0.2:7880"}, "/rtc", "http://10.0.0.2:7880"),
        ({"livekit_url": "wss://sfu.test/livekit"}, "/livekit/", "http://127.0.0.1:7880/"),
        (
            {
                "livekit_url": "wss://sfu.test/livekit",
                "livekit_internal_url": "http://10.0.0.2:7880",
            },
            "/livekit/rtc",
            "http://10.0.0.2:7880/rtc",
        ),
    ],
)
def test_lines_for_livekits_proxy_forward_to_livekit_and_not_to_the_proxy(
    module: dict[str, Any], location: str, proxy_pass: str
) -> None:
    finding = public(make_setup(module), Stub(Answer(404, [], b""))).check_livekit_url("room")
    assert finding.lines[0] == f"location {location} {{"
    assert finding.lines[1] == f"    proxy_pass {proxy_pass};"


# .well-known/matrix/client

FETCHED = {
    "m.homeserver": {"base_url": "https://other.test/"},
    "m.identity_server": {"base_url": "https://vector.im"},
    "io.element.e2ee": {"default": True, "text": 'it\'s $5 \\ "quoted" é'},
    "org.matrix.msc2965.authentication": {"issuer": "https://mas.test/"},
    "org.matrix.msc4143.rtc_foci": [
        {"type": "livekit", "livekit_service_url": "https://old.test/livekit/jwt"},
        {"type": "full_mesh"},
    ],
}
OURS = {"type": "livekit", "livekit_service_url": f"https://matrix.test{PREFIX}"}


def served(content: Any) -> Stub:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = [("Access-Control-Allow-Origin", "*"), ("Content-Type", "application/json")]
    return Stub(Answer(200, headers, body))


def unquoted_by_nginx(line: str) -> str:
    """What nginx sends for `return 200 '…';`."""
    text = line.strip().removeprefix("return 200 '").removesuffix("';")
    assert "$" not in text
    assert "'" not in text
    return text.replace("\\\\", "\\")


def test_well_known_of_an_old_service_lines_keep_every_other_entry() -> None:
    finding = WellKnown(served(FETCHED), make_setup()).check(Probe({}), None)
    assert "names https://old.test/livekit/jwt" in finding.text
    (line,) = (line for line in finding.lines if "return 200" in line)
    merged = json.loads(unquoted_by_nginx(line))
    foci = merged.pop("org.matrix.msc4143.rtc_foci")
    assert foci == [OURS, {"type": "full_mesh"}]
    assert merged == {k: v for k, v in FETCHED.items() if not k.endswith("foci")}


def test_well_known_that_is_too_large_only_the_entry_is_printed() -> None:
    finding = WellKnown(served({"large": "x" * 5000}), make_setup()).check(Probe({}), None)
    (line,) = finding.lines
    assert json.loads(f"{{{line}}}") == {"org.matrix.msc4143.rtc_foci": [OURS]}


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b'{"m.homeserver": {},\n"a" 1}', "is not valid JSON (line 2, column 5)"),
        (b"[]", "is not valid JSON: it is not an object"),
        (b"\xff\xfe\xfd", "is not valid JSON"),
    ],
)
def test_well_known_that_is_broken_names_the_place_and_the_entry_only(
    body: bytes, place: str
) -> None:
    finding = WellKnown(served(body), make_setup()).check(Probe({}), None)
    assert place in finding.text
    (line,) = finding.lines
    assert json.loads(f"{{{line}}}") == {"org.matrix.msc4143.rtc_foci": [OURS]}


def test_well_known_of_another_base_url_proposes_public_baseurl_and_no_lines_for_nginx() -> None:
    content = {**FETCHED, "org.matrix.msc4143.rtc_foci": [OURS]}
    finding = WellKnown(served(content), make_setup()).check(Probe({}), None)
    assert finding.verdict.value == "warning"
    assert finding.lines == ("public_baseurl: https://other.test/",)


@pytest.mark.parametrize(
    "url", ["https://a.test/\nlivekit_key: x", "javascript:x", 7, None, "https://a b/", ""]
)
def test_well_known_base_url_that_is_no_plain_url_is_not_printed(url: Any) -> None:
    probe = served({"m.homeserver": {"base_url": url}})
    assert WellKnown(probe, make_setup()).base_url() is None


def test_public_baseurl_unset_is_proposed_from_the_well_known() -> None:
    setup = make_setup(has_public_baseurl=False, base_url="https://other.test/")
    (finding,) = (f for f in settings.check(setup) if f.check == "public_baseurl")
    assert finding.lines == ("public_baseurl: https://other.test/",)


# Settings


def found(check: str, setup: Setup) -> list[tuple[str, str]]:
    return [(f.verdict.value, f.text) for f in settings.check(setup) if f.check == check]


def test_whitelist_without_a_listed_server_keeps_its_entries() -> None:
    setup = make_setup(
        {"full_access_homeservers": ["a.org", "b.org"]}, whitelist=frozenset({"a.org", "c.org"})
    )
    (finding,) = (f for f in settings.check(setup) if f.check == "federation")
    assert "b.org" in finding.text
    assert "a.org" not in finding.text
    assert finding.lines[1:] == ("  - a.org", "  - c.org", "  - b.org")


@pytest.mark.parametrize(("instance", "verdict"), [(MAIN, "wrong"), ("background", "ok")])
def test_federation_listener_is_needed_by_the_main_process_only(
    instance: str, verdict: str
) -> None:
    setup = make_setup({"full_access_homeservers": ["a.org"]}, listeners=(), instance=instance)
    assert [v for v, _ in found("federation", setup)] == [verdict]


@pytest.mark.parametrize(("ms", "verdict"), [(86_400, "wrong"), (3_600_000, "ok")])
def test_delay_shorter_than_an_hour_is_wrong(ms: int, verdict: str) -> None:
    ((found_verdict, text),) = found("delayed events", make_setup(max_event_delay_ms=ms))
    assert found_verdict == verdict
    assert verdict == "ok" or "a bare number counts milliseconds" in text


@pytest.mark.parametrize(
    ("file_of", "lines"),
    [
        ({}, ("experimental_features:", "  msc4222_enabled: true")),
        ({"experimental_features": "homeserver.yaml"}, ("  msc4222_enabled: true",)),
    ],
)
def test_msc4222_off_is_a_warning_whose_lines_keep_other_features(
    file_of: dict[str, str], lines: tuple[str, ...]
) -> None:
    setup = make_setup(has_msc4222=False, file_of=file_of)
    (finding,) = (f for f in settings.check(setup) if f.check == "MSC4222")
    assert finding.verdict.value == "warning"
    assert finding.lines == lines


def test_transports_of_another_service_lines_keep_other_kinds() -> None:
    old = {"type": "livekit", "livekit_service_url": "https://old.test"}
    other = {"type": "other", "url": "https://a.test"}
    (finding,) = (
        f
        for f in settings.check(make_setup(transports=[old, other]))
        if f.check == "rtc/transports"
    )
    assert yaml.safe_load("\n".join(finding.lines)) == {"matrix_rtc": {"transports": [other]}}


def test_entry_that_is_no_server_name_lines_keep_the_others() -> None:
    setup = make_setup({"full_access_homeservers": ["a.org", "b.org:"]})
    finding = next(f for f in settings.check(setup) if f.check == "full access")
    assert finding.lines == ("full_access_homeservers: ['a.org']",)


@pytest.mark.parametrize(
    ("listener", "base", "is_found"),
    [
        (Listener("http://127.0.0.1:8008", ("client",), False), "https://m.test", True),
        (Listener("http://127.0.0.1:8008", ("client",), True), "https://m.test", False),
        (Listener("https://127.0.0.1:8008", ("client",), False), "https://m.test", False),
        (Listener("http://127.0.0.1:9000", ("metrics",), False), "https://m.test", False),
        (Listener("http://127.0.0.1:8008", ("client",), False), "http://127.0.0.1", False),
    ],
)
def test_x_forwarded_off_behind_a_proxy_is_a_warning(
    listener: Listener, base: str, is_found: bool
) -> None:
    setup = make_setup(listeners=(listener,), public_baseurl=base)
    assert [v for v, _ in found("x_forwarded", setup)] == ["warning"] * is_found


@pytest.mark.parametrize(
    "module",
    [
        {"livekit_key": "APIxxxx"},
        {"livekit_url": "wss://sfu.example.com"},
        {"livekit_internal_url": "http://livekit.example.org:7880"},
    ],
)
def test_placeholder_of_the_documentation_is_wrong(module: dict[str, str]) -> None:
    ((verdict, text),) = found("placeholders", make_setup(module))
    assert verdict == "wrong"
    assert next(iter(module.values())) in text


def test_placeholder_in_livekit_url_names_no_option_that_is_not_written() -> None:
    ((_, text),) = found("placeholders", make_setup({"livekit_url": "wss://sfu.example.com"}))
    assert "livekit_internal_url" not in text


def test_placeholders_in_several_options_are_all_named() -> None:
    module = {
        "livekit_key": "APIxxxx",
        "livekit_url": "wss://sfu.example.com",
        "livekit_internal_url": "http://livekit.example.com:7880",
    }
    ((_, text),) = found("placeholders", make_setup(module))
    assert [value for value in module.values() if value not in text] == []


@pytest.mark.parametrize(("mode", "is_found"), [(0o644, True), (0o640, False), (0o600, False)])
def test_secret_file_that_every_user_can_read_is_a_warning(
    mode: int, is_found: bool, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    file.write_text(SECRET)
    file.chmod(mode)
    setup = make_setup(credentials=Credentials("livekit_secret_path", (str(file),)))
    findings = [f for f in settings.check(setup) if f.check == "secret file"]
    assert [f.lines for f in findings] == [(f"chmod o= {file}",)] * is_found


def test_option_that_is_there_twice_is_wrong() -> None:
    setup = make_setup(duplicate_options={"homeserver.yaml": ["modules"]})
    ((verdict, text),) = found("options", setup)
    assert verdict == "wrong"
    assert text.startswith("modules is set more than once")


def test_full_access_list_with_the_own_server_is_ok() -> None:
    setup = make_setup({"full_access_homeservers": ["EXAMPLE.com", "a.org"]})
    assert found("full access", setup) == [("ok", "your users and those of a.org may start calls")]


def test_rate_limit_lines_keep_what_is_high_enough() -> None:
    setup = make_setup(rc_message=RatelimitSettings("rc_message", 0.2, 500))
    (finding,) = (f for f in settings.check(setup) if f.check == "rate limits")
    assert finding.lines == ("rc_message:", "  per_second: 0.5", "  burst_count: 500")


# LiveKit


@pytest.mark.parametrize(
    ("credentials", "file", "line"),
    [
        (Credentials("livekit_secret"), "homeserver.yaml, below", "livekit_secret: …    # the"),
        (Credentials("LIVEKIT_SECRET"), "the environment of Synapse", "LIVEKIT_SECRET=…    #"),
        (Credentials("livekit_secret_path", ("/my/secret",)), "/my/secret (", "# the secret below"),
        (Credentials("livekit_key_file", ("/my/keys",)), "/my/keys (", "# APIkey: and the secret"),
    ],
)
def test_wrong_secret_names_the_place_it_was_read_from(
    credentials: Credentials, file: str, line: str
) -> None:
    setup = make_setup(credentials=credentials)
    probe = Stub(Answer(401, [], b"invalid token: eyJ"))
    checks = LiveKitChecks(setup, LiveKit(setup, lambda: 0), lambda: 0)
    finding = probe.run(checks.check())[0]
    assert "with another secret than livekit_secret" in finding.text
    assert str(finding.file).startswith(file)
    (shown,) = finding.lines
    assert shown.startswith(line)


@pytest.mark.parametrize("in_container", [True, False])
def test_livekit_at_loopback_in_a_container_names_the_containers_own_address(
    in_container: bool,
) -> None:
    setup = make_setup({"livekit_internal_url": "http://127.0.0.1:1"})
    checks = LiveKitChecks(setup, LiveKit(setup, lambda: 0), lambda: 0)
    with patch.object(livekit_checks, "is_container", return_value=in_container):
        finding = Probe({}).run(checks.check())[0]
    assert ("In a container" in finding.text) == in_container
    assert ("the name of LiveKit's container" in finding.lines[0]) == in_container


LINES = ("room:", "  auto_create: false")
HOOK = ("webhook:", "  api_key: APIkey", '  urls: ["http://a/b"]')


@pytest.mark.parametrize(
    ("content", "lines", "has_them"),
    [
        ({"room": {"auto_create": False, "max": 1}}, LINES, True),
        ({"room": {"auto_create": True}}, LINES, False),
        ({}, LINES, False),
        ({"room": 7}, LINES, False),
        ({"keys": {"APIkey": "s"}}, ("keys:", "  APIkey: …"), True),
        ({"keys": {"APIother": "s"}}, ("keys:", "  APIkey: …"), False),
        ({"webhook": {"api_key": "APIkey", "urls": ["http://x", "http://a/b"]}}, HOOK, True),
        ({"webhook": {"api_key": "APIkey", "urls": []}}, HOOK, False),
        ({"webhook": {"api_key": "APIkey"}}, HOOK, False),
    ],
)
def test_lines_that_livekits_file_has_become_a_restart(
    content: dict[str, Any], lines: tuple[str, ...], has_them: bool
) -> None:
    finding = wrong("webhooks", "do not arrive", LIVEKIT_YAML, *lines)
    (advised,) = LiveKitFile("/etc/livekit.yaml", content).advise([finding])
    if has_them:
        assert advised.lines[0].startswith("systemctl restart livekit")
        assert "already has the lines for this. Restart LiveKit" in advised.text
    else:
        assert advised.lines == lines
        assert advised.file == "/etc/livekit.yaml; then restart LiveKit"


# HTTP


@pytest.mark.parametrize(
    "url",
    ["https://h:abc/", "http://[::1/x", "http://a..b/", "http://h:99999/", "http://h/\u00fc"],
)
def test_probe_of_an_invalid_url_raises_no_answer(url: str) -> None:
    with pytest.raises(NoAnswer):
        Probe({}).send(Request("GET", url))


@pytest.fixture
def dripping() -> Iterator[str]:
    """A server that sends one byte of its headers every 50 ms, without end."""

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                while True:
                    connection.sendall(b"a")
                    time.sleep(0.05)
            except OSError:
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        thread.join()


def test_probe_of_a_server_that_never_ends_its_headers_ends_in_time(
    dripping: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_module, "TIMEOUT_SEC", 0.5)
    began = time.monotonic()
    with pytest.raises(NoAnswer, match="no answer within"):
        Probe({}).send(Request("GET", dripping))
    assert time.monotonic() - began < 2


def test_connect_to_is_read_with_ipv4_and_ipv6() -> None:
    assert _connect_to("example.com:443:10.0.0.1:8443") == (
        ("example.com", 443),
        ("10.0.0.1", 8443),
    )
    assert _connect_to("example.com:443:[::1]:8443") == (("example.com", 443), ("::1", 8443))


# The report


def test_report_of_several_findings_ends_with_a_summary() -> None:
    findings = [ok("a", "well"), warning("b", "worth it"), *skipped(["c", "d"], "a cause")]
    assert summary(findings) == "1 ok, 1 warning, 0 problems, 2 skipped"
    lines = as_text(findings, coloured=False).splitlines()
    assert lines[2:] == [
        "- c  skipped: a cause",
        "- d  skipped: a cause",
        "1 ok, 1 warning, 0 problems, 2 skipped",
    ]


def test_report_has_no_control_characters_of_other_servers() -> None:
    text = as_text([warning("a", "names \033[2J\r\n", "file", "x\x00y")], coloured=False)
    assert text.splitlines()[0] == "! a  names ?[2J??"
    assert "        x?y" in text.splitlines()


def test_quiet_report_has_problems_and_the_summary_only() -> None:
    findings = [ok("a", "well"), wrong("b", "bad", "file", "line"), *skipped(["c"], "a cause")]
    text = as_text(findings, coloured=False, quiet=True)
    assert text == "✘ b  bad\n1 ok, 0 warnings, 1 problem, 1 skipped"
    assert as_text([ok("a", "well")], coloured=False, quiet=True) == "1 ok, 0 warnings, 0 problems"


# The command line


def test_version_names_module_synapse_and_python(capsys: pytest.CaptureFixture[str]) -> None:
    from synapse_lk_jwt.__main__ import main

    with patch.object(sys, "argv", ["synapse-lk-jwt", "--version"]), pytest.raises(SystemExit):
        main()
    out = capsys.readouterr().out
    assert out.startswith("synapse-lk-jwt ")
    assert ", Synapse 1." in out
    assert ", Python 3." in out


def test_console_command_is_the_command_of_the_package() -> None:
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg")
    scripts = config["options.entry_points"]["console_scripts"].split()
    assert scripts == ["synapse-lk-jwt", "=", "synapse_lk_jwt.__main__:main"]
