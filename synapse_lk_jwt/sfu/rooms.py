# SPDX-License-Identifier: Apache-2.0
"""LiveKit's RoomService, spoken over Twirp with Synapse's own HTTP client.

livekit-api has a client for this, but on asyncio, which does not run on Synapse's reactor. The
messages are livekit-api's (https://docs.livekit.io/reference/other/roomservice-api/).
"""

import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import attr
from google.protobuf.message import DecodeError, Message
from livekit.api import VideoGrants
from livekit.protocol.models import ParticipantInfo, Room
from livekit.protocol.room import (
    CreateRoomRequest,
    DeleteRoomRequest,
    DeleteRoomResponse,
    ListParticipantsRequest,
    ListParticipantsResponse,
    ListRoomsRequest,
    ListRoomsResponse,
    RemoveParticipantResponse,
    RoomParticipantIdentity,
)
from synapse.util.caches.response_cache import ResponseCacheContext
from twisted.internet.error import ConnectError, DNSLookupError
from twisted.web.http_headers import Headers

from synapse_lk_jwt import metrics
from synapse_lk_jwt.homeserver import Homeserver
from synapse_lk_jwt.http import BodyTooLarge, TimedOut, read_body, within
from synapse_lk_jwt.sfu.tokens import TokenSigner

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

TIMEOUT_SEC = 10
MAX_ANSWER_BYTES = 1024 * 1024
# A list of rooms has about 300 bytes for each, and one of participants 2,000.
MAX_LIST_BYTES = 16 * 1024 * 1024

# LiveKit closes a room that nobody joined after the first, and one that everybody left after the
# second of these.
EMPTY_TIMEOUT_SEC = 300
DEPARTURE_TIMEOUT_SEC = 20

# How long a room that was there may be taken to be there. Must be well below the departure timeout.
REMEMBER_MS = 10_000


class SfuError(Exception):
    """The SFU did not do what it was asked. The text names the cause, for the log alone."""

    def __init__(self, text: str = "", cause: metrics.SfuCause = "not_livekit") -> None:
        super().__init__(text)
        self.cause = cause


class Refused(SfuError):
    """It is LiveKit, and it does not do this one thing."""

    def __init__(self, text: str = "") -> None:
        super().__init__(text, "refused")


class NotFound(Refused):
    """There is no such room, or no such participant in it."""


class NoNode(Refused):
    """No node of LiveKit answers for a room."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Listing:
    """Who was in a room.

    Attributes:
        asked_ms: when the SFU was asked, milliseconds since the epoch.
        participants: whom it named.
    """

    asked_ms: int
    participants: Sequence[ParticipantInfo]


class RoomService:
    """LiveKit's API for rooms.

    What goes wrong is logged once for as long as it stays the same, and so is that it is over.
    """

    def __init__(
        self,
        homeserver: Homeserver,
        api_url: str,
        signer: TokenSigner,
        note_call: Callable[[str, str], Awaitable[None]],
    ) -> None:
        """
        Args:
            homeserver: whose HTTP client and clock to use.
            api_url: where LiveKit's API is, `http(s)://`, without a slash at the end.
            signer: the SFU's API key.
            note_call: told the LiveKit room and the Matrix room of every room that is asked for.
        """
        self._homeserver = homeserver
        self._api_url = api_url
        self._signer = signer
        self._note_call = note_call
        self._rooms = homeserver.response_cache("synapse_lk_jwt_rooms", REMEMBER_MS)
        self._listing = homeserver.linearizer("synapse_lk_jwt_listing")
        # The last answers, for those who were waiting meanwhile.
        self._listed: dict[str, Listing] = {}
        self._trouble: str | None = None
        # The LiveKit rooms that are being asked for.
        self._creating: set[str] = set()
        # Why the SFU did not do something lately, by method.
        self._refused: dict[str, str] = {}

    async def make_sure_of(self, livekit_room: str, room_id: str) -> None:
        """Makes sure that a LiveKit room exists.

        Calls for one room share the request in flight. Afterwards the room is taken to exist for
        ten seconds if LiveKit's answer lets us: CreateRoom returns an existing room unchanged, and
        one that its last participant left 19 seconds ago is gone a second later.

        Args:
            livekit_room: the LiveKit room name.
            room_id: the Matrix room that it belongs to.

        Raises:
            SfuError: if LiveKit refuses, or does not answer within ten seconds.
        """
        how = "shared" if livekit_room in self._creating else "remembered"

        async def create(cache_context: ResponseCacheContext[str]) -> None:
            nonlocal how
            how = "asked"
            self._creating.add(livekit_room)
            try:
                await self._create(livekit_room, room_id, cache_context)
            finally:
                self._creating.discard(livekit_room)

        await self._rooms.wrap(livekit_room, create, cache_context=True)
        metrics.rooms_ensured.labels(how).inc()

    def forget(self, livekit_room: str) -> None:
        """Forgets that a LiveKit room exists, because somebody has seen it go."""
        self._rooms.unset(livekit_room)

    async def list_rooms(self) -> Sequence[Room]:
        """All rooms of the SFU. LiveKit updates their number of participants with a delay.

        Raises:
            SfuError: if LiveKit refuses, or does not answer within ten seconds; so do the others.
        """
        answer = await self._call(
            "ListRooms",
            ListRoomsRequest(),
            VideoGrants(room_list=True),
            ListRoomsResponse,
            MAX_LIST_BYTES,
        )
        return answer.rooms

    async def list_participants(self, livekit_room: str) -> Listing:
        """Who is in a room at some time from now on; nobody is in one that does not exist.

        One request for a room is made at a time, and its answer is shared by all who were waiting
        for their turn: when a large call ends everybody in it is asked for at once.

        Raises:
            NoNode: if the room exists, and the node that had it does not answer.
            SfuError: if LiveKit refuses for another reason, or does not answer in ten seconds.
        """
        now_ms = self._homeserver.clock.time_msec
        wanted_ms = now_ms()
        async with self._listing.queue(livekit_room):
            listed = self._listed.get(livekit_room)
            if listed is None or listed.asked_ms <= wanted_ms:
                listed = Listing(now_ms(), await self._list_participants(livekit_room))
            if self._listing.is_queued(livekit_room):
                self._listed[livekit_room] = listed
            else:
                self._listed.pop(livekit_room, None)
            return listed

    async def _list_participants(self, livekit_room: str) -> Sequence[ParticipantInfo]:
        try:
            answer = await self._call(
                "ListParticipants",
                ListParticipantsRequest(room=livekit_room),
                VideoGrants(room_admin=True, room=livekit_room),
                ListParticipantsResponse,
                MAX_LIST_BYTES,
                expected=(NotFound, NoNode),
            )
        except NotFound:
            return ()
        except NoNode:
            # With `enable_psrpc_for_get_list_participants` nobody answers for one that is not there
            # either.
            if await self._exists(livekit_room):
                raise
            return ()
        return answer.participants

    async def _exists(self, livekit_room: str) -> bool:
        answer = await self._call(
            "ListRooms",
            ListRoomsRequest(names=[livekit_room]),
            VideoGrants(room_list=True),
            ListRoomsResponse,
        )
        return bool(answer.rooms)

    async def remove_participant(self, livekit_room: str, identity: str) -> bool:
        """Ends a participant's connection. Their token remains good for another one.

        Returns:
            Whether they were there.
        """
        try:
            await self._call(
                "RemoveParticipant",
                RoomParticipantIdentity(room=livekit_room, identity=identity),
                VideoGrants(room_admin=True, room=livekit_room),
                RemoveParticipantResponse,
            )
        except NotFound:
            return False
        return True

    async def delete_room(self, livekit_room: str) -> None:
        """Ends a call for everybody in it."""
        with suppress(NotFound):
            await self._call(
                "DeleteRoom",
                DeleteRoomRequest(room=livekit_room),
                VideoGrants(room_create=True),
                DeleteRoomResponse,
            )
        self.forget(livekit_room)

    async def _create(
        self, livekit_room: str, room_id: str, cache_context: ResponseCacheContext[str]
    ) -> None:
        # Older Synapses also remember failures, unless they are told before.
        cache_context.should_cache = False
        await self._note_call(livekit_room, room_id)
        room = await self._call(
            "CreateRoom",
            CreateRoomRequest(
                name=livekit_room,
                empty_timeout=EMPTY_TIMEOUT_SEC,
                departure_timeout=DEPARTURE_TIMEOUT_SEC,
                max_participants=0,
            ),
            VideoGrants(room_create=True),
            Room,
        )
        age_ms = self._homeserver.clock.time_msec() - room.creation_time * 1000
        # LiveKit counts whole seconds. A room from the future tells that the clocks differ, and
        # then its age tells nothing.
        is_young = -1000 < age_ms < REMEMBER_MS
        cache_context.should_cache = room.num_participants > 0 or is_young

    async def _call(
        self,
        method: str,
        request: Message,
        grants: VideoGrants,
        answer: type[M],
        max_bytes: int = MAX_ANSWER_BYTES,
        expected: tuple[type[Refused], ...] = (NotFound,),
    ) -> M:
        token = self._signer.api_token(grants)
        headers = {
            "Authorization": [f"Bearer {token}"],
            "Content-Type": ["application/protobuf"],
        }

        async def post() -> M:
            uri = f"{self._api_url}/twirp/livekit.RoomService/{method}"
            response = await self._homeserver.http_client.request(
                "POST", uri, request.SerializeToString(), Headers(headers)
            )
            body = await read_body(response, max_bytes)
            content_type = (response.headers.getRawHeaders("Content-Type") or [""])[0]
            return _decode(response.code, content_type, body, answer, token)

        deadline = self._homeserver.reactor.seconds() + TIMEOUT_SEC

        async def post_twice() -> M:
            try:
                return await post()
            except (SfuError, BodyTooLarge):
                raise
            except Exception as e:
                # What a cancelled request raises is up to Synapse's client.
                if self._homeserver.reactor.seconds() >= deadline:
                    raise
                # A connection that was kept open may have been closed by the other side meanwhile,
                # and clients do not ask again.
                logger.debug("%s of LiveKit failed (%s), trying once more", method, e)
                return await post()

        try:
            with metrics.timing(
                metrics.sfu_request_seconds.labels(method), self._homeserver.reactor
            ):
                result = await within(TIMEOUT_SEC, self._homeserver.reactor, post_twice)
        except expected:
            self._succeeded(method)
            raise
        except Refused as e:
            metrics.sfu_failures.labels(method, e.cause).inc()
            if self._refused.get(method) != str(e):
                self._refused[method] = str(e)
                logger.error(
                    "LiveKit at %s does not do %s: %s. %s",
                    self._api_url,
                    method,
                    e,
                    self._homeserver.check_command,
                )
            raise
        except SfuError as e:
            raise self._failed(method, e.cause, str(e)) from None
        except TimedOut:
            text = f"no answer within {TIMEOUT_SEC} s"
            raise self._failed(method, "timeout", text) from None
        except BodyTooLarge:
            text = "its answer is endless; is this LiveKit's API?"
            raise self._failed(method, "not_livekit", text) from None
        except (ConnectError, DNSLookupError) as e:
            raise self._failed(method, "no_connection", f"no connection: {e}") from None
        except Exception as e:
            text = f"the connection broke: {type(e).__name__}: {e}"
            raise self._failed(method, "no_connection", text) from None
        self._succeeded(method)
        return result

    def _failed(self, method: str, cause: metrics.SfuCause, text: str) -> SfuError:
        metrics.sfu_failures.labels(method, cause).inc()
        if text != self._trouble:
            self._trouble = text
            logger.error(
                "LiveKit at %s cannot be used, calls cannot be started: %s. %s",
                self._api_url,
                text.rstrip("."),
                self._homeserver.check_command,
            )
        return SfuError(text, cause)

    def _succeeded(self, method: str) -> None:
        self._refused.pop(method, None)
        if self._trouble is not None:
            self._trouble = None
            logger.info("LiveKit at %s can be used again", self._api_url)


def _decode(status: int, content_type: str, body: bytes, answer: type[M], token: str) -> M:
    """Turns an HTTP response of the SFU, or of whatever answers there, into a message.

    Raises:
        SfuError: unless it is LiveKit and did what was asked.
    """
    is_protobuf = content_type.startswith("application/protobuf")
    if status == 200 and is_protobuf:
        try:
            return answer.FromString(body)
        except DecodeError:
            raise SfuError("its answer cannot be read; is this LiveKit's API?") from None
    if status in (401, 403):
        # LiveKit's text quotes the token.
        raise SfuError(
            f"it refuses livekit_key and livekit_secret ({status}): are they LiveKit's?",
            "unauthorized",
        )
    if content_type.startswith("text/html"):
        raise SfuError(f"a web page ({status}) answers; does a proxy stand in front of it?")
    try:
        # Twirp's errors are JSON whatever was asked for.
        error = json.loads(body)
        code, message = str(error["code"]), str(error.get("msg", ""))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise SfuError(f"it answers {status}; is this LiveKit's API?") from None
    if status == 404 and code == "not_found":
        raise NotFound()
    refused = NoNode if code == "unavailable" else Refused
    raise refused(f"it answers {status} {code!r}: {message.replace(token, '…')[:200]!r}")
