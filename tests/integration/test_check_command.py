# SPDX-License-Identifier: Apache-2.0
"""The check command: its report on a clean set-up, its exit statuses, its output."""

import contextlib
import json
import os
import pty
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from synapse_lk_jwt import config as config_module
from synapse_lk_jwt.check import files, webhooks
from synapse_lk_jwt.check.command import main
from synapse_lk_jwt.check.public import CHECKS
from testbed.check import Checker
from testbed.public import Public
from testbed.sets import module_config, running
from testbed.synapse import Synapse

ALL = {
    "Synapse",
    "delayed events",
    "rate limits",
    "MSC4222",
    "public_baseurl",
    "rtc/transports",
    "routes",
    "full access",
    "LiveKit",
    "auto_create",
    "access rule",
    "processes",
    "settings",
    "livekit_url",
    "webhooks",
    "service",
    "preflight",
    "/versions",
    "/rtc/transports",
    "MSC4195",
    ".well-known",
}


def test_check_of_a_clean_setup_is_all_ok(public: Public) -> None:
    report = public.check.start()
    assert report.bad == {}, str(report)
    assert {finding.check for finding in report.findings} == ALL
    assert {finding.verdict for finding in report.findings} == {"ok"}, str(report)
    assert (report.status, report.errors) == (0, "")


# Output


@pytest.mark.parametrize(("env", "is_coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_report_on_a_terminal_has_colours_unless_no_color_is_set(
    env: dict[str, str], is_coloured: bool, public: Public
) -> None:
    name = public.check.write({"max_event_delay_duration": None})
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        public.check.command([name]),
        cwd=public.check.directory,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **env},
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    written = b""
    # On Linux a terminal whose other side has been closed is an error.
    with open(ours, "rb", buffering=0) as output, contextlib.suppress(OSError):
        while piece := output.read(65536):
            written += piece
    assert child.wait() == 1
    text = written.decode()
    public.check.assert_no_secret(text)
    assert ("\033[31m✘\033[0m delayed events" in text) == is_coloured
    assert ("\033[" in text) == is_coloured
    lines = text.splitlines()
    assert "    in changed.json:" in lines
    assert "        max_event_delay_duration: 24h" in lines
    assert re.fullmatch(r"\d+ ok, \d warnings?, \d problems?, \d skipped", lines[-1])


def test_quiet_report_of_a_clean_setup_is_one_line(public: Public) -> None:
    done = subprocess.run(
        public.check.command(["homeserver.json"], "--quiet"),
        cwd=public.check.directory,
        env=public.check.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0
    assert done.stdout == f"{len(ALL)} ok, 0 warnings, 0 problems\n"


def test_report_in_ascii_has_question_marks_for_signs(public: Public) -> None:
    done = subprocess.run(
        public.check.command(),
        cwd=public.check.directory,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == b""
    assert b"? Synapse " in done.stdout
    assert b"\033[" not in done.stdout
    public.check.assert_no_secret(done.stdout.decode())


# Configurations that cannot be checked


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "'broken.yaml' cannot be read (No such file or directory)"),
        (b"", "Missing mandatory `server_name`"),
        (b"a: [", "'broken.yaml' is not YAML"),
        (
            b"a: 1\nb: *\n",
            "'broken.yaml' is not YAML: see line 2. A value that begins with *",
        ),
        (
            b"b: *c",
            "'broken.yaml' is not YAML: see line 1. A value that begins with *",
        ),
        (b"livekit_secret: *abcdefgh", "'broken.yaml' is not YAML"),
        (b"\xff\xfe\x00", "'broken.yaml' is not YAML"),
        (b"a: \x07", "'broken.yaml' is not YAML"),
        (b"[1, 2]", "Missing mandatory `server_name`"),
        (b"text", "Missing mandatory `server_name`"),
    ],
)
def test_file_that_is_no_configuration_is_named(
    content: bytes | None, text: str, public: Public
) -> None:
    path = public.check.directory / "broken.yaml"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    report = public.check.run_on(["broken.yaml"])
    assert (report.status, report.findings) == (2, [])
    assert "Cannot check: " in report.errors
    assert text in report.errors
    assert "abcdefgh" not in report.errors


def test_file_that_this_user_may_not_read_names_the_user(
    public: Public, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise PermissionError(13, "Permission denied", name)

    # Tests that run as root may read everything.
    monkeypatch.setattr(files, "open", refuse, raising=False)
    report = public.check.run()
    assert (report.status, report.findings) == (2, [])
    assert "'homeserver.json' cannot be read (Permission denied)" in report.errors
    assert "This command runs as " in report.errors
    assert "Run it as Synapse's user" in report.errors


def test_directory_without_a_file_cannot_be_checked(public: Public) -> None:
    (public.check.directory / "conf.d").mkdir(exist_ok=True)
    report = public.check.run_on(["conf.d"])
    assert (report.status, report.findings) == (2, [])
    assert "Cannot check: no .yaml file in 'conf.d'" in report.errors


@pytest.mark.parametrize(
    "config",
    [
        {"server_name": "a b"},
        {"report_stats": None},
        {"listeners": "client"},
        {"listeners": [{"port": "x", "type": "http"}]},
        {"listeners": [7]},
        {"database": 7},
        {"max_event_delay_duration": "soon"},
        {"rc_message": 7},
        {"instance_map": [1]},
        {"instance_map": {"worker": {"host": 1}}},
        {"signing_key_path": "/does/not/exist"},
        {"modules": 7},
        {"modules": "text"},
        {"modules": {"module": 1}},
        {
            "app_service_config_files": ["/does/not/exist"],
            "experimental_features": {"msc4512_enabled": True},
        },
        {"experimental_features": 7},
    ],
)
def test_configuration_that_synapse_rejects_causes_no_traceback(
    config: dict[str, Any], public: Public
) -> None:
    report = public.check.run(config=config)
    # Older Synapses do not read all of these options.
    assert report.status in (0, 1, 2), str(report)
    assert (report.status == 2) == ("Cannot check: " in report.errors), str(report)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "COMMAND"),
        (["check"], "-c"),
        (["check", "-c", "x", "--as", "@a:b"], "--as and --room must be used together"),
        (["check", "-c", "x", "--room", "!a"], "--as and --room must be used together"),
        (
            ["check", "-c", "x", "--as", "alice", "--room", "!a"],
            "needs a user ID such as",
        ),
        (["check", "-c", "x", "--as", "@a:b", "--room", "#a:b"], "which begins with '!'"),
        (["check", "-c", "x", "--connect-to", "a:b"], "must be HOST:PORT:ADDRESS:PORT"),
        (["check", "-c", "x", "--nonsense"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_are_rejected_with_2(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as e:
        main(arguments)
    assert e.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("worker", "text"),
    [
        ({"host": "127.0.0.1", "port": 1}, "http://127.0.0.1:1: the connection is refused"),
        ({"host": "127.0.0.1", "port": 1, "tls": True}, "https://127.0.0.1:1: the connection is"),
        ({"host": "::1", "port": 1}, "http://[::1]:1: the connection"),
        ({"host": "worker.invalid", "port": 1}, "http://worker.invalid:1: its name cannot be"),
        ({"path": "/does/not/exist.sock"}, "the connection broke (No such file or directory)"),
    ],
)
def test_worker_that_does_not_answer_is_a_warning_with_the_cause(
    worker: dict[str, Any], text: str, public: Public
) -> None:
    report = public.check.run(config={"instance_map": {"worker": worker}})
    finding = report.the("warning", "processes")
    assert finding.text.startswith("worker does not answer at http")
    assert text in finding.text
    assert report.bad == {"processes": "warning"}, str(report)


# The module's own block


def test_mistakes_in_the_block_are_all_named(public: Public) -> None:
    report = public.check.run(module={"livekit_url": "ftp://x", "full_acess_homeservers": []})
    (finding,) = report.findings
    assert (report.status, finding.verdict, finding.check) == (1, "wrong", "module")
    assert finding.file == "changed.json"
    assert "livekit_url: must start with wss://" in finding.text
    assert "full_acess_homeservers: is not an option of this module" in finding.text


@pytest.mark.parametrize("modules", [None, [], [{"module": "elsewhere.Module", "config": {}}]])
def test_configuration_without_the_module_prints_the_block(modules: Any, public: Public) -> None:
    report = public.check.run(config={"modules": modules})
    (finding,) = report.findings
    assert (report.status, finding.verdict, finding.check) == (1, "wrong", "module")
    # An existing list is not to be replaced by a second one.
    pasted = yaml.safe_load("\n".join(finding.lines))
    (block,) = pasted if modules else pasted["modules"]
    assert block["module"] == "synapse_lk_jwt.LiveKitJwtModule"
    assert set(block["config"]) == {"livekit_url", "livekit_key", "livekit_secret_path"}


@pytest.mark.parametrize(
    "block",
    [
        {"module": "synapse_lk_jwt.LiveKitJwtModul", "config": {}},
        {"module": "synapse_lk_jwt.LiveKitJwtModule"},
        {"module": "synapse_lk_jwt.LiveKitJwtModule", "config": None},
        {"module": "synapse_lk_jwt.LiveKitJwtModule", "config": "text"},
        {"module": "synapse_lk_jwt.LiveKitJwtModule", "config": [1]},
        {"module": ["synapse_lk_jwt.LiveKitJwtModule"]},
        {"module": None},
        7,
        None,
    ],
)
def test_block_that_is_none_causes_no_traceback(block: Any, public: Public) -> None:
    report = public.check.run(config={"modules": [block]})
    assert report.status in (1, 2), str(report)
    assert (report.status == 2) == ("Cannot check: " in report.errors), str(report)


@pytest.mark.parametrize(
    "name",
    [
        "synapse-lk-jwt.LiveKitJwtModule",
        "synapse_lk_jwt.LivekitJWTModule",
        "synapse_lk_jwt.livekitjwtmodule",
        "synapse_lk_jwt",
    ],
)
def test_module_under_another_spelling_names_the_right_one(name: str, public: Public) -> None:
    report = public.check.run(config={"modules": [{"module": name, "config": {}}]})
    (finding,) = report.findings
    assert f"no module has the name {name!r}" in finding.text
    assert finding.lines == ["  - module: synapse_lk_jwt.LiveKitJwtModule"]


def test_options_beside_config_are_reported_one_level_too_high(public: Public) -> None:
    block = {"module": "synapse_lk_jwt.LiveKitJwtModule", "livekit_url": "wss://a.b", "config": {}}
    report = public.check.run(config={"modules": [block]})
    (finding,) = report.findings
    assert "livekit_url must be below 'config:'" in finding.text


def test_block_without_config_says_where_variables_are_read_from(public: Public) -> None:
    block = {"module": "synapse_lk_jwt.LiveKitJwtModule"}
    report = public.check.run(config={"modules": [block]})
    (finding,) = report.findings
    assert "This command reads LIVEKIT_* variables from this shell" in finding.text


def test_secret_file_that_this_user_may_not_read_names_the_user(
    public: Public, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, *_args: Any, **_kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(config_module, "open", refuse, raising=False)
    secret = str(tmp_path / "secret")
    report = public.check.run(module={"livekit_secret": None, "livekit_secret_path": secret})
    (finding,) = report.findings
    assert f"{secret!r} (Permission denied)" in finding.text
    assert "Run it as Synapse's user" in finding.text


@pytest.mark.parametrize(
    ("config", "check", "pasted"),
    [
        (
            {"matrix_rtc": {"transports": None}},
            "rtc/transports",
            {"matrix_rtc": {"transports": []}},
        ),
        (
            {"extra_well_known_client_content": None},
            ".well-known",
            {"extra_well_known_client_content": {}},
        ),
    ],
)
def test_list_left_empty_says_that_synapse_does_not_start_and_what_to_write(
    config: dict[str, Any], check: str, pasted: dict[str, Any], public: Public
) -> None:
    content = json.loads((public.check.directory / "homeserver.json").read_text())
    (public.check.directory / "empty.json").write_text(json.dumps({**content, **config}))
    (finding,) = public.check.run_on(["empty.json"]).findings
    assert (finding.verdict, finding.check) == ("wrong", check)
    assert "Synapse does not start" in finding.text
    assert finding.pasted == pasted
    assert public.check.run(config=finding.pasted).bad == {}


def test_option_that_synapse_rejects_is_printed_with_its_message(public: Public) -> None:
    report = public.check.run(config={"max_event_delay_duration": -1})
    assert report.status == 2
    assert report.errors.startswith("Cannot check: Synapse does not start")
    assert "must be a positive value" in report.errors


def test_second_list_of_modules_is_wrong(public: Public) -> None:
    content = json.loads((public.check.directory / "homeserver.json").read_text())
    modules = content.pop("modules")
    first = yaml.safe_dump({"modules": [{"module": "elsewhere.Module"}]})
    text = first + yaml.safe_dump(content) + yaml.safe_dump({"modules": modules})
    (public.check.directory / "twice.yaml").write_text(text)
    report = public.check.run_on(["twice.yaml"])
    finding = report.the("wrong", "options")
    assert finding.text.startswith("modules is set more than once")
    assert finding.file == "twice.yaml"
    assert report.status == 1


# Several files


def test_several_files_and_a_directory_are_read_as_synapse_does(public: Public) -> None:
    content = json.loads((public.check.directory / "homeserver.json").read_text())
    modules, limit = content.pop("modules"), content.pop("max_event_delay_duration")
    (public.check.directory / "first.yaml").write_text(yaml.safe_dump(content))
    directory = public.check.directory / "more.d"
    directory.mkdir()
    (directory / "10-modules.yaml").write_text(yaml.safe_dump({"modules": modules}))
    (directory / "20-calls.yaml").write_text(yaml.safe_dump({"max_event_delay_duration": limit}))
    (directory / "ignored.txt").write_text("a: [")
    report = public.check.run_on(["first.yaml", "more.d"])
    assert report.bad == {}, str(report)
    # Synapse prints which files it ignores.
    assert "ignored.txt" in report.errors

    report = public.check.run_on(["first.yaml"])
    assert report.the("wrong", "module").file == "first.yaml"
    (directory / "15-again.yaml").write_text(yaml.safe_dump({"modules": modules}))
    report = public.check.run_on(["first.yaml", "more.d"])
    assert report.the("wrong", "options").file == "more.d/15-again.yaml"
    (directory / "15-again.yaml").unlink()
    calls = {"max_event_delay_duration": None, "rc_message": {"per_second": 0.1}}
    (directory / "20-calls.yaml").write_text(yaml.safe_dump(calls))
    report = public.check.run_on(["first.yaml", "more.d"], "--connect-to", "a:1:b:2")
    for verdict, check in (("wrong", "delayed events"), ("warning", "rate limits")):
        assert report.the(verdict, check).file == "more.d/20-calls.yaml"


# Synapse does not run, or listens elsewhere


def test_synapse_that_does_not_run_is_one_problem(public: Public) -> None:
    port = int(public.synapse.client_url.rpartition(":")[2])
    listener = {"port": 1, "type": "http", "resources": [{"names": ["client", "federation"]}]}
    config = {"listeners": [listener], "max_event_delay_duration": None}
    report = public.check.run(config=config)
    assert report.bad == {
        "delayed events": "wrong",
        "processes": "wrong",
        "x_forwarded": "warning",
    }
    text = report.the("wrong", "processes").text
    assert text == "Synapse is not answering on any listener. Is it running?"
    assert report.skipped == {*CHECKS, "webhooks", ".well-known"}
    silent = report.the("warning", "processes").text
    assert (
        "the main process does not answer at http://127.0.0.1:1: the connection is refused"
        in silent
    )
    assert str(port) not in silent
    assert report.the("ok", "LiveKit")
    assert report.the("ok", "auto_create")
    assert report.the("ok", "livekit_url")


def test_listener_with_tls_is_queried_without_verifying_it(
    public: Public, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "WEBHOOK_SEC", 1)
    content = json.loads((public.check.directory / "homeserver.json").read_text())
    (listener,) = (each for each in content["listeners"] if each["tls"])
    # This run does not trust its certificate, which outside of tests is for another name.
    report = Checker(public.synapse).run(config={"listeners": [listener]})
    assert report.the("ok", "processes")
    assert report.the("ok", "webhooks")
    assert "its certificate is not valid" in report.the("wrong", "service").text


def test_listener_on_a_unix_socket_is_queried(
    public: Public, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # LiveKit sends its webhooks to another homeserver.
    monkeypatch.setattr(webhooks, "WEBHOOK_SEC", 0)
    synapse = Synapse("u", tmp_path, module_config(public.livekit))
    port = int(synapse.client_url.rpartition(":")[2])
    resources = [{"names": ["client"]}]
    socket = {"path": str(tmp_path / "s.sock"), "type": "http", "resources": resources}
    tcp = {"port": port, "type": "http", "resources": resources}
    synapse.extra_config = {"listeners": [socket, tcp]}
    checker = Checker(synapse)
    with running(synapse):
        report = checker.run(config={"listeners": [socket]})
        assert report.the("ok", "processes")
        assert report.the("ok", "service")
        alice = synapse.register("alice")
        options = ("--as", alice.user_id, "--room", alice.create_room())
        checker.write({"listeners": [socket]})
        assert checker.run_on(["changed.json"], *options).the("ok", "LiveKit")
    report = checker.run(config={"listeners": [socket]})
    assert "not answering on any listener" in report.the("wrong", "processes").text
    (tmp_path / "s.sock").unlink(missing_ok=True)
    report = checker.run(config={"listeners": [socket]})
    assert "the connection broke (No such file or directory)" in (
        report.the("warning", "processes").text
    )
