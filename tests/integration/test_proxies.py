# SPDX-License-Identifier: Apache-2.0
"""A proxy between Synapse and LiveKit: a forward proxy, or a reverse proxy of LiveKit."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed import service
from testbed.check import Checker, Report
from testbed.forward_proxy import ForwardProxy
from testbed.http import Answer
from testbed.livekit import LiveKit
from testbed.nginx import UPGRADE, Servers, proxy
from testbed.sets import module_config, running
from testbed.synapse import Synapse

PASSWORD = "a-password-that-is-never-shown"


class Setting:
    """A homeserver, a LiveKit and a forward proxy; each test restarts Synapse with its settings."""

    def __init__(self, directory: Path) -> None:
        self.livekit = LiveKit(directory)
        self.synapse = Synapse("p", directory, module_config(self.livekit))
        self.proxy = ForwardProxy()
        hook = f"{self.synapse.client_url}{service.PREFIX}/sfu_webhook"
        self.livekit.webhook_urls.append(hook)
        self._seen = 0

    def restart(
        self, env: dict[str, str], config: dict[str, Any] | None = None, **module: Any
    ) -> None:
        self._seen = len(self.synapse.log_text())
        self.proxy.requests.clear()
        self.proxy.status = self.proxy.password = None
        self.synapse.env = env
        self.synapse.extra_config = dict(config or {})
        self.synapse.module_config = module_config(self.livekit, **module)
        self.synapse.restart()

    def ask(self) -> Answer:
        """Request a token with which a user can start a call."""
        alice = self.synapse.register(f"alice{len(self.synapse.log_text())}")
        body = service.get_token_body(alice, alice.create_room())
        return service.post(self.synapse.client_url, "/get_token", body)

    def log(self) -> str:
        """Synapse's log since its last start."""
        log = self.synapse.log_text()[self._seen :]
        assert PASSWORD not in log
        assert self.livekit.secret not in log
        return log

    def check(self, env: dict[str, str], **module: Any) -> Report:
        # The command runs with the environment of the tests, whose proxies it must not use.
        unset = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"), "")
        report = Checker(self.synapse, env={**unset, **env}).run(module=module or None)
        assert PASSWORD not in str(report)
        return report


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    setting = Setting(tmp_path_factory.mktemp("proxies"))
    with setting.proxy.running(), running(setting.livekit, setting.synapse):
        yield setting


# A forward proxy


@pytest.mark.parametrize("where", ["HTTP_PROXY", "http_proxy", "homeserver.yaml"])
def test_http_proxy_is_used_by_module_and_check(where: str, setting: Setting) -> None:
    env, config = {where: setting.proxy.url}, {}
    if where == "homeserver.yaml":
        env, config = {}, {"http_proxy": setting.proxy.url}
    setting.restart(env, config)
    setting.ask().ok()
    url = f"{setting.livekit.api_url}/twirp/livekit.RoomService/"
    assert f"POST {url}CreateRoom" in setting.proxy.requests

    setting.proxy.requests.clear()
    report = setting.check(env)
    text = report.the("ok", "LiveKit").text
    assert f"answers at {setting.livekit.api_url} through the proxy {setting.proxy.url}" in text
    assert f"POST {url}ListRooms" in setting.proxy.requests
    assert not report.all("warning", "proxy")
    # The check must not use Synapse's proxy for what clients do.
    assert report.the("ok", "livekit_url")
    assert report.the("ok", "webhooks")


@pytest.mark.parametrize("where", ["NO_PROXY", "homeserver.yaml"])
def test_http_proxy_with_livekit_excepted_is_bypassed_by_module_and_check(
    where: str, setting: Setting
) -> None:
    env = {"HTTP_PROXY": setting.proxy.url}
    config: dict[str, Any] = {}
    if where == "NO_PROXY":
        env["NO_PROXY"] = "localhost, 127.0.0.1"
    else:
        config["no_proxy_hosts"] = ["127.0.0.1"]
    setting.restart(env, config)
    setting.ask().ok()
    report = setting.check(env)
    assert report.the("ok", "LiveKit").text.endswith(
        f"at {setting.livekit.api_url} and accepts the API key"
    )
    assert setting.proxy.requests == []


def test_check_without_synapses_http_proxy_reports_the_difference(setting: Setting) -> None:
    setting.restart({"HTTP_PROXY": setting.proxy.url})
    text = setting.check({}).the("warning", "proxy").text
    assert f"connects to LiveKit through the proxy {setting.proxy.url}" in text
    assert "this command directly" in text


def test_http_proxy_with_password_is_used_and_never_shown(setting: Setting) -> None:
    with_password = setting.proxy.url.replace("://", f"://admin:{PASSWORD}@")
    setting.restart({"HTTP_PROXY": with_password})
    setting.proxy.password = f"admin:{PASSWORD}"
    setting.ask().ok()
    report = setting.check({"HTTP_PROXY": with_password})
    assert f"through the proxy {setting.proxy.url} and accepts" in report.the("ok", "LiveKit").text
    assert not report.all("warning", "proxy")
    assert "cannot be used" not in setting.log()

    setting.proxy.password = "admin:another"
    assert setting.ask().status == 503
    assert f"through the proxy {setting.proxy.url} cannot be used" in setting.log()
    assert "the proxy requires a user and a password (407)" in setting.log()
    finding = setting.check({"HTTP_PROXY": with_password}).the("wrong", "LiveKit")
    assert "another server answers" in finding.text


@pytest.mark.parametrize("status", [404, 503])
def test_http_proxy_that_rejects_livekit_is_reported_with_the_fix(
    status: int, setting: Setting
) -> None:
    env = {"HTTP_PROXY": setting.proxy.url}
    setting.restart(env)
    setting.proxy.status = status
    assert setting.ask().status == 503
    place = f"{setting.livekit.api_url} through the proxy {setting.proxy.url}"
    assert f"LiveKit at {place} cannot be used" in setting.log()
    finding = setting.check(env).the("wrong", "LiveKit")
    assert f"{place}" in finding.text
    if status == 404:
        assert "homeserver.yaml" in str(finding.file)
        assert finding.pasted == {"no_proxy_hosts": ["127.0.0.1"]}


def test_http_proxy_that_is_down_is_reported_with_the_fix(setting: Setting) -> None:
    env = {"HTTP_PROXY": "http://127.0.0.1:9"}
    setting.restart(env)
    assert setting.ask().status == 503
    assert "through the proxy http://127.0.0.1:9 cannot be used" in setting.log()
    finding = setting.check(env).the("wrong", "LiveKit")
    assert "through the proxy http://127.0.0.1:9: the connection is refused" in finding.text
    setting.restart(env, finding.pasted)
    setting.ask().ok()
    assert setting.check(env).the("ok", "LiveKit")


def test_https_proxy_is_used_as_a_tunnel_by_module_and_check(
    setting: Setting, tmp_path: Path
) -> None:
    block = proxy(setting.livekit.api_url, "/", *UPGRADE)
    front = Servers(tmp_path, {"livekit": block}, setting.synapse.directory)
    env = {
        "HTTPS_PROXY": setting.proxy.url,
        "SSL_CERT_FILE": str(setting.synapse.directory / "tls.crt"),
    }
    with running(front):
        setting.restart(env, livekit_internal_url=front.url("livekit"))
        setting.ask().ok()
        tunnel = f"CONNECT 127.0.0.1:{front.port('livekit')}"
        assert setting.proxy.requests[0] == tunnel
        setting.proxy.requests.clear()
        report = setting.check(env)
        assert (
            f"through the proxy {setting.proxy.url} and accepts" in report.the("ok", "LiveKit").text
        )
        assert set(setting.proxy.requests) == {tunnel}

        setting.proxy.status = 403
        finding = setting.check(env).the("wrong", "LiveKit")
        assert "the proxy answers 403" in finding.text


# A proxy in front of LiveKit


def test_livekit_behind_a_redirect_to_https_is_reported_with_the_fix(
    setting: Setting, tmp_path: Path
) -> None:
    # 497 is nginx's status for HTTP on a port with TLS.
    block = "error_page 497 =301 https://$host:$server_port$request_uri;\n"
    block += proxy(setting.livekit.api_url, "/", *UPGRADE)
    front = Servers(tmp_path, {"livekit": block}, setting.synapse.directory)
    https = front.url("livekit")
    plain = https.replace("https:", "http:")
    env = {"SSL_CERT_FILE": str(setting.synapse.directory / "tls.crt")}
    with running(front):
        setting.restart(env, livekit_internal_url=plain)
        assert setting.ask().status == 503
        log = setting.log()
        assert f"it redirects to https (301). Write livekit_internal_url: {https}" in log
        finding = setting.check(env).the("wrong", "LiveKit")
        assert f"at {plain} redirects to https (301)" in finding.text
        assert finding.pasted == {"livekit_internal_url": https}
        setting.restart(env, **finding.pasted)
        setting.ask().ok()
        assert setting.check(env).the("ok", "LiveKit")

        report = setting.check(env, livekit_url=plain.replace("http", "ws"))
        finding = report.the("wrong", "livekit_url")
        assert "redirects to https (301)" in finding.text
        assert finding.pasted == {"livekit_url": https.replace("https", "wss")}


def test_redirect_to_a_login_page_is_reported(setting: Setting, tmp_path: Path) -> None:
    block = "return 302 https://login.example.com/?next=$request_uri&x;"
    front = Servers(tmp_path, {"login": block}, setting.synapse.directory)
    env = {"SSL_CERT_FILE": str(setting.synapse.directory / "tls.crt")}
    with running(front):
        setting.restart(env, livekit_internal_url=front.url("login"))
        assert setting.ask().status == 503
        assert (
            "it redirects to another page (302). Set livekit_internal_url to LiveKit's own URL"
            in setting.log()
        )
        finding = setting.check(env).the("wrong", "LiveKit")
    assert "redirects to another page (302)" in finding.text
    assert "login.example.com" not in str(finding)


DOWN = {
    502: "location / {{ proxy_pass http://127.0.0.1:9; }}",
    503: "return 503;",
    504: "location / {{ proxy_pass http://127.0.0.1:{silent}; proxy_read_timeout 1s; }}",
}


@pytest.mark.parametrize("status", DOWN)
def test_livekit_down_behind_a_proxy_is_reported_as_down(
    status: int, setting: Setting, tmp_path: Path
) -> None:
    env = {"SSL_CERT_FILE": str(setting.synapse.directory / "tls.crt")}
    # The system accepts connections, but no process answers them.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        block = DOWN[status].format(silent=listener.getsockname()[1])
        front = Servers(tmp_path, {"livekit": block}, setting.synapse.directory)
        with running(front):
            setting.restart(env, livekit_internal_url=front.url("livekit"))
            assert setting.ask().status == 503
            report = setting.check(env)
    log = setting.log()
    assert f"a proxy answers {status}: LiveKit is down behind it. Start LiveKit" in log
    assert "auto_create: cannot be tested" not in log
    finding = report.the("wrong", "LiveKit")
    assert "is down behind the proxy" in finding.text
    assert f"answers {status}" in finding.text
    assert finding.lines[0].startswith("systemctl start livekit")
