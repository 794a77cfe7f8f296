# SPDX-License-Identifier: Apache-2.0
"""Checks that need a LiveKit room: whether clients connect to it, and whether webhooks arrive."""

import secrets
import time

from synapse_lk_jwt.check.livekit import is_loopback
from synapse_lk_jwt.check.livekit_requests import LiveKit
from synapse_lk_jwt.check.probe import NoAnswer, Probe
from synapse_lk_jwt.check.processes import NotThisModule, Running
from synapse_lk_jwt.check.public import Public
from synapse_lk_jwt.check.report import LIVEKIT_YAML, Finding, ok, skipped, warning, wrong
from synapse_lk_jwt.livekit.naming import CHECK_ROOM

# How long to wait for LiveKit's webhook, and the pause between two queries to Synapse, in seconds.
WEBHOOK_SEC = 6
QUERY_PAUSE_SEC = 0.05


class RoomChecks:
    """The findings about a LiveKit room that is no call, and exists for a moment."""

    def __init__(
        self, livekit: LiveKit, probe: Probe, running: Running, url: str | None, public: Public
    ) -> None:
        """
        Args:
            livekit: LiveKit's API.
            probe: sends requests as Synapse does.
            running: the homeserver.
            url: where one of its processes answers; None if none does.
            public: what clients see.
        """
        self._livekit = livekit
        self._probe = probe
        self._running = running
        self._url = url
        self._public = public

    def check(self) -> list[Finding]:
        """All findings about the room."""
        livekit_room = f"{CHECK_ROOM}{secrets.token_hex(16)}"
        findings: list[Finding] = []
        try:
            # Synapse notes by its own clock when webhooks arrive.
            began_ts = 0 if self._url is None else self._running.ask_process(self._url)["now_ts"]
            answer = self._probe.send(self._livekit.create_room(livekit_room))
            if answer.status != 200:
                cause = f"LiveKit answers {answer.status} to CreateRoom"
                return skipped(("livekit_url", "webhooks"), cause)
            findings.append(self._public.check_livekit_url(livekit_room))
            self._probe.send(self._livekit.delete_room(livekit_room))
            if self._url is None:
                return [*findings, *skipped(("webhooks",), "Synapse is not answering")]
            findings.append(self._wait_for_webhook(self._url, began_ts))
        except (NoAnswer, NotThisModule) as e:
            findings.append(warning("webhooks", f"cannot be checked: {e}"))
        return findings

    def _wait_for_webhook(self, url: str, began_ts: int) -> Finding:
        is_rejected = False
        for _ in range(round(WEBHOOK_SEC / QUERY_PAUSE_SEC)):
            processes = self._running.ask_process(url)["processes"]
            if any(process["webhook_ts"] >= began_ts for process in processes):
                return ok("webhooks", "from LiveKit arrive")
            is_rejected = any(process["rejected_ts"] >= began_ts for process in processes)
            time.sleep(QUERY_PAUSE_SEC)
        running, setup = self._running, self._running.setup
        lines = (
            "webhook:",
            f"  api_key: {setup.module.livekit_key}",
            f'  urls: ["{webhook_url(running)}"]',
        )
        if is_rejected:
            return wrong(
                "webhooks",
                "from LiveKit do not arrive, but Synapse rejected a request that names your API key"
                " and has a wrong signature. If LiveKit sent it, the secret of that key differs in"
                " livekit.yaml. Leaves are detected late",
                LIVEKIT_YAML,
                *lines,
            )
        return wrong(
            "webhooks",
            f"from LiveKit do not arrive: none was signed with livekit_key in the {WEBHOOK_SEC} s"
            f" after this check created a room. Leaves are detected late{_unreachable(running)}",
            LIVEKIT_YAML,
            *lines,
        )


def webhook_url(running: Running) -> str:
    """Where LiveKit can send its webhooks.

    A LiveKit on another machine, or in another container, cannot use an address of this machine
    alone. It can use the public URL.
    """
    module = running.setup.module
    if _is_out_of_reach(running):
        return f"{running.setup.service_url}/sfu_webhook"
    return f"{running.url or 'http://127.0.0.1:8008'}{module.path_prefix}/sfu_webhook"


def _is_out_of_reach(running: Running) -> bool:
    """Whether LiveKit cannot connect to the address at which this machine reaches Synapse."""
    url = running.url or "http://127.0.0.1:8008"
    is_elsewhere = not is_loopback(running.setup.module.livekit_internal_url)
    return "%2F" in url or (is_loopback(url) and is_elsewhere)


def _unreachable(running: Running) -> str:
    if not _is_out_of_reach(running):
        return ""
    return (
        ". LiveKit is on another machine or in another container, and can use neither 127.0.0.1 nor"
        " a socket of this machine"
    )
