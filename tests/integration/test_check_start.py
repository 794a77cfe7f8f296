# SPDX-License-Identifier: Apache-2.0
"""Problems that both the log at start and the check command report."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from livekit import api

from synapse_lk_jwt.check import webhooks
from synapse_lk_jwt.livekit.tokens import MUST_NOT_CREATE
from testbed.check import Checker
from testbed.livekit import LiveKit
from testbed.nginx import UPGRADE, Servers, proxy
from testbed.process import wait_until
from testbed.service import PREFIX
from testbed.sets import module_config, running
from testbed.synapse import MODULE, Synapse

# Another module that serves our path.
SQUATTER = f"""
from twisted.web.resource import Resource

class Module:
    def __init__(self, config, api):
        api.register_web_resource({PREFIX!r}, Resource())

    @staticmethod
    def parse_config(config):
        return config
"""

# Another module, which removes the registry of servlets from Synapse.
OLD_SYNAPSE = """
import builtins
import synapse.rest

# Synapse itself still finds it.
builtins.SERVLET_GROUPS = synapse.rest.SERVLET_GROUPS
del synapse.rest.SERVLET_GROUPS

class Module:
    def __init__(self, config, api):
        pass

    @staticmethod
    def parse_config(config):
        return config
"""


@pytest.fixture(scope="module")
def livekit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveKit]:
    livekit = LiveKit(tmp_path_factory.mktemp("livekit"))
    with running(livekit):
        yield livekit


@pytest.fixture
def synapse(livekit: LiveKit, tmp_path: Path) -> Iterator[Synapse]:
    """A Synapse that finds the modules in `tmp_path`, for tests to start."""
    paths = [str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    synapse = Synapse("s", tmp_path, module_config(livekit), env=env)
    try:
        yield synapse
    finally:
        synapse.stop()


def modules(synapse: Synapse, *blocks: str) -> None:
    """Starts a Synapse with some modules; an empty name stands for this one."""
    ours = {"module": MODULE, "config": synapse.module_config}
    synapse.extra_config["modules"] = [
        {"module": block, "config": {}} if block else ours for block in blocks
    ]
    synapse.start()
    synapse.wait_ready()


def line(synapse: Synapse, text: str) -> str:
    """The one line of the log with a text, which ends in the command to run."""
    (found,) = (line for line in synapse.log_text().splitlines() if text in line)
    assert found.endswith(f"check -c {synapse.directory / 'homeserver.json'}'"), found
    return found


def test_path_of_another_module_is_reported(synapse: Synapse, tmp_path: Path) -> None:
    (tmp_path / "squatter.py").write_text(SQUATTER)
    modules(synapse, "squatter.Module", "")
    assert " - ERROR - " in line(synapse, f"Another module serves {PREFIX}")
    report = Checker(synapse, env=synapse.env).start()
    finding = report.the("wrong", "processes")
    assert "has not loaded the module, or another module serves" in finding.text
    assert PREFIX in finding.text
    assert report.status == 1


def test_module_listed_twice_is_reported(synapse: Synapse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "WEBHOOK_SEC", 0)
    modules(synapse, "", "")
    assert line(synapse, "homeserver.yaml lists this module twice")
    report = Checker(synapse).run()
    finding = report.the("wrong", "routes")
    assert "the module is listed 2 times" in finding.text
    assert finding.file == "homeserver.json"
    assert report.status == 1


def test_application_service_that_claims_the_paths_is_reported(
    synapse: Synapse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "WEBHOOK_SEC", 0)
    registration: dict[str, Any] = {
        "id": "livekit",
        "url": None,
        "as_token": "the-as_token-which-is-secret",
        "hs_token": "the-hs_token-which-is-secret",
        "sender_localpart": "livekit",
        "namespaces": {},
        "io.element.msc4512.proxy_prefix": "rtc/livekit",
        "io.element.msc4512.proxy_url": "http://127.0.0.1:1",
    }
    file = tmp_path / "registration.yaml"
    file.write_text(json.dumps(registration))
    synapse.extra_config["app_service_config_files"] = [str(file)]
    synapse.extra_config["experimental_features"] = {"msc4512_enabled": True}
    modules(synapse, "")
    assert line(synapse, "the application service 'livekit' claims rtc/livekit")
    report = Checker(synapse).run()
    in_files, in_synapse = report.all("wrong", "routes")
    assert "an application service claims 'rtc/livekit' (MSC4512)" in in_files.text
    assert in_files.file == str(file)
    assert "MSC4195's homeserver endpoints are not served" in in_synapse.text
    # The module is loaded.
    assert not report.all("wrong", "MSC4195")
    assert "is-secret" not in str(report)


def test_synapse_without_a_hook_is_reported(synapse: Synapse, tmp_path: Path) -> None:
    (tmp_path / "old_synapse.py").write_text(OLD_SYNAPSE)
    # Without a LiveKit the check does not wait for its webhooks.
    synapse.module_config = {**(synapse.module_config or {}), "livekit_url": "ws://127.0.0.1:1"}
    modules(synapse, "old_synapse.Module", "")
    assert line(synapse, "this Synapse has no registry of servlets")
    report = Checker(synapse, env=synapse.env).start()
    finding = report.the("wrong", "Synapse")
    assert "this Synapse lacks synapse.rest.SERVLET_GROUPS" in finding.text
    assert "pip install --upgrade" in finding.lines[0]
    assert "this Synapse lacks what they need" in report.the("wrong", "routes").text
    assert not report.all("wrong", "MSC4195")


# LiveKit


def test_auto_create_is_logged_and_the_check_at_start_creates_no_room(
    synapse: Synapse, tmp_path: Path
) -> None:
    open_to_all = LiveKit(tmp_path, auto_create=True)
    open_to_all.webhook_urls = [f"{synapse.client_url}{PREFIX}/sfu_webhook"]
    synapse.module_config = module_config(open_to_all)
    with running(open_to_all):
        synapse.start()
        synapse.wait_ready()
        wait_until(lambda: "auto_create: is on" in synapse.log_text(), "line in the log")
        assert " - WARNING - " in line(synapse, "auto_create: is on")
        assert "access rule" not in synapse.log_text()
        assert open_to_all.rooms() == []
        # LiveKit sends webhooks at once, also for rooms that no longer exist.
        assert "sfu_webhook" not in synapse.log_text()
        open_to_all.ask("CreateRoom", {"name": "other"}, api.VideoGrants(room_create=True))
        wait_until(lambda: "sfu_webhook" in synapse.log_text(), "webhook")
        assert synapse.log_text().count('200 "POST /_synapse/client/livekit/jwt/sfu_webhook') == 1


def test_livekit_that_does_not_enforce_the_list_is_logged_at_start(
    synapse: Synapse, tmp_path: Path
) -> None:
    old = LiveKit(tmp_path, extra_config={"room": {"room_configurations": {MUST_NOT_CREATE: {}}}})
    synapse.module_config = module_config(old)
    with running(old):
        synapse.start()
        synapse.wait_ready()
        wait_until(lambda: "access rule: is not enforced" in synapse.log_text(), "line in the log")
        found = line(synapse, "access rule: is not enforced")
        assert " - ERROR - " in found
        assert "LiveKit 1.8.2 and newer" in found
        assert "full_access_homeservers has no effect" in found
        assert old.rooms() == []


def test_livekit_that_does_not_enforce_the_list_at_rtc_is_logged_at_start(
    synapse: Synapse, tmp_path: Path
) -> None:
    room = {"auto_create": True, "room_configurations": {MUST_NOT_CREATE: {}}}
    old = LiveKit(tmp_path, extra_config={"room": room})
    block = proxy(old.api_url, "/", *UPGRADE) + "location /whip { return 404; }"
    front = Servers(tmp_path, {"livekit": block}, synapse.directory)
    synapse.env["SSL_CERT_FILE"] = str(synapse.directory / "tls.crt")
    synapse.module_config = module_config(old, livekit_internal_url=front.url("livekit"))
    with running(old, front):
        synapse.start()
        synapse.wait_ready()
        wait_until(lambda: "access rule: is not enforced" in synapse.log_text(), "line in the log")
        assert "created a room at /rtc" in line(synapse, "access rule: is not enforced")
        assert old.rooms() == []


def test_livekit_that_hangs_does_not_delay_the_start(synapse: Synapse, livekit: LiveKit) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        synapse.module_config = module_config(livekit, livekit_internal_url=url)
        synapse.start()
        synapse.wait_ready()
        listener.settimeout(5)
        connection, _ = listener.accept()
        with connection:
            # From here on the check waits for an answer of LiveKit.
            assert synapse.register("alice").whoami().status == 200
            assert f"Serving LiveKit access tokens at {synapse.client_url}" in synapse.log_text()
            assert "cannot be used" not in synapse.log_text()
