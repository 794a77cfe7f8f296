# SPDX-License-Identifier: Apache-2.0
"""The checks that a starting or running Synapse does. Each problem is one line of the log."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from twisted.internet.error import ConnectError, DNSLookupError
from twisted.web.http_headers import Headers

from synapse_lk_jwt.check import settings
from synapse_lk_jwt.check.livekit import ACCESS_RULE, LiveKitChecks
from synapse_lk_jwt.check.livekit_requests import LiveKit
from synapse_lk_jwt.check.probe import (
    MAX_ANSWER_BYTES,
    TIMEOUT_SEC,
    Answer,
    NoAnswer,
    Request,
    Steps,
    T,
)
from synapse_lk_jwt.check.report import Finding, Verdict
from synapse_lk_jwt.check.setup import Setup, from_synapse
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.compat.http import NETWORK_ERRORS, read_body, within
from synapse_lk_jwt.config import LiveKitJwtConfig

logger = logging.getLogger(__name__)

# The module logs the first three problems elsewhere. The others are improvements, which do not
# justify a warning at each start.
NOT_AT_START = ("module", "routes", "Synapse", "MSC4222", "x_forwarded", "secret file")

# LiveKit may be started later, or with another configuration.
CHECK_AGAIN_MS = 300_000


class StartChecks:
    """Logs problems of the configuration and of LiveKit, without delaying or failing anything.

    Attributes:
        report: the settings of this process and the checks that found a problem in them, for the
            check command.
    """

    def __init__(self, homeserver: Homeserver, config: LiveKitJwtConfig) -> None:
        """Must be constructed before the module changes Synapse's configuration.

        Args:
            homeserver: runs the checks, on the process that runs background tasks.
            config: the module's configuration.
        """
        self._homeserver = homeserver
        self._findings: list[Finding] = []
        self.report: Mapping[str, Any] = {"settings": {}, "problems": []}
        self._livekit: LiveKitChecks | None = None
        # The findings of the last check of LiveKit, without texts: clock differences always change.
        self._found: set[tuple[str, Verdict]] = set()
        # Whether LiveKit is known to enforce the access rule. It is tested once, because LiveKit
        # logs each test as an error.
        self._is_enforced = False
        try:
            setup = from_synapse(homeserver.config, config)
            self._findings = [f for f in settings.check(setup) if f.verdict is not Verdict.OK]
            self.report = {"settings": setup.settings(), "problems": _problems(self._findings)}
            self._livekit = _livekit_checks(setup, homeserver)
        except Exception as e:
            # The checks read many options of Synapse that no other part needs, and their form may
            # change. The module issues tokens without these checks.
            logger.warning(
                "Skipped the checks at start: they cannot read the configuration of this Synapse"
                " (%s)",
                type(e).__name__,
            )

    def start(self) -> None:
        """Logs the problems of the configuration, and begins to check LiveKit."""
        if self._livekit is None or not self._homeserver.runs_background_tasks:
            return
        self._log(f for f in self._findings if f.check not in NOT_AT_START)
        self._homeserver.background.repeat(
            CHECK_AGAIN_MS, "synapse_lk_jwt_check", self._check_livekit, at_once=True
        )

    async def _check_livekit(self) -> None:
        assert self._livekit is not None
        steps = self._livekit.check_rooms(tries_access_rule=not self._is_enforced)
        try:
            findings = await self._run(steps)
        except NoAnswer:
            # The client of LiveKit's API logs that LiveKit cannot be used.
            return
        self._log(f for f in findings if (f.check, f.verdict) not in self._found)
        self._found = {(f.check, f.verdict) for f in findings}
        self._is_enforced |= (ACCESS_RULE, Verdict.OK) in self._found

    async def _run(self, steps: Steps[T]) -> T:
        """As `Probe.run`, with Synapse's HTTP client."""
        try:
            request = next(steps)
            while True:
                try:
                    answer = await self._send(request)
                except NoAnswer as e:
                    request = steps.throw(e)
                else:
                    request = steps.send(answer)
        except StopIteration as e:
            result: T = e.value
            return result

    async def _send(self, request: Request) -> Answer:
        """Sends a request with Synapse's own HTTP client, which follows redirects."""

        async def send() -> Answer:
            response = await self._homeserver.http.request(
                request.method,
                request.url,
                request.body,
                Headers({name: [value] for name, value in request.headers.items()}),
            )
            headers = [
                (name.decode("latin-1"), value.decode("latin-1"))
                for name, values in response.headers.getAllRawHeaders()
                for value in values
            ]
            return Answer(response.code, headers, await read_body(response, MAX_ANSWER_BYTES))

        try:
            return await within(TIMEOUT_SEC, self._homeserver.clock, send)
        except (ConnectError, DNSLookupError) as e:
            raise NoAnswer(f"no connection: {str(e).rstrip('.')}") from None
        except (*NETWORK_ERRORS, IndexError) as e:
            raise NoAnswer(f"the connection broke: {type(e).__name__}") from None

    def _log(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            if finding.verdict is not Verdict.OK:
                level = logging.ERROR if finding.verdict is Verdict.WRONG else logging.WARNING
                logger.log(
                    level,
                    "%s: %s. %s",
                    finding.check,
                    finding.text,
                    self._homeserver.check_command,
                )


def _problems(findings: Iterable[Finding]) -> list[str]:
    """The names of the checks that found a problem."""
    return list(dict.fromkeys(f.check for f in findings if f.verdict is Verdict.WRONG))


def _livekit_checks(setup: Setup, homeserver: Homeserver) -> LiveKitChecks:
    time_msec = homeserver.clock.time_msec
    return LiveKitChecks(setup, LiveKit(setup, time_msec), time_msec)
