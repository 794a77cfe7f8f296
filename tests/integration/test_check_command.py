# SPDX-License-Identifier: Apache-2.0
"""The check command itself: what a clean set-up says, exit statuses, and how it is written."""

import contextlib
import json
import os
import pty
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from synapse_lk_jwt.check import running as running_checks
from synapse_lk_jwt.check import setup
from synapse_lk_jwt.check.command import main
from testbed.check import Checker
from testbed.public import Public
from testbed.sets import module_config, running
from testbed.synapse import Synapse

ALL = {
    "Synapse",
    "delayed events",
    "rate limits",
    "public_baseurl",
    "rtc/transports",
    "routes",
    "full access",
    "LiveKit",
    "auto_create",
    "access rule",
    "processes",
    "livekit_url",
    "webhooks",
    "service",
    "preflight",
    "/versions",
    "MSC4195",
    ".well-known",
}


def test_a_clean_setup(public: Public) -> None:
    report = public.check.start()
    assert report.bad == {}, str(report)
    assert {finding.check for finding in report.findings} == ALL
    assert (report.status, report.errors) == (0, "")


# For people


@pytest.mark.parametrize(("env", "is_coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_a_terminal(env: dict[str, str], is_coloured: bool, public: Public) -> None:
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
    public.check.say_no_secret(text)
    assert ("\033[31m✘\033[0m delayed events" in text) == is_coloured
    assert ("\033[" in text) == is_coloured
    lines = text.splitlines()
    assert "    in changed.json:" in lines
    assert "        max_event_delay_duration: 24h" in lines


def test_no_terminal_and_no_ticks(public: Public) -> None:
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
    public.check.say_no_secret(done.stdout.decode())


# What cannot be checked


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "'broken.yaml' cannot be read (No such file or directory)"),
        (b"", "Missing mandatory `server_name`"),
        (b"a: [", "'broken.yaml' is not YAML"),
        (b"livekit_secret: *abcdefgh", "'broken.yaml' is not YAML"),
        (b"\xff\xfe\x00", "'broken.yaml' is not YAML"),
        (b"a: \x07", "'broken.yaml' is not YAML"),
        (b"[1, 2]", "Missing mandatory `server_name`"),
        (b"text", "Missing mandatory `server_name`"),
    ],
)
def test_files_that_are_no_configuration(content: bytes | None, text: str, public: Public) -> None:
    path = public.check.directory / "broken.yaml"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    report = public.check.run_on(["broken.yaml"])
    assert (report.status, report.findings) == (2, [])
    assert "Cannot check: " in report.errors
    assert text in report.errors
    assert "abcdefgh" not in report.errors


def test_a_file_that_may_not_be_read(public: Public, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise PermissionError(13, "Permission denied", name)

    # Root, who may run the tests, reads everything.
    monkeypatch.setattr(setup, "open", refuse, raising=False)
    report = public.check.run()
    assert (report.status, report.findings) == (2, [])
    assert "'homeserver.json' cannot be read: run this as the user that Synapse" in report.errors


def test_a_directory_without_a_file(public: Public) -> None:
    (public.check.directory / "conf.d").mkdir(exist_ok=True)
    report = public.check.run_on(["conf.d"])
    assert (report.status, report.findings) == (2, [])


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
def test_what_synapse_refuses(config: dict[str, Any], public: Public) -> None:
    report = public.check.run(config=config)
    assert report.status in (1, 2), str(report)
    assert (report.status == 2) == ("Cannot check: " in report.errors), str(report)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "check"),
        (["check"], "-c"),
        (["check", "-c", "x", "--as", "@a:b"], "--as and --room belong together"),
        (["check", "-c", "x", "--room", "!a"], "--as and --room belong together"),
        (["check", "-c", "x", "--as", "alice", "--room", "!a"], "such as @alice:example.com"),
        (["check", "-c", "x", "--as", "@a:b", "--room", "#a:b"], "which begins with '!'"),
        (["check", "-c", "x", "--connect-to", "a:b"], "must be HOST:PORT:ADDRESS:PORT"),
        (["check", "-c", "x", "--nonsense"], "unrecognized arguments"),
    ],
)
def test_bad_arguments(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_workers_of_all_kinds(worker: dict[str, Any], text: str, public: Public) -> None:
    report = public.check.run(config={"instance_map": {"worker": worker}})
    finding = report.the("warning", "processes")
    assert finding.text.startswith("worker does not answer at http")
    assert text in finding.text
    assert report.bad == {"processes": "warning"}, str(report)


# The module's own block


def test_a_mistake_in_the_block(public: Public) -> None:
    report = public.check.run(module={"livekit_url": "ftp://x", "full_acess_homeservers": []})
    (finding,) = report.findings
    assert (report.status, finding.verdict, finding.check) == (1, "wrong", "module")
    assert finding.file == "changed.json"
    assert "livekit_url: must start with wss://" in finding.text
    assert "full_acess_homeservers: is not an option of this module" in finding.text


@pytest.mark.parametrize("modules", [None, [], [{"module": "elsewhere.Module", "config": {}}]])
def test_the_module_is_not_in_the_configuration(modules: Any, public: Public) -> None:
    report = public.check.run(config={"modules": modules})
    (finding,) = report.findings
    assert (report.status, finding.verdict, finding.check) == (1, "wrong", "module")
    (block,) = finding.pasted["modules"]
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
def test_blocks_that_are_none(block: Any, public: Public) -> None:
    report = public.check.run(config={"modules": [block]})
    assert report.status in (1, 2), str(report)
    assert (report.status == 2) == ("Cannot check: " in report.errors), str(report)


# Several files


def test_several_files_and_a_directory(public: Public) -> None:
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
    # Synapse's word on files that it ignores.
    assert "ignored.txt" in report.errors

    report = public.check.run_on(["first.yaml"])
    assert report.the("wrong", "module").file == "first.yaml"
    calls = {"max_event_delay_duration": None, "rc_message": {"per_second": 0.1}}
    (directory / "20-calls.yaml").write_text(yaml.safe_dump(calls))
    report = public.check.run_on(["first.yaml", "more.d"], "--connect-to", "a:1:b:2")
    for verdict, check in (("wrong", "delayed events"), ("warning", "rate limits")):
        assert report.the(verdict, check).file == "more.d/20-calls.yaml"


# Synapse does not run, or listens elsewhere


def test_synapse_does_not_run(public: Public) -> None:
    port = int(public.synapse.client_url.rpartition(":")[2])
    listener = {"port": 1, "type": "http", "resources": [{"names": ["client", "federation"]}]}
    config = {"listeners": [listener], "max_event_delay_duration": None}
    report = public.check.run(config=config)
    assert report.bad == {"delayed events": "wrong", "processes": "wrong"}
    assert "none of Synapse's answers: is it running?" in report.the("wrong", "processes").text
    silent = report.the("warning", "processes").text
    assert (
        "the main process does not answer at http://127.0.0.1:1: the connection is refused"
        in silent
    )
    assert str(port) not in silent
    assert report.the("ok", "LiveKit")
    assert report.the("ok", "auto_create")


def test_a_listener_with_tls_alone(public: Public, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_checks, "WEBHOOK_SEC", 1)
    content = json.loads((public.check.directory / "homeserver.json").read_text())
    (listener,) = (each for each in content["listeners"] if each["tls"])
    # Nobody trusts its certificate here, which in life is for another name than this address.
    report = Checker(public.synapse).run(config={"listeners": [listener]})
    assert report.the("ok", "processes")
    assert report.the("ok", "webhooks")
    assert "its certificate is not valid" in report.the("wrong", "service").text


def test_a_listener_on_a_unix_socket(
    public: Public, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # LiveKit tells another homeserver.
    monkeypatch.setattr(running_checks, "WEBHOOK_SEC", 0)
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
        assert checker.run_on(["changed.json"], *options).the("ok", "SFU")
    report = checker.run(config={"listeners": [socket]})
    assert "none of Synapse's answers" in report.the("wrong", "processes").text
    (tmp_path / "s.sock").unlink(missing_ok=True)
    report = checker.run(config={"listeners": [socket]})
    assert "the connection broke (No such file or directory)" in (
        report.the("warning", "processes").text
    )
