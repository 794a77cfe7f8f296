# SPDX-License-Identifier: Apache-2.0
"""Checks of LiveKit: its API key, its clock, and whether it enforces the access rule."""

import os
import secrets
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import attr

from synapse_lk_jwt.check.livekit_requests import LiveKit
from synapse_lk_jwt.check.probe import Answer, NoAnswer, Steps
from synapse_lk_jwt.check.report import (
    COMMAND_LINE,
    LIVEKIT_YAML,
    Finding,
    ok,
    skipped,
    warning,
    wrong,
)
from synapse_lk_jwt.check.setup import Setup
from synapse_lk_jwt.livekit.naming import CHECK_ROOM
from synapse_lk_jwt.livekit.proxies import is_down_behind_proxy, is_redirect, redirected_url
from synapse_lk_jwt.livekit.requests import ROOM_SERVICE
from synapse_lk_jwt.livekit.tokens import LEEWAY_SEC, MUST_NOT_CREATE, rejected_option

# LiveKit's `Date` header has whole seconds, and the answer takes a while.
TOLERATED_SKEW_SEC = 5

# The place of the command that sets the clocks, and the command.
SET_CLOCKS = ("the command line of both machines", "timedatectl set-ntp true")

AUTO_CREATE_OFF = ("room:", "  auto_create: false")

ACCESS_RULE = "access rule"

# LiveKit's own changes: 1.8.2 is the first that resolves the claim `roomPreset`.
OLDEST_LIVEKIT = "1.8.2"

# All runs use one name. A LiveKit with Redis stores a node for every name in a request to /whip/v1,
# and keeps it even if the room is not created.
ACCESS_RULE_ROOM = f"{CHECK_ROOM}access-rule"

LIVEKIT_URL_HINT = "livekit_internal_url: http://127.0.0.1:7880    # LiveKit's own port"


class LiveKitChecks:
    """The findings about LiveKit."""

    def __init__(self, setup: Setup, livekit: LiveKit, time_msec: Callable[[], int]) -> None:
        """
        Args:
            setup: the homeserver's configuration.
            livekit: LiveKit's API.
            time_msec: milliseconds since the epoch.
        """
        self._setup = setup
        self._config = setup.module
        self._livekit = livekit
        self._time_msec = time_msec
        proxy = setup.livekit_proxy
        self._place = livekit.url + (f" through the proxy {proxy.url}" if proxy else "")

    def check(self) -> Steps[list[Finding]]:
        """All findings about LiveKit."""
        try:
            answer = yield self._livekit.list_rooms()
            problem = self._problem(answer)
            if problem is not None and answer.status == 404:
                problem = (yield from self._wrong_path()) or problem
        except NoAnswer as e:
            problem = self._unreachable(str(e))
        if problem is not None:
            return [problem, *skipped(("auto_create", ACCESS_RULE), "LiveKit cannot be used")]
        well = ok("LiveKit", f"answers at {self._place} and accepts the API key")
        try:
            return [well, *(yield from self.check_rooms())]
        except NoAnswer as e:
            problem = warning("auto_create", f"cannot be checked: {e}")
            return [well, problem, *skipped((ACCESS_RULE,), "auto_create cannot be checked")]

    def _wrong_path(self) -> Steps[Finding | None]:
        """Whether LiveKit answers without the path of the URL.

        Raises:
            NoAnswer
        """
        url, public = urlsplit(self._livekit.url), urlsplit(self._config.livekit_url)
        if not url.path:
            return None
        root = f"{url.scheme}://{url.netloc}"
        answer = yield attr.evolve(
            self._livekit.list_rooms(), url=f"{root}{ROOM_SERVICE}/ListRooms"
        )
        if self._problem(answer) is not None and rejected_option(answer.body) is None:
            return None
        option, value = "livekit_internal_url", root
        if (url.netloc, url.path) == (public.netloc, public.path):
            # Clients use this URL as well.
            option, value = "livekit_url", f"{public.scheme}://{public.netloc}"
        text = f"is at {root}, and not at {self._livekit.url}"
        return wrong("LiveKit", text, self._setup.block, f"{option}: {value}")

    def _unreachable(self, cause: str) -> Finding:
        url = self._livekit.url
        host = urlsplit(url).hostname or ""
        hint = LIVEKIT_URL_HINT
        text = f"does not answer at {self._place}: {cause}"
        if self._setup.livekit_proxy is not None:
            return wrong("LiveKit", text, *self._past_the_proxy())
        if "certificate" in cause or "TLS" in cause:
            hint = f"livekit_internal_url: http://{host}:7880    # LiveKit's own port has no TLS"
        elif is_loopback(url) and is_container():
            text += ". In a container, this address is the container itself"
            hint = "livekit_internal_url: http://livekit:7880    # the name of LiveKit's container"
        return wrong("LiveKit", text, self._setup.block, hint)

    def _past_the_proxy(self) -> tuple[str, str]:
        return (
            "homeserver.yaml, where it replaces NO_PROXY of the environment",
            f"no_proxy_hosts: [{urlsplit(self._livekit.url).hostname}]    # and the hosts of"
            " NO_PROXY",
        )

    def _problem(self, answer: Answer) -> Finding | None:
        """What is wrong with an answer to ListRooms."""
        if answer.status == 200 and answer.get("Content-Type").startswith("application/protobuf"):
            return None
        if answer.status == 401:
            problem = self._rejected(answer)
            if problem is not None:
                return problem
        if is_redirect(answer.status):
            return self._redirected(answer)
        block, url = self._setup.block, self._place
        is_twirp = isinstance(answer.json, dict) and "code" in answer.json
        if is_down_behind_proxy(answer.status, is_twirp):
            return wrong(
                "LiveKit",
                f"is down behind the proxy: {url} answers {answer.status}",
                "the command line of LiveKit's machine, unless the proxy forwards to a wrong port",
                "systemctl start livekit    # or however you start LiveKit",
            )
        if self._setup.livekit_proxy is not None and not is_twirp:
            text = f"is not at {url}: another server answers {answer.status}"
            return wrong("LiveKit", text, *self._past_the_proxy())
        if answer.is_html:
            text = (
                f"is not at {url}: a web page ({answer.status}) answers. It is another server, or a"
                " proxy that does not forward /twirp"
            )
            return wrong("LiveKit", text, block, LIVEKIT_URL_HINT)
        text = f"is not at {url}, or its API has another path: the answer is {answer.status}"
        return wrong("LiveKit", text, block, LIVEKIT_URL_HINT)

    def _rejected(self, answer: Answer) -> Finding | None:
        """The problem that LiveKit's 401 shows."""
        skew, key = self._skew_sec(answer), self._config.livekit_key
        if abs(skew) >= LEEWAY_SEC:
            text = f"differ: LiveKit's is {_apart(skew)}, so LiveKit rejects every token"
            return wrong("clocks", text, *SET_CLOCKS)
        option = rejected_option(answer.body)
        if option == "livekit_key":
            return wrong(
                "LiveKit",
                f"does not know the API key {key!r}. Compare livekit_key with 'keys:' in"
                " livekit.yaml, and add it there if it is new",
                LIVEKIT_YAML,
                "keys:",
                f"  {key}: …    # the value of livekit_secret",
            )
        if option != "livekit_secret":
            return None
        text = f"knows the API key {key!r} with another secret than livekit_secret"
        return wrong("LiveKit", text, *self._secret_to_write())

    def _secret_to_write(self) -> tuple[str, str]:
        """Where the secret is configured, and what to write there."""
        key, credentials = self._config.livekit_key, self._setup.credentials
        what = f"the secret below 'keys:' in livekit.yaml for {key}"
        option = credentials.secret_option
        if credentials.files:
            note = f"{what}, and nothing else: no quotes, no name, one line"
            if "key_file" in option.lower():
                note = f"{key}: and {what}"
            return f"{credentials.files[0]} ({option})", f"# {note}"
        if credentials.from_environment:
            return "the environment of Synapse", f"{option}=…    # {what}"
        return self._setup.block, f"{option}: …    # {what}"

    def _redirected(self, answer: Answer) -> Finding:
        url, block = self._livekit.url, self._setup.block
        to = redirected_url(answer.get("Location"), f"{ROOM_SERVICE}/ListRooms")
        if to is None:
            text = f"is not at {url}, which redirects to another page ({answer.status})"
            return wrong("LiveKit", text, block, LIVEKIT_URL_HINT)
        where = "https" if to.startswith("https:") else "another URL"
        text = f"at {url} redirects to {where} ({answer.status}), which Synapse does not follow"
        return wrong("LiveKit", text, block, f"livekit_internal_url: {to}")

    def _skew_sec(self, answer: Answer) -> int:
        """Seconds by which LiveKit's clock is ahead of ours; 0 if the answer has no time."""
        try:
            theirs = parsedate_to_datetime(answer.get("Date")).timestamp()
        except (ValueError, TypeError):
            return 0
        return round(theirs - self._time_msec() / 1000)

    def check_rooms(self, *, tries_access_rule: bool = True) -> Steps[list[Finding]]:
        """Which users can make LiveKit create rooms, and whether its clock is right.

        Args:
            tries_access_rule: whether to act as a restricted user who starts a call. LiveKit logs
                that as an error, with a stack trace.

        Raises:
            NoAnswer: if LiveKit does not answer, or rejects the key.
        """
        token = self._livekit.token_for(f"{CHECK_ROOM}{secrets.token_hex(16)}")
        answer = yield self._livekit.validate(token)
        if is_down_behind_proxy(answer.status, is_twirp=False):
            raise NoAnswer(f"a proxy answers {answer.status}: LiveKit is down behind it")
        skew = self._skew_sec(answer)
        findings = []
        if abs(skew) > TOLERATED_SKEW_SEC:
            text = (
                f"differ: LiveKit's is {_apart(skew)}. LiveKit rejects every token if"
                f" they differ by {LEEWAY_SEC} s"
            )
            findings.append(warning("clocks", text, *SET_CLOCKS))
        if answer.status != 401:
            findings.append(self._auto_create(answer))
            if tries_access_rule:
                findings.append((yield from self._access_rule()))
        elif not findings:
            raise NoAnswer("LiveKit rejects the API key")
        return findings

    def _auto_create(self, answer: Answer) -> Finding:
        if answer.status == 200 and answer.body == b"success":
            if self._config.full_access_homeservers.has_all:
                text = "is on, which makes no difference while full_access_homeservers is '*'"
                return ok("auto_create", text)
            return warning(
                "auto_create",
                "is on. Restricted users who try to start a call see a connection error instead of"
                " the reason",
                LIVEKIT_YAML,
                *AUTO_CREATE_OFF,
            )
        if answer.status == 404 and b"room" in answer.body:
            return ok("auto_create", "is off: the module creates the rooms")
        return self._untested("auto_create", f"/rtc/validate answers {answer.status}")

    def _access_rule(self) -> Steps[Finding]:
        """Tries to start a call as a restricted user does, and deletes the room if that works.

        This tries /whip/v1 first, because it creates rooms regardless of `auto_create`. Older
        LiveKits do not have it, and proxies may not forward it. Then clients have only /rtc.
        """
        livekit = self._livekit
        token = livekit.token_for(ACCESS_RULE_ROOM)
        enforced = ok(ACCESS_RULE, "is enforced: LiveKit creates no room for restricted users")
        path, is_refused = "/whip/v1", False
        try:
            answer = yield livekit.publish(token)
            # LiveKit spells it "confguration" before 1.9.9.
            if b"unknown room conf" in answer.body:
                return enforced
            # LiveKit 1.9.0 requires a grant for this path that the module never issues.
            if answer.status in (401, 403, 404):
                path = "/rtc"
                answer = yield livekit.connect(livekit.url, token)
                is_refused = not answer.is_html and (
                    answer.status == 500 or (answer.status == 404 and b"room" in answer.body)
                )
            result = f"{path} answers {answer.status}"
        except NoAnswer as e:
            result = f"{path}: {e}"
        if (yield from livekit.exists(ACCESS_RULE_ROOM)):
            yield livekit.delete_room(ACCESS_RULE_ROOM)
            return self._not_enforced(path)
        return enforced if is_refused else self._untested(ACCESS_RULE, result)

    def _untested(self, check: str, cause: str) -> Finding:
        text = f"cannot be tested: {cause}. Set livekit_internal_url to LiveKit's own port"
        return warning(check, text, self._setup.block, LIVEKIT_URL_HINT)

    def _not_enforced(self, path: str) -> Finding:
        text = (
            f"is not enforced: LiveKit created a room at {path} for a token that forbids it."
            f" LiveKit {OLDEST_LIVEKIT} and newer enforce it, unless room_configurations has"
            f" {MUST_NOT_CREATE}"
        )
        if self._config.full_access_homeservers.has_all:
            return warning(ACCESS_RULE, f"{text}. Guests can start calls")
        text = f"{text}. full_access_homeservers has no effect"
        if path == "/rtc":
            return wrong(ACCESS_RULE, text, LIVEKIT_YAML, *AUTO_CREATE_OFF)
        return wrong(
            ACCESS_RULE, text, COMMAND_LINE, "livekit-server --version    # then upgrade LiveKit"
        )


def is_container() -> bool:
    """Whether this process runs in a container of Docker or Podman."""
    return any(os.path.exists(path) for path in ("/.dockerenv", "/run/.containerenv"))


def is_loopback(url: str) -> bool:
    """Whether a URL has an address that works only on this machine."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def _apart(skew_sec: int) -> str:
    return f"{abs(skew_sec)} s {'ahead of' if skew_sec > 0 else 'behind'} this machine's"
