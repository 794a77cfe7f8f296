# SPDX-License-Identifier: Apache-2.0
"""Checks of public names, the reverse proxy, TLS, CORS and WebSockets, as clients see them."""

from collections.abc import Callable
from urllib.parse import unquote, urlsplit

import attr

from synapse_lk_jwt.check.answers import CORS_LINES, PROXY, cors_problem, describe
from synapse_lk_jwt.check.livekit_requests import LiveKit
from synapse_lk_jwt.check.probe import Answer, NoAnswer, Probe, Request
from synapse_lk_jwt.check.processes import MODULES, NotThisModule, Running, State
from synapse_lk_jwt.check.report import Finding, Verdict, ok, skipped, warning, wrong
from synapse_lk_jwt.check.setup import Setup
from synapse_lk_jwt.discovery import MSC4143, Advertise
from synapse_lk_jwt.livekit.proxies import is_down_behind_proxy, is_redirect
from synapse_lk_jwt.msc4195 import GET_TOKEN, client_path

ORIGIN = "https://call.example.com"

VERSIONS = "/_matrix/client/versions"
TRANSPORTS = "/_matrix/client/unstable/org.matrix.msc4143/rtc/transports"
STABLE_TRANSPORTS = "/_matrix/client/v1/rtc/transports"

# The checks of `check`, in their order.
CHECKS = ("service", "preflight", "/versions", "/rtc/transports", "MSC4195")

_PROCESS = "the configuration that this process is started with; then restart it"


class Public:
    """The homeserver and LiveKit as clients reach them."""

    def __init__(self, probe: Probe, setup: Setup, running: Running, livekit: LiveKit) -> None:
        """
        Args:
            probe: sends requests as clients do.
            setup: the homeserver's configuration.
            running: the running homeserver.
            livekit: signs the token of a client.
        """
        self._probe = probe
        self._setup = setup
        self._synapse_url = running.url
        # Inside the network, certificates may be for another name. For clients they must be valid.
        self._running = attr.evolve(running, probe=probe)
        self._livekit = livekit
        # The reason why no check of the service's host is possible.
        self._is_down: str | None = None

    def check(self, state: State) -> list[Finding]:
        """All findings about the homeserver's public URLs.

        A check is skipped if another one has found a problem that decides it.

        Args:
            state: what the homeserver reports about itself inside the network.
        """
        if not self._setup.has_public_baseurl and self._setup.module.service_url is None:
            return skipped(CHECKS, "public_baseurl is not set")
        service = self._service()
        findings = [service]
        if service.verdict is Verdict.WRONG:
            cause = self._is_down or "the service has a problem"
            findings += skipped(("preflight",), cause)
        else:
            findings.append(self._preflight())
        return findings + self._matrix(state)

    # The service at the advertised URL

    def _service(self) -> Finding:
        url = self._setup.service_url
        try:
            health = self._probe.send(Request("GET", f"{url}/healthz"))
        except NoAnswer as e:
            self._is_down = f"{urlsplit(url).netloc} cannot be reached"
            return self._not_reached(f"{url} cannot be reached: {e}")
        if health.status != 200 or health.json != {}:
            return self._not_the_module(health)
        problem = cors_problem(health)
        if problem is not None:
            return wrong("service", f"{url} {problem}", PROXY, *CORS_LINES)
        try:
            state = self._running.ask(url)
        except (NoAnswer, NotThisModule) as e:
            text = f"a service that is not this homeserver's answers at {url} ({e})"
            return self._not_reached(text)
        if state["server_name"] != self._setup.server_name:
            self._is_down = f"{url} leads to another homeserver"
            text = f"{url} leads to another homeserver, {state['server_name']}"
            return self._not_reached(text)
        return ok("service", f"is reached at {url}")

    def _not_the_module(self, health: Answer) -> Finding:
        url = self._setup.service_url
        text = f"{url}/healthz is answered {describe(health)}, not by the module"
        content = health.json
        if isinstance(content, dict) and content.get("errcode") == "M_UNRECOGNIZED":
            # Synapse itself sends this error.
            text = f"{text}: the process that the proxy forwards to has not loaded it"
            return wrong("service", text, _PROCESS, *MODULES)
        if is_down_behind_proxy(health.status, is_twirp=False):
            self._is_down = f"the proxy at {urlsplit(url).netloc} answers {health.status}"
        return self._not_reached(text)

    def _not_reached(self, text: str) -> Finding:
        service_url, prefix = self._setup.service_url, self._setup.module.path_prefix
        return wrong("service", text, PROXY, *self._proxy_lines(urlsplit(service_url).path, prefix))

    def _proxy_lines(self, path: str, prefix: str) -> tuple[str, ...]:
        """Nginx's lines that forward a public path to a path of Synapse."""
        url = self._synapse_url or "http://127.0.0.1:8008"
        is_socket = "%2F" in url
        if is_socket:
            url = f"http://unix:{unquote(url[len('http://') :])}"
        if path != prefix:
            # nginx replaces the one path by the other if both end with a slash.
            path, url = f"{path}/", f"{url}{':' * is_socket}{prefix}/"
        return (
            f"location {path} {{",
            f"    proxy_pass {url};",
            "    proxy_set_header X-Forwarded-For $remote_addr;",
            "    proxy_set_header X-Forwarded-Proto $scheme;",
            "    proxy_set_header Host $host;",
            "}",
        )

    def _preflight(self) -> Finding:
        url = f"{self._setup.service_url}/sfu/get"
        headers = {
            "Origin": ORIGIN,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type",
        }
        try:
            answer = self._probe.send(Request("OPTIONS", url, headers))
        except NoAnswer as e:
            return warning("preflight", f"of {url} cannot be checked: {e}")
        problem = cors_problem(answer, ORIGIN)
        allowed = ",".join(answer.all("Access-Control-Allow-Headers")).lower()
        if answer.status >= 300:
            problem = f"is answered {describe(answer)}"
        elif problem is None and "content-type" not in allowed and "*" not in allowed:
            problem = "is answered without Access-Control-Allow-Headers: Content-Type"
        if problem is not None:
            text = f"a browser's OPTIONS {url} {problem}. Browsers do not send the request"
            return wrong("preflight", text, PROXY, *CORS_LINES)
        return ok("preflight", "requests from browsers (OPTIONS) are answered")

    # The paths below `/_matrix`, which another process may serve

    def _matrix(self, state: State) -> list[Finding]:
        checks: dict[str, Callable[[], Finding]] = {}
        # Another check reports what the running Synapse does not serve.
        if state["transports"]:
            checks["/versions"] = self._versions
            checks["/rtc/transports"] = lambda: self._served(
                "/rtc/transports", "GET", *self._transport_paths()
            )
        if state["not_served"] is None:
            checks["MSC4195"] = lambda: self._served("MSC4195", "POST", client_path(GET_TOKEN))
        setup = self._setup
        is_same_host = urlsplit(setup.service_url).netloc == urlsplit(setup.public_baseurl).netloc
        if not setup.has_public_baseurl:
            return skipped(checks, "public_baseurl is not set")
        if self._is_down is not None and is_same_host:
            return skipped(checks, self._is_down)
        findings: list[Finding] = []
        for check in checks.values():
            if findings and findings[-1].verdict is not Verdict.OK:
                cause = f"{findings[-1].check} has a problem, which may be the same one"
                return findings + skipped(list(checks)[len(findings) :], cause)
            findings.append(check())
        return findings

    def _transport_paths(self) -> tuple[str, ...]:
        if self._setup.module.advertise is Advertise.OFF:
            # Synapse's own path; the module adds nothing.
            return (TRANSPORTS,)
        return (TRANSPORTS, STABLE_TRANSPORTS)

    def _versions(self) -> Finding:
        """Whether clients learn that they may request `rtc/transports`."""
        url = f"{self._setup.public_baseurl}{VERSIONS}"
        try:
            answer = self._probe.send(Request("GET", url))
        except NoAnswer as e:
            return warning("/versions", f"at {url} cannot be checked: {e}")
        content = answer.json
        features = content.get("unstable_features") if isinstance(content, dict) else None
        if answer.status != 200 or not isinstance(features, dict):
            return self._not_synapse("/versions", url, answer)
        if features.get(MSC4143) is True:
            return ok("/versions", f"names {MSC4143}, at {url}")
        return wrong(
            "/versions",
            f"{url} does not name {MSC4143}, so newer clients do not request rtc/transports. The"
            " process that the proxy forwards to has not loaded the module, or advertise is off. Or"
            " a cache returned an answer that is up to an hour old",
            _PROCESS,
            *MODULES,
        )

    def _served(self, check: str, method: str, *paths: str) -> Finding:
        """Whether paths that need an access token are served."""
        for path in paths:
            url = f"{self._setup.public_baseurl}{path}"
            try:
                answer = self._probe.send(Request(method, url))
            except NoAnswer as e:
                return warning(check, f"at {url} cannot be checked: {e}")
            if answer.status == 404 and isinstance(answer.json, dict):
                text = (
                    f"is not served at {url}: the process that the proxy forwards to has not loaded"
                    " the module"
                )
                return wrong(check, text, _PROCESS, *MODULES)
            if answer.status != 401 or not isinstance(answer.json, dict):
                return self._not_synapse(check, url, answer)
        return ok(check, f"is served at {self._setup.public_baseurl}")

    def _not_synapse(self, check: str, url: str, answer: Answer) -> Finding:
        text = f"{url} is answered {describe(answer)}, not by Synapse"
        return wrong(check, text, PROXY, *self._proxy_lines("/_matrix", "/_matrix"))

    # LiveKit

    def check_livekit_url(self, livekit_room: str) -> Finding:
        """Opens a WebSocket to a room that exists, as a client does."""
        url = self._setup.module.livekit_url
        try:
            api_url = url.rstrip("/").replace("ws", "http", 1)
            token = self._livekit.token_for(livekit_room)
            answer = self._probe.send(self._livekit.connect(api_url, token))
        except NoAnswer as e:
            return self._no_websocket(f"{url} cannot be reached: {e}")
        if answer.status == 101:
            return ok("livekit_url", f"{url} accepts WebSockets")
        location = answer.get("Location")
        if is_redirect(answer.status) and location.startswith("https:") and url.startswith("ws:"):
            return wrong(
                "livekit_url",
                f"{url} redirects to https ({answer.status}), and WebSocket clients do not follow",
                self._setup.block,
                f"livekit_url: {url.replace('ws', 'wss', 1)}",
            )
        # The room was created just before.
        is_room_missing = answer.status == 404 and b"room" in answer.body and not answer.is_html
        if answer.status == 401 or is_room_missing:
            cause = "does not know the room" if is_room_missing else "rejects the API key"
            return wrong(
                "livekit_url",
                f"{url} is another LiveKit than {self._livekit.url}: it {cause}",
                self._setup.block,
                "livekit_url: wss://sfu.example.com    # the public URL of the same LiveKit",
            )
        text = f"{url} is answered {describe(answer)}, and not as a WebSocket"
        return self._no_websocket(f"{text}. Clients get a token, but cannot connect")

    def _no_websocket(self, text: str) -> Finding:
        public = urlsplit(self._setup.module.livekit_url)
        upstream, path = self._livekit.url, "/rtc"
        if urlsplit(upstream).netloc == public.netloc:
            # This URL is the proxy itself, at which Synapse needs LiveKit's API as well.
            upstream, path = "http://127.0.0.1:7880", "/"
        if public.path:
            upstream += path
        return wrong(
            "livekit_url",
            text,
            "the configuration of the proxy in front of LiveKit (nginx)",
            f"location {public.path}{path} {{",
            f"    proxy_pass {upstream};",
            "    proxy_http_version 1.1;",
            "    proxy_set_header Upgrade $http_upgrade;",
            '    proxy_set_header Connection "upgrade";',
            "    proxy_read_timeout 1h;",
            "}",
        )
