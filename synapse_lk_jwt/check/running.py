# SPDX-License-Identifier: Apache-2.0
"""What Synapse's processes say of themselves, and whether LiveKit's webhooks reach them."""

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import version
from typing import Any
from urllib.parse import unquote

import attr
from livekit.api import VideoGrants
from livekit.protocol.room import CreateRoomRequest, DeleteRoomRequest

from synapse_lk_jwt.check.probe import NoAnswer, Probe, Refused
from synapse_lk_jwt.check.report import LIVEKIT_YAML, Finding, ok, warning, wrong
from synapse_lk_jwt.check.setup import MAIN, MODULE, Setup
from synapse_lk_jwt.check.sfu import Sfu
from synapse_lk_jwt.check.signature import sign
from synapse_lk_jwt.discovery import destination, livekit_transports
from synapse_lk_jwt.livekit.naming import CHECK_ROOM

# How long to wait for LiveKit's webhook, in seconds, and how often to ask meanwhile.
WEBHOOK_SEC = 6
ASK_AGAIN_SEC = 0.05

State = Mapping[str, Any]

# What tells an answer of the module from anything else.
STATE_KEYS = {"server_name", "instance", "processes", "transports", "not_served", "versions"}


class NoModuleThere(Exception):
    """Something answers, and it is not this module with this configuration.

    Attributes:
        status: the HTTP status of what it answers.
        has_module: whether it is this module all the same.
    """

    def __init__(self, status: int, has_module: bool) -> None:
        super().__init__(f"it answers {status}")
        self.status = status
        self.has_module = has_module


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Running:
    """The running homeserver, asked with the module's own question.

    Attributes:
        probe: asks.
        setup: its configuration.
        time_msec: milliseconds since the epoch.
    """

    probe: Probe
    setup: Setup
    time_msec: Callable[[], int]

    @property
    def url(self) -> str | None:
        """Where the process of this configuration listens; None if it does not."""
        # What is written into LiveKit's configuration and a proxy's should do without TLS, and be
        # there for others.
        listeners = sorted(
            self.setup.listeners,
            key=lambda at: ("client" not in at.resources, at.url.startswith("https:")),
        )
        return listeners[0].url if listeners else None

    @property
    def proxied_url(self) -> str:
        """The same for a proxy, as nginx has it."""
        url = self.url or "http://127.0.0.1:8008"
        return f"http://unix:{unquote(url[len('http://') :])}" if "%2F" in url else url

    @property
    def webhook_url(self) -> str:
        """Where LiveKit should send its webhooks."""
        url = self.url if self.url and "%2F" not in self.url else "http://127.0.0.1:8008"
        return f"{url}{self.setup.module.path_prefix}/sfu_webhook"

    async def ask(self, service_url: str, **question: str) -> State:
        """Asks a process how it sees itself, and about a user.

        Args:
            service_url: where the service endpoints are.
            question: `user_id` and `room_id`, or nothing.

        Raises:
            NoAnswer: if nobody answers.
            NoModuleThere: if it is not this module with this configuration.
        """
        body = json.dumps(question).encode("ascii")
        answer = await self.probe.request(
            "POST",
            f"{service_url}/check",
            {"Authorization": sign(self.setup.module.livekit_secret, body, self.time_msec())},
            body,
        )
        state = answer.json
        if answer.status == 200 and isinstance(state, dict) and state.keys() >= STATE_KEYS:
            return state
        health = await self.probe.request("GET", f"{service_url}/healthz")
        raise NoModuleThere(answer.status, health.status == 200 and health.json == {})

    async def ask_process(self, url: str, **question: str) -> State:
        """As `ask`, at a listener of a process, which is `url` in the answer."""
        state = await self.ask(f"{url}{self.setup.module.path_prefix}", **question)
        return {**state, "url": url}

    async def check(self) -> tuple[list[Finding], State | None]:
        """All findings about the processes, and what the first one that answered has said."""
        setup = self.setup
        addresses = dict(setup.workers)
        if self.url is not None:
            addresses[setup.instance] = self.url
        findings: list[Finding] = []
        states: dict[str, State] = {}
        silent: list[tuple[str, Finding]] = []
        refused: set[str] = set()
        for name, url in addresses.items():
            try:
                states[name] = await self.ask_process(url)
            except NoAnswer as e:
                text = f"{_called(name)} does not answer at {url}: {e}"
                silent.append((name, warning("processes", text)))
                if isinstance(e, Refused):
                    refused.add(name)
            except NoModuleThere as e:
                findings.append(self._without_module(name, url, e))
        state = states.get(setup.instance) or next(iter(states.values()), None)
        if not addresses:
            text = "cannot be asked: this configuration has no listener. The rest cannot be told"
            return [warning("processes", text)], None
        if state is None:
            return [*findings, *(f for _, f in silent), *_nobody(findings)], None
        # Those that have just been started have not noted themselves yet.
        present = {other["instance"]: other for other in states.values()}
        present |= {process["instance"]: process for process in state["processes"]}
        # What cannot be reached from here is there if it has noted itself lately. Where nothing
        # listens it was there.
        findings += [f for name, f in silent if name in refused or name not in present]
        if not any(process["is_background"] for process in present.values()):
            findings.append(
                wrong(
                    "processes",
                    f"{_called(setup.background)} runs the background tasks and has not loaded the"
                    " module: delayed leaves are not restarted, and nobody is removed from calls",
                    f"the configuration that {_called(setup.background)} is started with",
                    *MODULES,
                )
            )
        if not findings:
            names = " and ".join(_called(name) for name in sorted(present))
            findings.append(
                ok(
                    "processes",
                    f"{names} {'has' if len(present) == 1 else 'have'} loaded the module",
                )
            )
        if state["not_served"]:
            findings.append(
                wrong(
                    "routes",
                    f"MSC4195's homeserver endpoints are not served: {state['not_served']}",
                )
            )
        here = {name: version(name) for name in ("synapse-lk-jwt", "matrix-synapse")}
        there = {name: state["versions"][name] for name in here}
        if here != there:
            findings.append(
                warning("versions", f"this command has {here}, and the running Synapse {there}")
            )
        return [*findings, *self._proxy(state), *self._transports(state)], state

    def _without_module(self, name: str, url: str, cause: NoModuleThere) -> Finding:
        if cause.has_module and cause.status != 404:
            text = f"{_called(name)} at {url} cannot say how it is ({cause}): see its log"
            return wrong("processes", text)
        if cause.has_module:
            return wrong(
                "processes",
                f"{_called(name)} at {url} runs with another livekit_secret than is in these files,"
                " or with another version of the module, or its clock is more than two minutes"
                " apart from this one's",
                "the command line",
                "systemctl restart matrix-synapse    # or however you restart Synapse",
            )
        return wrong(
            "processes",
            f"{_called(name)} at {url} has not loaded the module, or another module serves"
            f" {self.setup.module.path_prefix} ({cause})",
            f"the configuration that {_called(name)} is started with; then restart it",
            *MODULES,
        )

    def _proxy(self, state: State) -> list[Finding]:
        """Whether the running process takes the same way to LiveKit as this command."""
        proxy = self.setup.livekit_proxy
        here, there = proxy.url if proxy else None, state.get("livekit_proxy")
        if here == there:
            return []
        text = (
            f"the running Synapse connects to LiveKit {_way(there)}, and this command {_way(here)}:"
            " give this command the same HTTP_PROXY, HTTPS_PROXY and NO_PROXY as Synapse, or"
            " restart Synapse"
        )
        return [warning("proxy", text)]

    def _transports(self, state: State) -> list[Finding]:
        """Whether the running process says what these files say."""
        announced = livekit_transports(state["transports"])
        if not announced:
            text = "is empty, or not served, by the running Synapse: has it been restarted since?"
            return [warning("rtc/transports", text)]
        if livekit_transports(list(self.setup.transports)):
            is_old = not self.setup.is_among(announced)
        else:
            expected = self.setup.announced(has_msc4195=state["not_served"] is None)
            is_old = bool(expected) and announced != expected
        if is_old:
            named = " and ".join(map(destination, announced))
            text = f"names {named}, as the running Synapse has it: restart it"
            return [warning("rtc/transports", text)]
        return []


def _way(proxy_url: str | None) -> str:
    return f"through the proxy {proxy_url}" if proxy_url else "directly"


def _called(name: str) -> str:
    """What admins call a process."""
    return "the main process" if name == MAIN else name


def _nobody(findings: list[Finding]) -> list[Finding]:
    """What to say if no process has answered with the module, beside what is said of each."""
    if findings:
        return [warning("processes", "none has answered with the module: the rest cannot be told")]
    return [
        wrong(
            "processes",
            "none of Synapse's answers: is it running? The rest cannot be told",
            "the command line",
            "systemctl start matrix-synapse    # or however you start Synapse",
        )
    ]


MODULES = (
    "modules:",
    f"  - module: {MODULE}",
    "    config:",
    "      …    # the same block as for the main process",
)


async def check_webhooks(
    sfu: Sfu, running: Running, state: State, visit: Callable[[str], Awaitable[Finding]]
) -> list[Finding]:
    """Makes a LiveKit room of no call, has somebody look into it, and waits for the webhook.

    Args:
        sfu: LiveKit, which must answer.
        running: the homeserver.
        state: what one of its processes has answered.
        visit: what else to try with the room, before it is deleted.
    """
    livekit_room = f"{CHECK_ROOM}{secrets.token_hex(16)}"
    grants = VideoGrants(room_create=True)
    findings = []
    try:
        began_ms = (await running.ask_process(state["url"]))["now_ms"]
        request = CreateRoomRequest(name=livekit_room, empty_timeout=30, departure_timeout=1)
        answer = await sfu.call("CreateRoom", request, grants)
        if answer.status != 200:
            text = f"cannot be told: LiveKit answers {answer.status} to CreateRoom"
            return [warning("webhooks", text)]
        findings.append(await visit(livekit_room))
        await sfu.call("DeleteRoom", DeleteRoomRequest(room=livekit_room), grants)
        findings.append(await _wait_for_webhook(running, state["url"], began_ms))
    except (NoAnswer, NoModuleThere) as e:
        findings.append(warning("webhooks", f"cannot be told: {e}"))
    return findings


async def _wait_for_webhook(running: Running, url: str, began_ms: int) -> Finding:
    lines = (
        "webhook:",
        f"  api_key: {running.setup.module.livekit_key}",
        f'  urls: ["{running.webhook_url}"]',
    )
    is_refused = False
    for _ in range(round(WEBHOOK_SEC / ASK_AGAIN_SEC)):
        processes = (await running.ask_process(url))["processes"]
        if any(process["webhook_ts"] >= began_ms for process in processes):
            return ok("webhooks", "of LiveKit arrive")
        is_refused = any(process["rejected_ts"] >= began_ms for process in processes)
        await asyncio.sleep(ASK_AGAIN_SEC)
    if is_refused:
        return wrong(
            "webhooks",
            "of LiveKit do not arrive, but Synapse rejected a request that names your API key"
            " and has a wrong signature. It may be LiveKit's: compare the secret of that key with"
            " the one in LiveKit's configuration. Leaves are detected late",
            LIVEKIT_YAML,
            *lines,
        )
    return wrong(
        "webhooks",
        "of LiveKit do not arrive: none that is signed with livekit_key came within"
        f" {WEBHOOK_SEC} s of creating a room for this check. Leaves are detected late",
        f"{LIVEKIT_YAML}, with an address of Synapse that LiveKit can reach",
        *lines,
    )
