# SPDX-License-Identifier: Apache-2.0
"""Checks of what clients see, with an nginx that is set up in wrong ways."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from synapse_lk_jwt.check.probe import Probe, Request
from testbed.check import Finding
from testbed.livekit import LiveKit
from testbed.nginx import UPGRADE, Servers, proxy
from testbed.public import Public, stage
from testbed.service import PREFIX
from testbed.sets import module_config, running
from testbed.synapse import Synapse

CORS = "Access-Control-Allow-Origin"
JSON = "location / { default_type application/json;"
WELL_KNOWN = "location = /.well-known/matrix/client"


def content(base_url: str, service_url: str) -> str:
    """A `.well-known/matrix/client` as an admin writes it."""
    return (
        f'{{"m.homeserver":{{"base_url":"{base_url}"}},"org.matrix.msc4143.rtc_foci":'
        f'[{{"type":"livekit","livekit_service_url":"{service_url}"}}]}}'
    )


def file(text: str, *more: str) -> str:
    """A `.well-known/matrix/client` that nginx serves without Synapse."""
    lines = [f"default_type application/json; return 200 '{text}';", *more]
    return f"{WELL_KNOWN} {{ {' '.join(lines)} }}"


# The document of a homeserver whose admin added other services.
OTHERS = {
    "m.homeserver": {"base_url": "https://matrix.test/"},
    "m.identity_server": {"base_url": "https://vector.im"},
    "io.element.e2ee": {"default": True},
}
STATIC_FILE = file(json.dumps(OTHERS), f"add_header {CORS} * always;")


@pytest.fixture(scope="module")
def faulty(public: Public, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    synapse, own = public.synapse.client_url, public.nginx.url("matrix")
    star = f"add_header {CORS} * always;"
    livekit = public.livekit.api_url
    servers = {
        "no rule": proxy(synapse, "/_matrix") + "location / { return 404; }",
        "no matrix": proxy(synapse, "/_synapse") + "location / { return 404; }",
        "path is cut": proxy(synapse, "/_matrix") + proxy(f"{synapse}/", PREFIX),
        "down": proxy("http://127.0.0.1:1"),
        "page": "location / { default_type text/html; return 200 '<html>Welcome</html>'; }",
        "odd JSON": JSON + " return 200 '[{}, 1]'; }",
        "an object": f"{star} {JSON} return 200 '{{\"instance\": 1}}'; }}",
        "empty object": f"{star} {JSON} return 200 '{{}}'; }}",
        "broken JSON": f"{WELL_KNOWN} {{ default_type application/json; return 200 '{{\"a\":'; }}",
        "static file": STATIC_FILE,
        "no CORS": proxy(synapse, "/", f"proxy_hide_header {CORS};"),
        "two CORS": proxy(synapse, "/", star),
        "own OPTIONS": proxy(synapse, "/", "if ($request_method = OPTIONS) { return 405; }"),
        "bare OPTIONS": proxy(synapse, "/", "if ($request_method = OPTIONS) { return 204; }"),
        "in trouble": f"location {PREFIX}/check {{ return 500; }} {JSON} return 200 '{{}}'; }}",
        "to https": f"return 301 {own}$request_uri;",
        "LiveKit": proxy(livekit),
        "LiveKit page": "location / { default_type text/html; return 200 '<html>Hi</html>'; }",
        "no file": f"{WELL_KNOWN} {{ return 404; }}",
        "file without CORS": file(content(f"{own}/", own + PREFIX)),
        "file of another": file(content("https://old.example.com/", own + PREFIX), star),
        "old service": file(content(f"{own}/", "https://old.example.com/livekit/jwt"), star),
        "no foci": file(f'{{"m.homeserver":{{"base_url":"{own}/"}}}}', star),
        "odd foci": file('{"m.homeserver":[],"org.matrix.msc4143.rtc_foci":{"a":1}}', star),
        "odd focus": file('{"org.matrix.msc4143.rtc_foci":[1,{"type":"livekit"}]}', star),
        "moved": f"{WELL_KNOWN} {{ return 302 {own}/.well-known/matrix/client; }}",
        "in circles": f"{WELL_KNOWN} {{ return 302 /.well-known/matrix/client; }}",
        "nowhere": f"{WELL_KNOWN} {{ return 302 ftp://example.com/; }}",
    }
    nginx = Servers(tmp_path_factory.mktemp("faulty"), servers, public.synapse.directory)
    with running(nginx):
        yield nginx


# The service at its public URL


@pytest.mark.parametrize(
    ("server", "text"),
    [
        ("no rule", "/healthz is answered with a web page (404), not by the module"),
        ("path is cut", "/healthz is answered with a web page (404), not by the module"),
        ("down", "/healthz is answered with a web page (502), not by the module"),
        ("page", "/healthz is answered with a web page (200), not by the module"),
        ("odd JSON", "/healthz is answered with 200, not by the module"),
        ("an object", "/healthz is answered with 200, not by the module"),
        ("empty object", "a service that is not this homeserver's answers"),
        ("to https", "/healthz is answered with a web page (301), not by the module"),
        ("no CORS", f"is answered without {CORS}"),
        ("two CORS", f"is answered with {CORS}: *, * instead of one *"),
    ],
)
def test_service_that_clients_do_not_reach_is_wrong(
    server: str, text: str, public: Public, faulty: Servers
) -> None:
    url = faulty.url(server)
    report = public.check.run(config={"public_baseurl": f"{url}/"})
    finding = report.the("wrong", "service")
    assert url + PREFIX in finding.text
    assert text in finding.text
    assert "reverse proxy" in str(finding.file)
    assert report.status == 1


@pytest.mark.parametrize("server", ["own OPTIONS", "bare OPTIONS"])
def test_preflight_that_the_proxy_answers_is_wrong(
    server: str, public: Public, faulty: Servers
) -> None:
    report = public.check.run(config={"public_baseurl": f"{faulty.url(server)}/"})
    assert "a browser's OPTIONS" in report.the("wrong", "preflight").text
    assert report.the("ok", "service")


@pytest.mark.parametrize("server", ["no CORS", "two CORS", "no rule"])
def test_preflight_of_a_service_with_a_problem_is_skipped(
    server: str, public: Public, faulty: Servers
) -> None:
    report = public.check.run(config={"public_baseurl": f"{faulty.url(server)}/"})
    assert report.bad["service"] == "wrong"
    assert "preflight" in report.skipped


@pytest.mark.parametrize("path", [PREFIX, "/livekit/jwt"])
def test_lines_for_nginx_make_the_service_reachable(
    path: str, public: Public, faulty: Servers, tmp_path: Path
) -> None:
    finding = public.check.run(module={"service_url": faulty.url("no rule") + path}).the(
        "wrong", "service"
    )
    block = "\n".join(finding.lines)
    nginx = Servers(tmp_path, {"fixed": block}, public.synapse.directory)
    with running(nginx):
        report = public.check.run(module={"service_url": nginx.url("fixed") + path})
    assert report.the("ok", "service")
    assert report.the("ok", "preflight")


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://127.0.0.1:1/", "the connection is refused"),
        ("https://matrix.invalid/", "its name cannot be resolved"),
        ("https://localhost:{port}/", "its certificate is not valid (Hostname mismatch"),
        ("http://127.0.0.1:{port}/", "is answered with a web page (400)"),
    ],
)
def test_public_baseurl_that_leads_nowhere_is_one_problem(
    url: str, text: str, public: Public
) -> None:
    url = url.format(port=public.nginx.port("matrix"))
    report = public.check.run(config={"public_baseurl": url})
    assert text in report.the("wrong", "service").text
    assert report.status == 1
    if "refused" in text or "resolved" in text:
        assert report.skipped >= {"preflight", "/versions", "/rtc/transports", "MSC4195"}


def test_public_baseurl_of_another_homeserver_is_one_problem(
    public: Public, tmp_path: Path
) -> None:
    # It has the same LiveKit, and the same key.
    second = Synapse("q", tmp_path, module_config(public.livekit))
    nginx = Servers(tmp_path, {"second": proxy(second.client_url)}, public.synapse.directory)
    config = {"public_baseurl": nginx.url("second")}
    with running(second, nginx):
        report = public.check.run(config=config)
        text = report.the("wrong", "service").text
        assert f"leads to another homeserver, {second.server_name}" in text
        assert report.skipped >= {"preflight", "/versions", "/rtc/transports", "MSC4195"}
        second.module_config = None
        second.restart()
        report = public.check.run(config=config)
        assert "/healthz is answered with 404 M_UNRECOGNIZED" in report.the("wrong", "service").text
        assert "modules" in report.the("wrong", "service").pasted
        # Whether /versions shows it depends on the version of Synapse.
        assert {"/versions", "/rtc/transports"} & report.bad.keys()
        assert "MSC4195" in report.skipped


def test_process_that_fails_is_wrong_and_refers_to_its_log(public: Public, faulty: Servers) -> None:
    resources = [{"names": ["client", "federation"]}]
    port = faulty.port("in trouble")
    listener = {"port": port, "type": "http", "tls": True, "resources": resources}
    report = public.check.run(config={"listeners": [listener]})
    text = report.the("wrong", "processes").text
    assert text.endswith("fails to report its state (it answers 500). See its log")


@pytest.mark.parametrize("server", ["no matrix", "page"])
def test_paths_below_matrix_that_the_proxy_does_not_forward_are_one_problem(
    server: str, public: Public, faulty: Servers
) -> None:
    report = public.check.run(config={"public_baseurl": faulty.url(server)})
    finding = report.the("wrong", "/versions")
    assert "not by Synapse" in finding.text
    assert "reverse proxy" in str(finding.file)
    assert finding.lines[0] == "location /_matrix {"
    assert report.skipped >= {"/rtc/transports", "MSC4195"}


def test_proxy_with_nothing_behind_it_is_one_problem(public: Public, faulty: Servers) -> None:
    report = public.check.run(config={"public_baseurl": faulty.url("down")})
    assert "(502)" in report.the("wrong", "service").text
    assert report.skipped >= {"preflight", "/versions", "/rtc/transports", "MSC4195"}


@pytest.mark.parametrize("advertise", ["both", "msc4195", "off"])
def test_check_of_a_homeserver_with_each_advertise_is_clean(
    advertise: str, public: Public, tmp_path: Path
) -> None:
    second = stage(tmp_path, "s", public.livekit, advertise=advertise)
    entry = {"type": "livekit", "livekit_service_url": second.service_url}
    if advertise == "off":
        # An admin can announce the service in homeserver.yaml instead.
        second.synapse.extra_config |= {
            "matrix_rtc": {"transports": [entry]},
            "experimental_features": {"msc4143_enabled": True},
        }
    with running(second.synapse, second.nginx):
        report = second.check.run()
    names = {finding.check: finding.verdict for finding in report.findings}
    for check in ("/versions", "/rtc/transports", "MSC4195", "service"):
        assert names[check] == "ok", str(report)


# .well-known/matrix/client


@pytest.mark.parametrize(
    ("server", "text"),
    [
        ("no file", "is answered with a web page (404)"),
        ("down", "is answered with a web page (502)"),
        ("page", "is answered with a web page (200)"),
        ("odd JSON", "is not valid JSON: it is not an object"),
        ("broken JSON", "is not valid JSON (line 1, column 6)"),
        ("static file", "does not have org.matrix.msc4143.rtc_foci"),
        ("file without CORS", f"is answered without {CORS}"),
        ("old service", "names https://old.example.com/livekit/jwt, and not https://127.0.0.1"),
        ("no foci", "does not have org.matrix.msc4143.rtc_foci"),
        ("odd foci", "does not have org.matrix.msc4143.rtc_foci"),
        ("odd focus", "does not have org.matrix.msc4143.rtc_foci"),
        ("in circles", "is answered with a web page (302)"),
        ("nowhere", "cannot be read"),
    ],
)
def test_well_known_that_older_clients_cannot_use_is_wrong(
    server: str, text: str, public: Public, faulty: Servers
) -> None:
    report = public.check.run("--connect-to", f"127.0.0.1:443:127.0.0.1:{faulty.port(server)}")
    assert report.bad == {".well-known": "wrong"}, str(report)
    finding = report.the("wrong", ".well-known")
    assert text in finding.text
    assert "127.0.0.1" in str(finding.file)
    assert (finding.lines == []) == (server in ("down", "nowhere"))
    assert report.status == 1


def test_well_known_without_a_web_server_is_wrong(public: Public) -> None:
    report = public.check.run("--connect-to", "127.0.0.1:443:127.0.0.1:1")
    assert "the connection is refused" in report.the("wrong", ".well-known").text
    assert report.bad == {".well-known": "wrong"}


def test_well_known_of_another_homeserver_is_a_warning(public: Public, faulty: Servers) -> None:
    port = faulty.port("file of another")
    report = public.check.run("--connect-to", f"127.0.0.1:443:127.0.0.1:{port}")
    finding = report.the("warning", ".well-known")
    assert "sends clients to https://old.example.com/, while public_baseurl is" in finding.text
    assert finding.pasted == {"public_baseurl": "https://old.example.com/"}
    assert report.bad == {".well-known": "warning"}
    assert report.status == 0


def test_well_known_behind_a_redirect_is_followed(public: Public, faulty: Servers) -> None:
    port = faulty.port("moved")
    report = public.check.run("--connect-to", f"127.0.0.1:443:127.0.0.1:{port}")
    assert report.bad == {}, str(report)


def test_lines_for_a_missing_well_known_fix_it(public: Public, tmp_path: Path) -> None:
    report = public.check.run("--connect-to", "127.0.0.1:443:127.0.0.1:1")
    block = "\n".join(report.the("wrong", ".well-known").lines)
    nginx = Servers(tmp_path, {"fixed": block}, public.synapse.directory)
    with running(nginx):
        port = nginx.port("fixed")
        report = public.check.run("--connect-to", f"127.0.0.1:443:127.0.0.1:{port}")
    assert report.bad == {}, str(report)


def test_lines_for_a_well_known_with_other_entries_keep_them(
    public: Public, faulty: Servers, tmp_path: Path
) -> None:
    option = f"127.0.0.1:443:127.0.0.1:{faulty.port('static file')}"
    report = public.check.run("--connect-to", option)
    block = "\n".join(report.the("wrong", ".well-known").lines)
    nginx = Servers(tmp_path, {"fixed": block}, public.synapse.directory)
    with running(nginx):
        url = f"{nginx.url('fixed')}/.well-known/matrix/client"
        served = Probe({}, verifies=False).send(Request("GET", url)).json
        port = nginx.port("fixed")
        report = public.check.run("--connect-to", f"127.0.0.1:443:127.0.0.1:{port}")
    foci = served.pop("org.matrix.msc4143.rtc_foci")
    assert foci == [{"type": "livekit", "livekit_service_url": public.service_url}]
    assert served == OTHERS
    # The document names another homeserver on purpose.
    assert report.bad == {".well-known": "warning"}, str(report)


def test_public_baseurl_unset_beside_a_static_well_known_is_one_problem(
    public: Public, faulty: Servers
) -> None:
    option = f"127.0.0.1:443:127.0.0.1:{faulty.port('static file')}"
    report = public.check.run("--connect-to", option, config={"public_baseurl": None})
    assert report.bad == {"public_baseurl": "wrong"}, str(report)
    # No line sends clients to another homeserver than the one that they use.
    assert report.the("wrong", "public_baseurl").pasted == {
        "public_baseurl": "https://matrix.test/"
    }
    assert not [f for f in report.findings if f.check == ".well-known" and f.lines]


def test_old_service_in_homeserver_yaml_is_one_problem_for_each_option(
    public: Public, tmp_path: Path
) -> None:
    old = {"type": "livekit", "livekit_service_url": "https://old.example.com/livekit/jwt"}
    second = stage(tmp_path, "o", public.livekit)
    second.synapse.extra_config |= {
        "matrix_rtc": {"transports": [old]},
        "extra_well_known_client_content": {"org.matrix.msc4143.rtc_foci": [old]},
    }
    with running(second.synapse, second.nginx):
        report = second.check.run()
    bad = [f for f in report.findings if f.verdict in ("wrong", "warning")]
    # LiveKit sends its webhooks to another homeserver.
    assert [f.check for f in bad] == ["rtc/transports", ".well-known", "webhooks"], str(report)
    assert not [f for f in bad[:2] if "nginx" in str(f.file) or "restart" in f.text]
    assert ".well-known" in report.skipped


def test_well_known_of_a_synapse_that_was_not_restarted_is_skipped(public: Public) -> None:
    module = {"service_url": f"{public.nginx.url('matrix')}/livekit/jwt"}
    report = public.check.run(module=module)
    assert ".well-known" in report.skipped
    finding = report.the("warning", "settings")
    assert "service_url is empty, in the files 'https://127.0.0.1:" in finding.text
    assert finding.lines[0].startswith("systemctl restart matrix-synapse")


# LiveKit


def livekit_at(url: str, public: Public) -> Finding:
    """The finding about a `livekit_url`, where nothing else is wrong."""
    url = url.replace("https:", "wss:")
    report = public.check.run(module={"livekit_url": url})
    assert set(report.bad) == {"livekit_url"}, str(report)
    finding = report.the("wrong", "livekit_url")
    assert url in finding.text
    return finding


def test_livekits_proxy_without_websockets_is_wrong_and_its_lines_fix_it(
    public: Public, faulty: Servers, tmp_path: Path
) -> None:
    finding = livekit_at(faulty.url("LiveKit"), public)
    assert "and not as a WebSocket" in finding.text
    nginx = Servers(tmp_path, {"fixed": "\n".join(finding.lines)}, public.synapse.directory)
    with running(nginx):
        url = nginx.url("fixed").replace("https:", "wss:")
        report = public.check.run(module={"livekit_url": url})
    assert report.bad == {}, str(report)


@pytest.mark.parametrize(
    ("server", "text"),
    [
        ("LiveKit page", "is answered with a web page (200), and not as a WebSocket"),
        ("down", "is answered with a web page (502), and not as a WebSocket"),
        ("no rule", "is answered with a web page (404), and not as a WebSocket"),
    ],
)
def test_another_server_at_livekit_url_is_wrong(
    server: str, text: str, public: Public, faulty: Servers
) -> None:
    assert text in livekit_at(faulty.url(server), public).text


def test_livekit_url_without_a_server_is_wrong(public: Public) -> None:
    assert "the connection is refused" in livekit_at("wss://127.0.0.1:1", public).text


def test_livekit_url_without_tls_is_wrong(public: Public) -> None:
    report = public.check.run(module={"livekit_url": public.livekit.url})
    finding = report.the("wrong", "livekit_url")
    assert "Browsers block it on a page that was loaded over https" in finding.text
    assert report.the("ok", "livekit_url")


@pytest.mark.parametrize("key", ["APIrealparts", "APIother"])
def test_livekit_url_of_another_livekit_is_wrong(key: str, public: Public, tmp_path: Path) -> None:
    other = LiveKit(tmp_path, key=key)
    servers = {"other": proxy(other.api_url, "/", *UPGRADE)}
    nginx = Servers(tmp_path, servers, public.synapse.directory)
    with running(other, nginx):
        finding = livekit_at(nginx.url("other"), public)
    assert "is another LiveKit than " in finding.text
    assert finding.lines[0].startswith("livekit_url: ")


def test_public_names_with_odd_answers_cause_no_traceback(public: Public, faulty: Servers) -> None:
    for server in ("page", "odd JSON", "an object", "empty object", "nowhere", "in circles"):
        url = faulty.url(server)
        more: dict[str, Any] = {"livekit_url": url.replace("https", "wss")}
        more["livekit_internal_url"] = url
        option = f"127.0.0.1:443:127.0.0.1:{faulty.port(server)}"
        report = public.check.run(
            "--connect-to", option, config={"public_baseurl": url}, module=more
        )
        assert report.status == 1
