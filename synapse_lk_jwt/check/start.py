# SPDX-License-Identifier: Apache-2.0
"""The checks that need no waiting, in a Synapse that is starting or runs: each problem once."""

import logging
from collections.abc import Iterable, Mapping

from twisted.internet.error import ConnectError, DNSLookupError
from twisted.web.http_headers import Headers

from synapse_lk_jwt.check import settings
from synapse_lk_jwt.check.probe import MAX_ANSWER_BYTES, TIMEOUT_SEC, Answer, NoAnswer
from synapse_lk_jwt.check.report import Finding, Verdict
from synapse_lk_jwt.check.setup import Setup
from synapse_lk_jwt.check.sfu import ACCESS_RULE, Sfu
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.compat.http import NETWORK_ERRORS, read_body, within

logger = logging.getLogger(__name__)

# The module itself tells of these, where it finds out.
SAID_ALREADY = ("module", "routes", "Synapse")

# LiveKit may be started later, or with another configuration.
LOOK_AGAIN_MS = 300_000


class SynapseProbe:
    """Asks with Synapse's own HTTP client, which follows redirects."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver

    async def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Answer:
        """As `Probe` has it."""

        async def ask() -> Answer:
            response = await self._homeserver.http.request(
                method,
                url,
                body,
                Headers({name: [value] for name, value in (headers or {}).items()}),
            )
            return Answer(
                response.code,
                [
                    (name.decode("latin-1"), value.decode("latin-1"))
                    for name, values in response.headers.getAllRawHeaders()
                    for value in values
                ],
                await read_body(response, MAX_ANSWER_BYTES),
            )

        try:
            return await within(TIMEOUT_SEC, self._homeserver.clock, ask)
        except (ConnectError, DNSLookupError) as e:
            raise NoAnswer(f"no connection: {str(e).rstrip('.')}") from None
        except (*NETWORK_ERRORS, IndexError) as e:
            raise NoAnswer(f"the connection broke: {type(e).__name__}") from None


class StartChecks:
    """Logs what is wrong, without delaying or failing anything."""

    def __init__(self, homeserver: Homeserver, setup: Setup) -> None:
        """
        Args:
            homeserver: runs the checks; one process of it does.
            setup: its configuration, ahead of what the module changes in it.
        """
        self._homeserver = homeserver
        self._setup = setup
        self._sfu = Sfu(
            SynapseProbe(homeserver),
            setup.module,
            homeserver.clock.time_msec,
            setup.livekit_proxy,
        )
        # What was found at the last look at LiveKit. How far clocks are apart changes all the time.
        self._found: set[tuple[str, Verdict]] = set()
        # Whether LiveKit is known to enforce the access rule. One try is enough: each is an error
        # in its log.
        self._is_enforced = False

    def start(self) -> None:
        """Starts the checks, on the process that runs background tasks."""
        homeserver = self._homeserver
        if homeserver.runs_background_tasks:
            homeserver.background.run("synapse_lk_jwt_check", self._check_settings)
            homeserver.background.repeat(
                LOOK_AGAIN_MS, "synapse_lk_jwt_check", self._check_sfu, at_once=True
            )

    async def _check_settings(self) -> None:
        self._log(f for f in settings.check(self._setup) if f.check not in SAID_ALREADY)

    async def _check_sfu(self) -> None:
        try:
            findings = await self._sfu.check_rooms("", tries_access_rule=not self._is_enforced)
        except NoAnswer:
            # Whoever cannot use LiveKit at all says so.
            return
        self._log(f for f in findings if (f.check, f.verdict) not in self._found)
        self._found = {(f.check, f.verdict) for f in findings}
        self._is_enforced |= (ACCESS_RULE, Verdict.OK) in self._found

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
