# SPDX-License-Identifier: Apache-2.0
"""Checks of Synapse's processes. Each one reports its state in answer to a signed request."""

import json
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import attr

from synapse_lk_jwt.check.probe import NoAnswer, Probe, Refused, Request
from synapse_lk_jwt.check.report import COMMAND_LINE, Finding, is_all_well, ok, warning, wrong
from synapse_lk_jwt.check.setup import MODULE, Setup
from synapse_lk_jwt.check.signature import sign
from synapse_lk_jwt.compat.config import MAIN
from synapse_lk_jwt.discovery import destination, livekit_transports

# What a process of Synapse reports about itself: the answer of `api/check.py`.
State = Mapping[str, Any]

# The keys that only an answer of the module has.
STATE_KEYS = {
    "server_name",
    "instance",
    "processes",
    "transports",
    "not_served",
    "versions",
    "settings",
    "problems",
}

MODULES = (
    "modules:",
    f"  - module: {MODULE}",
    "    config:",
    "      …    # the same block as for the main process",
)

RESTART = "systemctl restart matrix-synapse    # or however you restart Synapse"


_NO_BACKGROUND = (
    ". It runs the background tasks. Delayed leave events are not being restarted, and participants"
    " are not being removed"
)


class NotThisModule(Exception):
    """The answer is not of this module with this configuration.

    Attributes:
        status: the HTTP status of the answer.
        has_module: whether it is this module, with another secret or version.
    """

    def __init__(self, status: int, has_module: bool) -> None:
        super().__init__(f"it answers {status}")
        self.status = status
        self.has_module = has_module


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Running:
    """The running homeserver.

    Attributes:
        probe: sends the requests.
        setup: its configuration.
        time_msec: milliseconds since the epoch.
    """

    probe: Probe
    setup: Setup
    time_msec: Callable[[], int]

    @property
    def url(self) -> str | None:
        """Where the process of this configuration listens; None if it does not.

        A listener for clients without TLS is preferred: it is the best one for LiveKit and proxies.
        """
        listeners = sorted(
            self.setup.listeners,
            key=lambda at: ("client" not in at.resources, at.url.startswith("https:")),
        )
        return listeners[0].url if listeners else None

    def ask(self, service_url: str, **question: str) -> State:
        """Requests the state of a process, and what decides about a user's calls.

        Args:
            service_url: where the service endpoints are.
            question: `user_id` and `room_id`, or nothing.

        Raises:
            NoAnswer: if no answer arrives.
            NotThisModule: if it is not this module with this configuration.
        """
        body = json.dumps(question).encode("ascii")
        signature = sign(self.setup.module.livekit_secret, body, self.time_msec())
        answer = self.probe.send(
            Request("POST", f"{service_url}/check", {"Authorization": signature}, body)
        )
        state = answer.json
        if answer.status == 200 and isinstance(state, dict) and state.keys() >= STATE_KEYS:
            return state
        health = self.probe.send(Request("GET", f"{service_url}/healthz"))
        raise NotThisModule(answer.status, health.status == 200 and health.json == {})

    def ask_process(self, url: str, **question: str) -> State:
        """As `ask`, at a listener of a process."""
        return self.ask(f"{url}{self.setup.module.path_prefix}", **question)


class ProcessChecks:
    """The findings about the processes.

    Attributes:
        state: the report of the first process that answered.
        url: where that process listens.
    """

    def __init__(self, running: Running) -> None:
        self.state: State | None = None
        self.url: str | None = None
        self._running = running
        self._setup = running.setup
        self._states: dict[str, State] = {}

    def check(self) -> list[Finding]:
        """All findings about the processes."""
        addresses = dict(self._setup.workers)
        if self._running.url is not None:
            addresses[self._setup.instance] = self._running.url
        if not addresses:
            text = "cannot be queried: this configuration has no listener"
            return [warning("processes", text)]
        problems, silent = self._ask(addresses)
        if not self._states:
            found = [*problems.values(), *silent.values()]
            return found + _no_process(found)
        name = next(iter(self._states))
        if self._setup.instance in self._states:
            name = self._setup.instance
        self.state, self.url = self._states[name], addresses[name]
        return [
            *self._loaded(self.state, problems, silent),
            *self._routes(self.state),
            *self._versions(self.state),
            *self._proxy(self.state),
            *self._settings(),
        ]

    def _ask(self, addresses: Mapping[str, str]) -> tuple[dict[str, Finding], dict[str, Finding]]:
        """Requests the state of all processes.

        Returns:
            The findings about processes with a problem, and about those that this machine cannot
            connect to, by the names of the processes.
        """
        problems: dict[str, Finding] = {}
        silent: dict[str, Finding] = {}
        for name, url in addresses.items():
            try:
                self._states[name] = self._running.ask_process(url)
            except NoAnswer as e:
                finding = warning("processes", f"{_called(name)} does not answer at {url}: {e}")
                # If nothing listens, the process does not run. A process that this machine cannot
                # connect to may still run.
                if isinstance(e, Refused):
                    problems[name] = finding
                else:
                    silent[name] = finding
            except NotThisModule as e:
                problems[name] = self._without_module(name, url, e)
        return problems, silent

    def _loaded(
        self, state: State, problems: Mapping[str, Finding], silent: Mapping[str, Finding]
    ) -> Iterator[Finding]:
        """Which processes have loaded the module."""
        # A process that has just been started is not in the table yet.
        present = {other["instance"]: other for other in self._states.values()}
        present |= {process["instance"]: process for process in state["processes"]}
        found = [*problems.values(), *(f for name, f in silent.items() if name not in present)]
        background = self._setup.background
        is_known = background in problems and not is_all_well([problems[background]])
        if not is_known and not any(process["is_background"] for process in present.values()):
            text = f"{_called(background)} has not loaded the module{_NO_BACKGROUND}"
            place = f"the configuration that {_called(background)} is started with"
            found.append(wrong("processes", text, place, *MODULES))
        names = " and ".join(_called(name) for name in sorted(present))
        verb = "has" if len(present) == 1 else "have"
        yield from found or [ok("processes", f"{names} {verb} loaded the module")]

    def _without_module(self, name: str, url: str, cause: NotThisModule) -> Finding:
        if cause.has_module and cause.status != 404:
            text = f"{_called(name)} at {url} fails to report its state ({cause}). See its log"
            return wrong("processes", text)
        if cause.has_module:
            return wrong(
                "processes",
                f"{_called(name)} at {url} runs with another livekit_secret than these files have."
                " Or it has another version of the module, or its clock differs from this"
                " machine's by more than two minutes",
                COMMAND_LINE,
                RESTART,
            )
        return wrong(
            "processes",
            f"{_called(name)} at {url} has not loaded the module, or another module serves"
            f" {self._setup.module.path_prefix} ({cause})"
            f"{_NO_BACKGROUND * (name == self._setup.background)}",
            f"the configuration that {_called(name)} is started with; then restart it",
            *MODULES,
        )

    def _routes(self, state: State) -> Iterator[Finding]:
        if state["not_served"]:
            text = f"MSC4195's homeserver endpoints are not served: {state['not_served']}"
            yield wrong("routes", text)

    def _versions(self, state: State) -> Iterator[Finding]:
        here = {name: version(name) for name in ("synapse-lk-jwt", "matrix-synapse")}
        there = {name: state["versions"][name] for name in here}
        if here != there:
            yield warning(
                "versions",
                f"this command has {_versions(here)}, and the running Synapse {_versions(there)}."
                " Restart Synapse, or run the command with Synapse's Python",
            )

    def _proxy(self, state: State) -> Iterator[Finding]:
        """Whether the running process connects to LiveKit as this command does."""
        proxy = self._setup.livekit_proxy
        here, there = proxy.url if proxy else None, state.get("livekit_proxy")
        if here != there:
            yield warning(
                "proxy",
                f"the running Synapse connects to LiveKit {_route(there)}, and this command"
                f" {_route(here)}. Set HTTP_PROXY, HTTPS_PROXY and NO_PROXY for this command as for"
                " Synapse, or restart Synapse",
            )

    def _settings(self) -> Iterator[Finding]:
        """Whether the processes run with the settings in the files."""
        here = self._setup.settings()
        is_all_well = True
        for name, state in self._states.items():
            differences = [
                f"{option} is {_shown(state['settings'][option])}, in the files {_shown(value)}"
                for option, value in here.items()
                if state["settings"].get(option, value) != value
            ]
            if not differences:
                continue
            is_all_well = False
            finding = wrong if state["problems"] else warning
            problems = ""
            if state["problems"]:
                problems = f" These cause problems with {' and '.join(state['problems'])}."
            yield finding(
                "settings",
                f"{_called(name)} runs with other settings than these files have:"
                f" {'; '.join(differences)}.{problems} Restart Synapse. If LIVEKIT_* variables"
                " configure it, set the same ones for this command",
                COMMAND_LINE,
                RESTART,
            )
        if is_all_well:
            yield ok("settings", "of the running Synapse are those in the files")
        yield from self._transports(is_all_well)

    def _transports(self, has_these_settings: bool) -> Iterator[Finding]:
        """Whether the running process announces the transports of these settings."""
        assert self.state is not None
        announced = livekit_transports(self.state["transports"])
        expected = self._setup.announced(has_msc4195=self.state["not_served"] is None)
        if not has_these_settings or announced == expected:
            return
        named = " and ".join(map(destination, announced)) or "no LiveKit"
        text = f"names {named} in the running Synapse. Restart Synapse, and see its log"
        yield warning("rtc/transports", text)


def _shown(value: str) -> str:
    return repr(value) if value else "empty"


def _versions(of: Mapping[str, str]) -> str:
    return " and ".join(f"{name} {number}" for name, number in of.items())


def _route(proxy_url: str | None) -> str:
    return f"through the proxy {proxy_url}" if proxy_url else "directly"


def _called(name: str) -> str:
    """The name that admins use for a process."""
    return "the main process" if name == MAIN else name


def _no_process(problems: list[Finding]) -> list[Finding]:
    """The finding if no process with the module answered."""
    if not is_all_well(problems):
        return []
    return [
        wrong(
            "processes",
            "Synapse is not answering on any listener. Is it running?",
            COMMAND_LINE,
            "systemctl start matrix-synapse    # or however you start Synapse",
        )
    ]
