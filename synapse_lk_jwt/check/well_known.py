# SPDX-License-Identifier: Apache-2.0
"""Checks of `.well-known/matrix/client`, where older clients find the service."""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urljoin

from synapse.util.stringutils import parse_server_name

from synapse_lk_jwt.check.answers import CORS, CORS_LINES, cors_problem, describe
from synapse_lk_jwt.check.probe import Answer, NoAnswer, Probe, Refused, Request
from synapse_lk_jwt.check.processes import RESTART
from synapse_lk_jwt.check.report import COMMAND_LINE, Finding, ok, skipped, warning, wrong
from synapse_lk_jwt.check.setup import Setup
from synapse_lk_jwt.discovery import FOCI, Advertise, livekit_transports
from synapse_lk_jwt.identifiers import is_printable_url
from synapse_lk_jwt.livekit.proxies import is_down_behind_proxy, is_redirect

PATH = "/.well-known/matrix/client"
MAX_REDIRECTS = 3

# A larger document is not printed as one line to paste.
MAX_PRINTED_BYTES = 4096


class WellKnown:
    """The document at the server name, as clients fetch it."""

    def __init__(self, probe: Probe, setup: Setup) -> None:
        """
        Args:
            probe: sends requests as clients do.
            setup: the homeserver's configuration.
        """
        self._probe = probe
        self._setup = setup
        self._host, _ = parse_server_name(setup.server_name)
        self._url = f"https://{self._host}{PATH}"

    def base_url(self) -> str | None:
        """Where the document sends clients; None without a document, or without a plain URL."""
        try:
            content = self._get().json
        except NoAnswer:
            return None
        return _base_url(content) if isinstance(content, dict) else None

    def check(
        self, inside: Probe, synapse_url: str | None, *, has_these_settings: bool = True
    ) -> Finding:
        """The finding about the document.

        Args:
            inside: sends requests to Synapse itself.
            synapse_url: where Synapse itself answers.
            has_these_settings: whether Synapse runs with the settings in the files.
        """
        if self._setup.module.advertise is Advertise.MSC4195:
            text = "is not needed: advertise is msc4195, and the document cannot name its endpoints"
            return ok(".well-known", text)
        try:
            answer = self._get()
        except Refused as e:
            return self._wrong(f"{self._url} cannot be read: {e}", self._lines({}))
        except NoAnswer as e:
            return self._wrong(f"{self._url} cannot be read: {e}", ())
        content = answer.json
        if answer.status != 200 or not isinstance(content, dict):
            return self._no_document(answer)
        problem = cors_problem(answer)
        if problem is not None:
            lines = CORS_LINES if answer.all(CORS) else self._lines(content)
            return self._wrong(f"{self._url} {problem}", lines)
        problem = self._foci_problem(content)
        if problem is not None:
            if self._is_synapses(content, inside, synapse_url):
                if not has_these_settings:
                    cause = "Synapse serves it, and runs with other settings, see above"
                    return skipped((".well-known",), cause)[0]
                text = f"{self._url}, which Synapse serves, {problem}. Older clients find no calls"
                return wrong(".well-known", text, COMMAND_LINE, RESTART)
            return self._wrong(f"{self._url} {problem}", self._lines(content))
        return self._base_url_finding(content)

    def _get(self) -> Answer:
        url = self._url
        for _ in range(MAX_REDIRECTS):
            answer = self._probe.send(Request("GET", url))
            if not is_redirect(answer.status):
                break
            url = urljoin(url, answer.get("Location"))
            if not url.startswith(("https:", "http:")):
                raise NoAnswer("it redirects to something that is not a web address")
        return answer

    def _no_document(self, answer: Answer) -> Finding:
        if is_down_behind_proxy(answer.status, is_twirp=False):
            text = f"{self._url} is answered {describe(answer)}: its proxy gets no answer"
            return self._wrong(text, ())
        if answer.status == 200 and not answer.is_html and answer.body:
            # The document is invalid, but its other entries must be kept.
            text = f"{self._url} is not valid JSON{_place(answer.body)}"
            return self._wrong(text, (f'"{FOCI}": {json.dumps(self._foci({}))}',))
        return self._wrong(f"{self._url} is answered {describe(answer)}", self._lines({}))

    def _foci_problem(self, content: Mapping[str, Any]) -> str | None:
        named = [
            str(focus["livekit_service_url"]).rstrip("/")
            for focus in livekit_transports(content.get(FOCI))
            if focus.get("livekit_service_url")
        ]
        if not named:
            return f"does not have {FOCI}"
        if self._setup.service_url not in named:
            return f"names {' and '.join(named)}, and not {self._setup.service_url}"
        return None

    def _base_url_finding(self, content: Mapping[str, Any]) -> Finding:
        setup = self._setup
        homeserver = content.get("m.homeserver")
        named = homeserver.get("base_url") if isinstance(homeserver, dict) else None
        # If public_baseurl is not set, another check proposes this URL for it.
        if str(named).rstrip("/") == setup.public_baseurl or not setup.has_public_baseurl:
            return ok(".well-known", f"names the service, at {self._url}")
        text = (
            f"{self._url} sends clients to {str(named)[:200]}, while public_baseurl is"
            f" {setup.public_baseurl}/. One of the two is wrong"
        )
        base_url = _base_url(content)
        if base_url is None:
            return warning(".well-known", text)
        place = f"{setup.file('public_baseurl')}, if clients are right"
        return warning(".well-known", text, place, f"public_baseurl: {base_url}")

    def _is_synapses(
        self, content: Mapping[str, Any], inside: Probe, synapse_url: str | None
    ) -> bool:
        """Whether Synapse serves this document, and not a web server from a file."""
        if synapse_url is None:
            return False
        try:
            own: object = inside.send(Request("GET", f"{synapse_url}{PATH}")).json
        except NoAnswer:
            return False
        return own == content

    def _wrong(self, text: str, lines: tuple[str, ...]) -> Finding:
        place = f"the configuration of the web server of {self._host}"
        if lines and lines[0].startswith(("location", "#")):
            place += " (nginx)"
        elif lines:
            place = f"the document that the web server of {self._host} serves"
        return wrong(".well-known", f"{text}. Older clients find no calls", place, *lines)

    def _lines(self, content: Mapping[str, Any]) -> tuple[str, ...]:
        """What to write, with all other entries of the document as they were fetched."""
        merged = {**content, FOCI: self._foci(content)}
        if "m.homeserver" not in merged:
            merged["m.homeserver"] = {"base_url": f"{self._setup.public_baseurl}/"}
        text = _for_nginx(merged)
        if len(text) > MAX_PRINTED_BYTES:
            return (f'"{FOCI}": {json.dumps(merged[FOCI])}',)
        return (
            f"location = {PATH} {{",
            "    default_type application/json;",
            f"    add_header {CORS} *;",
            f"    return 200 '{text}';",
            "}",
        )

    def _foci(self, content: Mapping[str, Any]) -> list[Any]:
        """The module's entry, and the entries that do not name a LiveKit."""
        foci = content.get(FOCI)
        entries = foci if isinstance(foci, list) else []
        livekits = livekit_transports(entries)
        ours = {"type": "livekit", "livekit_service_url": self._setup.service_url}
        return [ours, *(e for e in entries if isinstance(e, dict) and e not in livekits)]


def _base_url(content: Mapping[str, Any]) -> str | None:
    homeserver = content.get("m.homeserver")
    url = homeserver.get("base_url") if isinstance(homeserver, dict) else None
    return url if isinstance(url, str) and is_printable_url(url) else None


def _for_nginx(content: Mapping[str, Any]) -> str:
    """A document as JSON that nginx accepts between single quotes.

    nginx replaces `$name` by a variable, and a backslash before a quote or a backslash is its own.
    """
    text = json.dumps(content, separators=(",", ":"))
    # These characters are only in strings, where JSON has another form for them.
    text = text.replace("$", "\\u0024").replace("'", "\\u0027")
    return text.replace("\\", "\\\\")


def _place(body: bytes) -> str:
    """The place where a document is not valid JSON, if it is known."""
    try:
        json.loads(body)
    except json.JSONDecodeError as e:
        return f" (line {e.lineno}, column {e.colno})"
    except (ValueError, RecursionError):
        return ""
    return ": it is not an object"
