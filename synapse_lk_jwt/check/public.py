# SPDX-License-Identifier: Apache-2.0
"""What clients see from outside: public names, the reverse proxy, TLS, CORS."""

from urllib.parse import urljoin, urlsplit

import attr
from synapse.util.stringutils import parse_server_name

from synapse_lk_jwt.check.probe import Answer, NoAnswer, Probe
from synapse_lk_jwt.check.report import Finding, ok, warning, wrong
from synapse_lk_jwt.check.running import MODULES, NoModuleThere, Running, State
from synapse_lk_jwt.check.setup import FOCI, PUBLIC_BASEURL, Setup
from synapse_lk_jwt.check.sfu import Sfu
from synapse_lk_jwt.discovery import MSC4143, Advertise, livekit_transports
from synapse_lk_jwt.livekit.proxies import is_redirect
from synapse_lk_jwt.msc4195 import GET_TOKEN, client_path

PROXY = "the reverse proxy's configuration (nginx; others in docs/reverse-proxy.md)"
CORS = "Access-Control-Allow-Origin"
ORIGIN = "https://call.example.com"
MAX_REDIRECTS = 3

VERSIONS = "/_matrix/client/versions"
TRANSPORTS = "/_matrix/client/unstable/org.matrix.msc4143/rtc/transports"
STABLE_TRANSPORTS = "/_matrix/client/v1/rtc/transports"


class Public:
    """The homeserver and LiveKit as clients reach them."""

    def __init__(self, probe: Probe, setup: Setup, running: Running, sfu: Sfu) -> None:
        self._probe = probe
        self._setup = setup
        # Here certificates count.
        self._running = attr.evolve(running, probe=probe)
        self._sfu = sfu

    async def check_homeserver(self, state: State) -> list[Finding]:
        """All findings about the homeserver.

        Args:
            state: what it says of itself inside the network.
        """
        return [
            await self._service(),
            await self._preflight(),
            *await self._matrix(state),
            await self._well_known(),
        ]

    # The service at the advertised URL

    async def _service(self) -> Finding:
        url = self._setup.service_url
        try:
            health = await self._probe.request("GET", f"{url}/healthz")
        except NoAnswer as e:
            return self._not_reached(f"{url} cannot be reached: {e}")
        if health.status != 200 or health.json != {}:
            return self._not_reached(
                f"{url}/healthz is answered {_describe(health)}, not by the module"
            )
        problem = _cors_problem(health)
        if problem is not None:
            return wrong("service", f"{url} {problem}", PROXY, *_CORS_LINES)
        try:
            state = await self._running.ask(url)
        except (NoAnswer, NoModuleThere) as e:
            text = f"{url} is answered by a service that is not this homeserver's ({e})"
            return self._not_reached(text)
        if state["server_name"] != self._setup.server_name:
            return self._not_reached(f"{url} is of another homeserver, {state['server_name']}")
        return ok("service", f"is reached at {url}")

    def _not_reached(self, text: str) -> Finding:
        if not self._setup.has_public_baseurl and self._setup.module.service_url is None:
            return wrong("service", text, self._setup.file("public_baseurl"), PUBLIC_BASEURL)
        return wrong("service", text, PROXY, *self._proxy_lines(self._setup.module.path_prefix))

    def _proxy_lines(self, path: str) -> tuple[str, ...]:
        return (
            f"location {path} {{",
            f"    proxy_pass {self._running.proxied_url};",
            "    proxy_set_header X-Forwarded-For $remote_addr;",
            "    proxy_set_header X-Forwarded-Proto $scheme;",
            "    proxy_set_header Host $host;",
            "}",
        )

    async def _preflight(self) -> Finding:
        url = f"{self._setup.service_url}/sfu/get"
        headers = {
            "Origin": ORIGIN,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type",
        }
        try:
            answer = await self._probe.request("OPTIONS", url, headers)
        except NoAnswer as e:
            return warning("preflight", f"of {url} cannot be told: {e}")
        problem = _cors_problem(answer, ORIGIN)
        allowed = ",".join(answer.all("Access-Control-Allow-Headers")).lower()
        if answer.status >= 300:
            problem = f"is answered {_describe(answer)}"
        elif problem is None and "content-type" not in allowed and "*" not in allowed:
            problem = "is answered without Access-Control-Allow-Headers: Content-Type"
        if problem is not None:
            text = f"a browser's OPTIONS {url} {problem}: it does not go on"
            return wrong("preflight", text, PROXY, *_CORS_LINES)
        return ok("preflight", "is answered as browsers want it")

    async def _matrix(self, state: State) -> list[Finding]:
        """The paths below `/_matrix`, which may be served by another process."""
        findings = []
        # What the running Synapse does not serve is reported by another check.
        if state["transports"]:
            findings += [
                await self._versions(),
                await self._served("rtc/transports", "GET", *self._transport_paths()),
            ]
        if state["not_served"] is None:
            findings.append(await self._served("MSC4195", "POST", client_path(GET_TOKEN)))
        return findings

    def _transport_paths(self) -> tuple[str, ...]:
        if self._setup.module.advertise is Advertise.OFF:
            # Synapse's own path; the module adds nothing.
            return (TRANSPORTS,)
        return (TRANSPORTS, STABLE_TRANSPORTS)

    async def _versions(self) -> Finding:
        """Whether clients learn that they may ask for `rtc/transports`."""
        url = f"{self._setup.public_baseurl}{VERSIONS}"
        try:
            answer = await self._probe.request("GET", url)
        except NoAnswer as e:
            return warning("/versions", f"at {url} cannot be checked: {e}")
        content = answer.json
        features = content.get("unstable_features") if isinstance(content, dict) else None
        if answer.status != 200 or not isinstance(features, dict):
            return wrong(
                "/versions",
                f"{url} is answered {_describe(answer)}, not by Synapse",
                PROXY,
                *self._proxy_lines("/_matrix"),
            )
        if features.get(MSC4143) is True:
            return ok("/versions", f"names {MSC4143}, at {url}")
        return wrong(
            "/versions",
            f"{url} does not name {MSC4143}, and new clients ask for rtc/transports only where it"
            " does: the process that the proxy asks there has not loaded the module, advertise is"
            " off, or a cache has kept an answer for up to an hour",
            "the configuration that this process is started with; then restart it",
            *MODULES,
        )

    async def _served(self, check: str, method: str, *paths: str) -> Finding:
        """Whether paths that take an access token are there."""
        for path in paths:
            url = f"{self._setup.public_baseurl}{path}"
            try:
                answer = await self._probe.request(method, url)
            except NoAnswer as e:
                return warning(check, f"at {url} cannot be checked: {e}")
            if answer.status == 404 and isinstance(answer.json, dict):
                return wrong(
                    check,
                    f"is not served at {url}: the process that the proxy asks there has not"
                    " loaded the module",
                    "the configuration that this process is started with; then restart it",
                    *MODULES,
                )
            if answer.status != 401 or not isinstance(answer.json, dict):
                return wrong(
                    check,
                    f"{url} is answered {_describe(answer)}, not by Synapse",
                    PROXY,
                    *self._proxy_lines("/_matrix"),
                )
        return ok(check, f"is served at {self._setup.public_baseurl}")

    # .well-known/matrix/client

    async def _well_known(self) -> Finding:
        setup = self._setup
        if setup.module.advertise is Advertise.MSC4195:
            return ok(".well-known", "is not needed: advertise is msc4195, which it cannot name")
        host, _ = parse_server_name(setup.server_name)
        url = f"https://{host}/.well-known/matrix/client"
        try:
            answer = await self._get(url)
        except NoAnswer as e:
            return self._no_well_known(f"{url} cannot be read: {e}")
        content = answer.json
        if answer.status != 200 or not isinstance(content, dict):
            return self._no_well_known(f"{url} is answered {_describe(answer)}")
        problem = _cors_problem(answer)
        if problem is not None:
            return self._no_well_known(f"{url} {problem}")
        named = [
            str(focus["livekit_service_url"]).rstrip("/")
            for focus in livekit_transports(content.get(FOCI))
            if focus.get("livekit_service_url")
        ]
        if not named:
            return self._no_well_known(f"{url} does not have {FOCI}")
        if setup.service_url not in named:
            text = f"{url} names {' and '.join(named)}, and not {setup.service_url}"
            return self._no_well_known(text)
        homeserver = content.get("m.homeserver")
        base_url = homeserver.get("base_url") if isinstance(homeserver, dict) else None
        if str(base_url).rstrip("/") != setup.public_baseurl:
            return warning(
                ".well-known",
                f"{url} sends clients to {base_url}, while public_baseurl is"
                f" {setup.public_baseurl}/",
                *self._well_known_lines(),
            )
        return ok(".well-known", f"names the service, at {url}")

    async def _get(self, url: str) -> Answer:
        for _ in range(MAX_REDIRECTS):
            answer = await self._probe.request("GET", url)
            if answer.status not in (301, 302, 303, 307, 308):
                break
            url = urljoin(url, answer.get("Location"))
        return answer

    def _no_well_known(self, text: str) -> Finding:
        return wrong(
            ".well-known", f"{text}: older clients find no calls", *self._well_known_lines()
        )

    def _well_known_lines(self) -> tuple[str, ...]:
        """The file to change, and what to write into it."""
        setup = self._setup
        host, _ = parse_server_name(setup.server_name)
        foci = f'[{{"type":"livekit","livekit_service_url":"{setup.service_url}"}}]'
        return (
            f"the configuration of the web server of {host} (nginx)",
            "location = /.well-known/matrix/client {",
            "    default_type application/json;",
            f"    add_header {CORS} *;",
            f'    return 200 \'{{"m.homeserver":{{"base_url":"{setup.public_baseurl}/"}},'
            f'"{FOCI}":{foci}}}\';',
            "}",
        )

    # LiveKit

    async def visit(self, livekit_room: str) -> Finding:
        """Opens a WebSocket to a room that is there, as a client does."""
        url = self._setup.module.livekit_url
        try:
            api_url = url.rstrip("/").replace("ws", "http", 1)
            answer = await self._sfu.connect(api_url, self._sfu.token_for(livekit_room))
        except NoAnswer as e:
            return self._no_websocket(f"{url} cannot be reached: {e}")
        if answer.status == 101:
            return ok("livekit_url", f"{url} takes WebSockets")
        location = answer.get("Location")
        if is_redirect(answer.status) and location.startswith("https:") and url.startswith("ws:"):
            return wrong(
                "livekit_url",
                f"{url} redirects to https ({answer.status}), and WebSocket clients do not follow",
                self._setup.block,
                f"livekit_url: {url.replace('ws', 'wss', 1)}",
            )
        # The room has just been made.
        is_room_missing = answer.status == 404 and b"room" in answer.body and not answer.is_html
        if answer.status == 401 or is_room_missing:
            cause = "does not know the room" if is_room_missing else "refuses the key"
            return wrong(
                "livekit_url",
                f"at {url} is another LiveKit than at {self._setup.module.livekit_internal_url}:"
                f" it {cause}",
                self._setup.block,
                "livekit_url: wss://sfu.example.com    # of the same LiveKit",
            )
        return self._no_websocket(
            f"{url} is answered {_describe(answer)} and not as a WebSocket: clients get a token and"
            " do not connect"
        )

    def _no_websocket(self, text: str) -> Finding:
        module = self._setup.module
        url, path = module.livekit_internal_url, "/rtc"
        if urlsplit(url).netloc == urlsplit(module.livekit_url).netloc:
            # Which is this proxy itself: Synapse needs LiveKit's API there.
            url, path = "http://127.0.0.1:7880", "/"
        return wrong(
            "livekit_url",
            text,
            "the configuration of the proxy in front of LiveKit (nginx)",
            f"location {path} {{",
            f"    proxy_pass {url};",
            "    proxy_http_version 1.1;",
            "    proxy_set_header Upgrade $http_upgrade;",
            '    proxy_set_header Connection "upgrade";',
            "    proxy_read_timeout 1h;",
            "}",
        )


_CORS_LINES = (
    f"# remove every 'add_header {CORS} …' for the paths of Synapse,",
    "# which sends it itself, and let OPTIONS through to it",
)


def _describe(answer: Answer) -> str:
    """What an answer looks like, without quoting it."""
    if answer.is_html:
        return f"with a web page ({answer.status})"
    content = answer.json
    if isinstance(content, dict) and isinstance(content.get("errcode"), str):
        return f"with {answer.status} {content['errcode'][:40]}"
    return f"with {answer.status}"


def _cors_problem(answer: Answer, origin: str = "*") -> str | None:
    values = answer.all(CORS)
    if not values:
        return f"comes without {CORS}: a browser takes it for a dead network"
    if values not in (["*"], [origin]):
        return f"comes with {CORS}: {', '.join(values)} instead of one *: browsers refuse it"
    return None
