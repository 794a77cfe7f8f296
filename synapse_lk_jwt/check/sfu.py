# SPDX-License-Identifier: Apache-2.0
"""What LiveKit answers, and whether it keeps restricted users from starting calls."""

import secrets
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from google.protobuf.message import DecodeError, Message
from livekit.api import VideoGrants
from livekit.protocol.room import DeleteRoomRequest, ListRoomsRequest, ListRoomsResponse

from synapse_lk_jwt.check.probe import Answer, NoAnswer, Probe
from synapse_lk_jwt.check.report import LIVEKIT_YAML, Finding, ok, warning, wrong
from synapse_lk_jwt.compat.forward_proxy import ForwardProxy
from synapse_lk_jwt.config import LiveKitJwtConfig
from synapse_lk_jwt.livekit.naming import CHECK_ROOM
from synapse_lk_jwt.livekit.proxies import is_down_behind_proxy, is_redirect, redirected_url
from synapse_lk_jwt.livekit.tokens import LEEWAY_SEC, MUST_NOT_CREATE, TokenSigner, rejected_option

# LiveKit tells its time in whole seconds, and the answer takes a while.
TOLERATED_SKEW_SEC = 5

# Where, and what to write.
SET_CLOCKS = ("both machines, on the command line", "timedatectl set-ntp true")

AUTO_CREATE_OFF = ("room:", "  auto_create: false")

ACCESS_RULE = "access rule"

# LiveKit's own changes: 1.8.2 is the first that resolves the claim `roomPreset`.
OLDEST_LIVEKIT = "1.8.2"

# One name for all runs: a LiveKit with Redis stores a node for every name that is asked for at
# /whip/v1, and does not forget it if the room is not created.
ACCESS_RULE_ROOM = f"{CHECK_ROOM}access-rule"

# The smallest offer that LiveKit accepts. No media ever follows.
WHIP_OFFER = "\r\n".join(
    (
        "v=0",
        "o=- 0 0 IN IP4 127.0.0.1",
        "s=-",
        "t=0 0",
        "a=group:BUNDLE 0",
        "m=audio 9 UDP/TLS/RTP/SAVPF 111",
        "c=IN IP4 0.0.0.0",
        "a=mid:0",
        "a=sendonly",
        "a=rtcp-mux",
        "a=ice-ufrag:check",
        "a=ice-pwd:synapse-lk-jwt-check-only",
        f"a=fingerprint:sha-256 {':'.join(['00'] * 32)}",
        "a=setup:actpass",
        "a=rtpmap:111 opus/48000/2",
        "",
    )
).encode("ascii")

LIST_ROOMS = "/twirp/livekit.RoomService/ListRooms"

LIVEKIT_URL_HINT = "livekit_internal_url: http://127.0.0.1:7880    # LiveKit's own port"


class Sfu:
    """LiveKit, asked with the module's key."""

    def __init__(
        self,
        probe: Probe,
        config: LiveKitJwtConfig,
        time_msec: Callable[[], int],
        proxy: ForwardProxy | None = None,
    ) -> None:
        """
        Args:
            probe: asks.
            config: where LiveKit is, and with which key to ask.
            time_msec: milliseconds since the epoch.
            proxy: the forward proxy that the probe goes through, if any.
        """
        self._probe = probe
        self.config = config
        self.signer = TokenSigner(config.livekit_key, config.livekit_secret, time_msec)
        self._time_msec = time_msec
        self._proxy = proxy
        self._way = f" through the proxy {proxy.url}" if proxy else ""

    async def call(self, method: str, request: Message, grants: VideoGrants) -> Answer:
        """Asks LiveKit's RoomService.

        Raises:
            NoAnswer: if nobody answers.
        """
        return await self._probe.request(
            "POST",
            f"{self.config.livekit_internal_url}/twirp/livekit.RoomService/{method}",
            {
                "Authorization": f"Bearer {self.signer.api_token(grants)}",
                "Content-Type": "application/protobuf",
            },
            request.SerializeToString(),
        )

    async def validate(self, api_url: str, token: str) -> Answer:
        """Asks whether a token would get its holder into a room, and lets nobody in.

        Raises:
            NoAnswer: if nobody answers.
        """
        # Not in the URL, as clients have it: that may be logged.
        headers = {"Authorization": f"Bearer {token}"}
        return await self._probe.request("GET", f"{api_url}/rtc/validate", headers)

    async def connect(self, api_url: str, token: str) -> Answer:
        """Opens a WebSocket as a client does, and closes it again.

        Raises:
            NoAnswer: if there is no answer. Twisted's client takes a 101 for none.
        """
        headers = {
            "Authorization": f"Bearer {token}",
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "c3luYXBzZS1say1qd3QtIQ==",
        }
        return await self._probe.request("GET", f"{api_url}/rtc?protocol=15", headers)

    def token_for(self, livekit_room: str) -> str:
        """A token of no user, to listen in a room that exists."""
        return self.signer.participant_token(
            "synapse-lk-jwt-check",
            livekit_room,
            may_create_room=False,
            can_publish=False,
            can_update_own_metadata=False,
            attributes={},
            lifetime_ms=60_000,
        )

    async def check(self, file: str) -> list[Finding]:
        """All findings about LiveKit.

        Args:
            file: where to write a key of the module.
        """
        try:
            answer = await self.call("ListRooms", ListRoomsRequest(), VideoGrants(room_list=True))
        except NoAnswer as e:
            return [self._unreachable(str(e), file)]
        trouble = self._trouble(answer, self._skew_sec(answer), file)
        if trouble is not None:
            return [trouble]
        url = f"{self.config.livekit_internal_url}{self._way}"
        well = ok("LiveKit", f"answers at {url}, with our key")
        try:
            return [well, *await self.check_rooms(file)]
        except NoAnswer as e:
            return [well, warning("auto_create", f"cannot be told: {e}")]

    def _unreachable(self, cause: str, file: str) -> Finding:
        url = self.config.livekit_internal_url
        parts = urlsplit(url)
        hint = LIVEKIT_URL_HINT
        if "certificate" in cause or "TLS" in cause:
            hint = f"livekit_internal_url: http://{parts.hostname}:7880    # LiveKit has no TLS"
        text = f"does not answer at {url}{self._way}: {cause}"
        if self._proxy is not None:
            return wrong("LiveKit", text, *self._past_the_proxy())
        return wrong("LiveKit", text, file, hint)

    def _past_the_proxy(self) -> tuple[str, str]:
        host = urlsplit(self.config.livekit_internal_url).hostname
        return (
            "homeserver.yaml, where it replaces NO_PROXY of the environment",
            f"no_proxy_hosts: [{host}]    # and the hosts that NO_PROXY has",
        )

    def _trouble(self, answer: Answer, skew: int, file: str) -> Finding | None:
        """What is wrong with an answer to ListRooms."""
        url, key = self.config.livekit_internal_url, self.config.livekit_key
        if answer.status == 200 and answer.get("Content-Type").startswith("application/protobuf"):
            return None
        if answer.status == 401 and abs(skew) >= LEEWAY_SEC:
            return wrong(
                "clocks",
                f"LiveKit's is {_apart(skew)}, and it refuses every token",
                *SET_CLOCKS,
            )
        if answer.status == 401 and rejected_option(answer.body) == "livekit_key":
            return wrong(
                "LiveKit",
                f"does not know the key {key!r}",
                LIVEKIT_YAML,
                "keys:",
                f"  {key}: …    # what livekit_secret has",
            )
        if answer.status == 401 and rejected_option(answer.body) == "livekit_secret":
            return wrong(
                "LiveKit",
                f"knows the key {key!r} with another secret than livekit_secret",
                file,
                f"livekit_secret_path: /etc/matrix-synapse/livekit_secret    # what LiveKit's"
                f" configuration has below keys: for {key}",
            )
        if is_redirect(answer.status):
            return self._redirected(answer, file)
        is_twirp = isinstance(answer.json, dict) and "code" in answer.json
        if is_down_behind_proxy(answer.status, is_twirp):
            return wrong(
                "LiveKit",
                f"is down behind the proxy: {url}{self._way} answers {answer.status}",
                "the command line of LiveKit's machine, unless the proxy forwards to a wrong port",
                "systemctl start livekit    # or however you start LiveKit",
            )
        if self._proxy is not None and not is_twirp:
            text = f"what answers at {url}{self._way} ({answer.status}) is not LiveKit"
            return wrong("LiveKit", text, *self._past_the_proxy())
        if answer.is_html:
            text = f"a web page ({answer.status}) answers at {url}: a proxy that does not forward"
            return wrong("LiveKit", f"{text} /twirp, or another server", file, LIVEKIT_URL_HINT)
        text = f"what answers at {url} ({answer.status}) is not LiveKit, or not its API"
        return wrong("LiveKit", text, file, LIVEKIT_URL_HINT)

    def _redirected(self, answer: Answer, file: str) -> Finding:
        url = self.config.livekit_internal_url
        to = redirected_url(answer.get("Location"), LIST_ROOMS)
        if to is None:
            text = f"{url} redirects to another page ({answer.status}): that is not LiveKit's API"
            return wrong("LiveKit", text, file, LIVEKIT_URL_HINT)
        where = "https" if to.startswith("https:") else "another URL"
        text = f"{url} redirects to {where} ({answer.status}), which Synapse does not follow"
        return wrong("LiveKit", text, file, f"livekit_internal_url: {to}")

    def _skew_sec(self, answer: Answer) -> int:
        """Seconds by which LiveKit's clock is ahead of ours; 0 if it does not say."""
        try:
            theirs = parsedate_to_datetime(answer.get("Date")).timestamp()
        except (ValueError, TypeError):
            return 0
        return round(theirs - self._time_msec() / 1000)

    async def check_rooms(self, file: str, *, tries_access_rule: bool = True) -> list[Finding]:
        """Who can make LiveKit create rooms, and whether its clock is right.

        Args:
            file: where to write an option of the module.
            tries_access_rule: whether to act as a restricted user who starts a call. LiveKit logs
                that as an error, with a stack trace.

        Raises:
            NoAnswer: if LiveKit does not answer, or rejects the key.
        """
        token = self.token_for(f"{CHECK_ROOM}{secrets.token_hex(16)}")
        answer = await self.validate(self.config.livekit_internal_url, token)
        if is_down_behind_proxy(answer.status, is_twirp=False):
            raise NoAnswer(f"a proxy answers {answer.status}: LiveKit is down behind it")
        skew = self._skew_sec(answer)
        findings = []
        if abs(skew) > TOLERATED_SKEW_SEC:
            findings.append(
                warning(
                    "clocks",
                    f"LiveKit's is {_apart(skew)}; from {LEEWAY_SEC} s on it refuses tokens",
                    *SET_CLOCKS,
                )
            )
        if answer.status != 401:
            findings.append(self._auto_create(answer, file))
            if tries_access_rule:
                findings.append(await self._access_rule(file))
        elif not findings:
            raise NoAnswer("LiveKit refuses the key")
        return findings

    def _auto_create(self, answer: Answer, file: str) -> Finding:
        if answer.status == 200 and answer.body == b"success":
            if self.config.full_access_homeservers.is_everyone:
                return ok(
                    "auto_create",
                    "is on, which makes no difference while full_access_homeservers is '*'",
                )
            return warning(
                "auto_create",
                "is on: restricted users who try to start a call see a connection error, and not"
                " that they are not allowed to",
                LIVEKIT_YAML,
                *AUTO_CREATE_OFF,
            )
        if answer.status == 404 and b"room" in answer.body:
            return ok("auto_create", "is off: the module creates the rooms")
        return warning(
            "auto_create",
            f"cannot be tested: /rtc/validate answers {answer.status}; livekit_internal_url should"
            " be LiveKit itself",
            file,
            LIVEKIT_URL_HINT,
        )

    async def _access_rule(self, file: str) -> Finding:
        """Tries to start a call as a restricted user does, and deletes the room if that works.

        /whip/v1 comes first, because it creates rooms whatever `auto_create` says. Older LiveKits
        do not have it, and proxies may not forward it; then clients have /rtc alone.
        """
        url = self.config.livekit_internal_url
        token = self.token_for(ACCESS_RULE_ROOM)
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/sdp"}
        enforced = ok(ACCESS_RULE, "is enforced: LiveKit creates no room for restricted users")
        door, is_refused = "/whip/v1", False
        try:
            answer = await self._probe.request("POST", f"{url}{door}", headers, WHIP_OFFER)
            # LiveKit spells it "confguration" before 1.9.9.
            if b"unknown room conf" in answer.body:
                return enforced
            # LiveKit 1.9.0 wants a grant there that the module never gives.
            if answer.status in (401, 403, 404):
                door = "/rtc"
                answer = await self.connect(url, token)
                is_refused = not answer.is_html and (
                    answer.status == 500 or (answer.status == 404 and b"room" in answer.body)
                )
            result = f"{door} answers {answer.status}"
        except NoAnswer as e:
            result = f"{door}: {e}"
        if await self.exists(ACCESS_RULE_ROOM):
            grants = VideoGrants(room_create=True)
            await self.call("DeleteRoom", DeleteRoomRequest(room=ACCESS_RULE_ROOM), grants)
            return self._not_enforced(door)
        if is_refused:
            return enforced
        return warning(
            ACCESS_RULE,
            f"cannot be tested: {result}; livekit_internal_url should be LiveKit itself",
            file,
            LIVEKIT_URL_HINT,
        )

    def _not_enforced(self, door: str) -> Finding:
        text = (
            f"is not enforced: LiveKit created a room at {door} for a token that forbids it."
            f" LiveKit {OLDEST_LIVEKIT} and newer enforce it, unless room_configurations has"
            f" {MUST_NOT_CREATE}"
        )
        if self.config.full_access_homeservers.is_everyone:
            return warning(ACCESS_RULE, f"{text}. Guests can start calls")
        text = f"{text}. full_access_homeservers has no effect"
        if door == "/rtc":
            return wrong(ACCESS_RULE, text, LIVEKIT_YAML, *AUTO_CREATE_OFF)
        return wrong(ACCESS_RULE, text)

    async def exists(self, livekit_room: str) -> bool:
        """Whether LiveKit has a room.

        Raises:
            NoAnswer: if it does not say.
        """
        request = ListRoomsRequest(names=[livekit_room])
        answer = await self.call("ListRooms", request, VideoGrants(room_list=True))
        try:
            if answer.status == 200:
                return bool(ListRoomsResponse.FromString(answer.body).rooms)
        except DecodeError:
            pass
        raise NoAnswer(f"LiveKit answers {answer.status} to ListRooms")


def _apart(skew_sec: int) -> str:
    return f"{abs(skew_sec)} s {'ahead of' if skew_sec > 0 else 'behind'} this one's"
