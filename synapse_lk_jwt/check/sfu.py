# SPDX-License-Identifier: Apache-2.0
"""What LiveKit says, without changing anything there."""

import secrets
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from google.protobuf.message import Message
from livekit.api import VideoGrants
from livekit.protocol.room import ListRoomsRequest

from synapse_lk_jwt.check.probe import Answer, NoAnswer, Probe
from synapse_lk_jwt.check.report import LIVEKIT_YAML, Finding, ok, warning, wrong
from synapse_lk_jwt.config import LiveKitJwtConfig
from synapse_lk_jwt.sfu.names import CHECK_ROOM
from synapse_lk_jwt.sfu.tokens import LEEWAY_SEC, TokenSigner

# LiveKit tells its time in whole seconds, and the answer takes a while.
TOLERATED_SKEW_SEC = 5

# Where, and what to write.
SET_CLOCKS = ("both machines, on the command line", "timedatectl set-ntp true")

AUTO_CREATE_OFF = ("room:", "  auto_create: false")

LIVEKIT_URL_HINT = "livekit_internal_url: http://127.0.0.1:7880    # LiveKit's own port"


class Sfu:
    """LiveKit, asked with the module's key."""

    def __init__(
        self, probe: Probe, config: LiveKitJwtConfig, time_msec: Callable[[], int]
    ) -> None:
        """
        Args:
            probe: asks.
            config: where LiveKit is, and with which key to ask.
            time_msec: milliseconds since the epoch.
        """
        self._probe = probe
        self.config = config
        self.signer = TokenSigner(config.livekit_key, config.livekit_secret, time_msec)
        self._time_msec = time_msec

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

    def token_for(self, livekit_room: str) -> str:
        """A token of nobody in particular, to listen in a room."""
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
        well = ok("LiveKit", f"answers at {self.config.livekit_internal_url}, with our key")
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
        return wrong("LiveKit", f"does not answer at {url}: {cause}", file, hint)

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
        if answer.status == 401 and answer.body.startswith(b"invalid API key"):
            return wrong(
                "LiveKit",
                f"does not know the key {key!r}",
                LIVEKIT_YAML,
                "keys:",
                f"  {key}: …    # what livekit_secret has",
            )
        if answer.status == 401 and answer.body.startswith(b"invalid token"):
            return wrong(
                "LiveKit",
                f"knows the key {key!r} with another secret than livekit_secret",
                file,
                f"livekit_secret_path: /etc/matrix-synapse/livekit_secret    # what LiveKit's"
                f" configuration has below keys: for {key}",
            )
        if answer.is_html:
            text = f"a web page ({answer.status}) answers at {url}: a proxy that does not forward"
            return wrong("LiveKit", f"{text} /twirp, or another server", file, LIVEKIT_URL_HINT)
        text = f"what answers at {url} ({answer.status}) is not LiveKit, or not its API"
        return wrong("LiveKit", text, file, LIVEKIT_URL_HINT)

    def _skew_sec(self, answer: Answer) -> int:
        """Seconds by which LiveKit's clock is ahead of ours; 0 if it does not say."""
        try:
            theirs = parsedate_to_datetime(answer.get("Date")).timestamp()
        except (ValueError, TypeError):
            return 0
        return round(theirs - self._time_msec() / 1000)

    async def check_rooms(self, file: str) -> list[Finding]:
        """Whether LiveKit makes rooms for whoever comes with a token, and what time it has.

        LiveKit says whether somebody would be let into a room that nobody can have made.

        Args:
            file: where to write a key of the module.

        Raises:
            NoAnswer: if nobody answers, or LiveKit refuses the key.
        """
        token = self.token_for(f"{CHECK_ROOM}{secrets.token_hex(16)}")
        answer = await self.validate(self.config.livekit_internal_url, token)
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
        elif not findings:
            raise NoAnswer("LiveKit refuses the key")
        return findings

    def _auto_create(self, answer: Answer, file: str) -> Finding:
        servers = self.config.full_access_homeservers
        if answer.status == 200 and answer.body == b"success":
            if servers.is_everyone:
                return warning(
                    "auto_create",
                    "is on: whoever has a token starts calls, as everybody has full access; but"
                    " somebody who was removed can start an ended call again",
                    LIVEKIT_YAML,
                    *AUTO_CREATE_OFF,
                )
            return wrong(
                "auto_create",
                "is on: LiveKit makes a room for whoever comes with a token, so that"
                " full_access_homeservers is without effect",
                LIVEKIT_YAML,
                *AUTO_CREATE_OFF,
            )
        if answer.status == 404 and b"room" in answer.body:
            return ok("auto_create", "is off: the module makes the rooms")
        return warning(
            "auto_create",
            f"cannot be told: /rtc/validate answers {answer.status}; livekit_internal_url should be"
            " LiveKit itself",
            file,
            LIVEKIT_URL_HINT,
        )


def _apart(skew_sec: int) -> str:
    return f"{abs(skew_sec)} s {'ahead of' if skew_sec > 0 else 'behind'} this one's"
