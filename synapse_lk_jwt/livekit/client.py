# SPDX-License-Identifier: Apache-2.0
"""LiveKit's RoomService, spoken over Twirp with Synapse's own HTTP client.

livekit-api has a client for this, but on asyncio, which does not run on Synapse's reactor. The
messages are livekit-api's (https://docs.livekit.io/reference/other/roomservice-api/).
"""

import json
import logging
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from livekit.api import VideoGrants
from livekit.protocol.models import ParticipantInfo, Room
from livekit.protocol.room import (
    CreateRoomRequest,
    DeleteRoomRequest,
    DeleteRoomResponse,
    ListParticipantsRequest,
    ListRoomsRequest,
    ListRoomsResponse,
    RemoveParticipantResponse,
    RoomParticipantIdentity,
)
from twisted.internet.error import ConnectError, DNSLookupError
from twisted.web.client import ResponseFailed
from twisted.web.http_headers import Headers
from twisted.web.iweb import IResponse

from synapse_lk_jwt import metrics
from synapse_lk_jwt.compat.caches import ResponseCacheContext
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.compat.http import (
    NETWORK_ERRORS,
    BodyTooLarge,
    TimedOut,
    read_body,
    stream_body,
    within,
)
from synapse_lk_jwt.livekit.ownership import OwnerSealer
from synapse_lk_jwt.livekit.participants import (
    CallParticipant,
    Listing,
    call_participant,
    is_of_user,
    is_too_long,
)
from synapse_lk_jwt.livekit.proxies import is_down_behind_proxy, is_redirect, redirected_url
from synapse_lk_jwt.livekit.questions import SharedQuestions
from synapse_lk_jwt.livekit.stream import FieldReader, ItemsReader, Unreadable
from synapse_lk_jwt.livekit.tokens import TokenSigner, rejected_option

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
T = TypeVar("T")

TIMEOUT_SEC = 10
# An answer about one participant is small, and its absence delays a leave.
PARTICIPANT_TIMEOUT_SEC = 5
MAX_ANSWER_BYTES = 1024 * 1024

# Listings are limited by time and number, and not by bytes: their participants decide about those.
MAX_PARTICIPANTS = 10_000

# A duplicate connection can have a megabyte of name, which is needed to remove it. LiveKit takes
# 1 MiB of request headers, so that a longer name cannot come from a URL.
MAX_REMOVABLE_IDENTITY_BYTES = 2 * 1024 * 1024
MAX_TOO_LONG_BYTES = 16 * 1024 * 1024

# What is copied of a participant, with the largest size of each field. Small ones are copied whole.
_PARTICIPANT_FIELDS = {
    ParticipantInfo.SID_FIELD_NUMBER: 64,
    ParticipantInfo.IDENTITY_FIELD_NUMBER: MAX_REMOVABLE_IDENTITY_BYTES,
    ParticipantInfo.STATE_FIELD_NUMBER: 0,
    ParticipantInfo.KIND_FIELD_NUMBER: 0,
    ParticipantInfo.JOINED_AT_FIELD_NUMBER: 0,
    ParticipantInfo.ATTRIBUTES_FIELD_NUMBER: 16 * 1024,
    ParticipantInfo.DISCONNECT_REASON_FIELD_NUMBER: 0,
}
_ROOM_FIELDS = {
    Room.NAME_FIELD_NUMBER: 512,
    Room.NUM_PARTICIPANTS_FIELD_NUMBER: 0,
}

# Synapse's client logs the first argument of an exception, and fails where there is none.
_CONNECTION_ERRORS = (*NETWORK_ERRORS, IndexError)

# A failure that comes and goes is logged once in this time.
LOG_AGAIN_SEC = 60
MAX_LOGGED = 100

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
    """It is LiveKit, and it does not do this one thing.

    Attributes:
        code: LiveKit's error code.
    """

    def __init__(self, text: str = "", code: str = "") -> None:
        super().__init__(text, "refused")
        self.code = code


class NotFound(Refused):
    """There is no such room, or no such participant in it."""


class NoNode(Refused):
    """No node of LiveKit answers for a room."""


class RoomService:
    """LiveKit's API for rooms.

    What goes wrong is logged once for as long as it stays the same, and so is that it is over.

    Attributes:
        proxy: the forward proxy on the way to LiveKit, None if there is none.
    """

    def __init__(
        self,
        homeserver: Homeserver,
        api_url: str,
        signer: TokenSigner,
        sealer: OwnerSealer,
        note_call: Callable[[str, str], Awaitable[None]],
    ) -> None:
        """
        Args:
            homeserver: whose HTTP client and clock to use.
            api_url: where LiveKit's API is, `http(s)://`, without a slash at the end.
            signer: the SFU's API key.
            sealer: opens the owners of participants.
            note_call: told the LiveKit room and the Matrix room of every room that is asked for.
        """
        self._homeserver = homeserver
        self._api_url = api_url
        self._signer = signer
        self._sealer = sealer
        self._note_call = note_call
        self.proxy = homeserver.http.forward_proxy(api_url)
        self._way = f" through the proxy {self.proxy.url}" if self.proxy else ""
        self._rooms = homeserver.caches.response_cache("synapse_lk_jwt_rooms", REMEMBER_MS)
        self._listings: SharedQuestions[str, Listing] = SharedQuestions()
        self._removals: SharedQuestions[tuple[str, str], bool] = SharedQuestions()
        self._participants: SharedQuestions[tuple[str, str], CallParticipant | None] = (
            SharedQuestions()
        )
        # Why LiveKit cannot be used, as it was logged, and when failures were logged last.
        self._logged: set[str] = set()
        self._logged_sec: dict[str, float] = {}
        # LiveKit's error code for what it did not do lately, by method.
        self._refused: dict[str, str] = {}

    async def ensure_room(self, livekit_room: str, room_id: str) -> None:
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

        async def create(cache_context: ResponseCacheContext[str]) -> None:
            await self._create(livekit_room, room_id, cache_context)

        await self._rooms.wrap(livekit_room, create, cache_context=True)
        metrics.rooms_ensured.inc()

    def forget(self, livekit_room: str) -> None:
        """Forgets that a LiveKit room exists, because somebody has seen it go."""
        self._rooms.unset(livekit_room)

    async def list_rooms(self) -> dict[str, int]:
        """All rooms of the SFU, each with the number of its participants.

        LiveKit updates that number with a delay. Rooms with names that no call has are left out.

        Raises:
            SfuError: if LiveKit refuses, or does not answer within ten seconds; so do the others.
        """
        rooms: dict[str, int] = {}

        async def read(response: IResponse) -> dict[str, int]:
            def receive(item: bytes, too_long: frozenset[int]) -> None:
                if not too_long:
                    room = Room.FromString(item)
                    rooms[room.name] = room.num_participants

            # The first attempt may have failed half way.
            rooms.clear()
            await _read_items(response, ItemsReader(_ROOM_FIELDS, receive))
            return rooms

        return await self._call("ListRooms", ListRoomsRequest(), VideoGrants(room_list=True), read)

    async def list_participants(self, livekit_room: str) -> Listing:
        """Who is in a room at some time from now on; nobody is in one that does not exist.

        One request for a room is made at a time. All that wait share its answer, or its failure:
        when a large call ends, everything in it is asked for at once.

        Raises:
            NoNode: if the room exists, and the node that had it does not answer.
            SfuError: if LiveKit refuses for another reason, or does not answer in ten seconds.
        """

        async def ask() -> Listing:
            return await self._list_participants(livekit_room)

        return await self._listings.ask(livekit_room, ask)

    async def get_participant(self, livekit_room: str, identity: str) -> CallParticipant | None:
        """A participant of a room at some time from now on, None if it is not there.

        Unlike a listing, the answer's size does not depend on other participants. Requests are
        shared as those of `list_participants`.

        Raises:
            NoNode: if the room exists, and the node that had it does not answer.
            SfuError: if LiveKit refuses for another reason, or does not answer in five seconds.
        """

        async def ask() -> CallParticipant | None:
            return await self._get_participant(livekit_room, identity)

        return await self._participants.ask((livekit_room, identity), ask)

    async def _list_participants(self, livekit_room: str) -> Listing:
        reader = _ListingReader(livekit_room, self._sealer, self._homeserver.clock.time_msec())
        try:
            return await self._call(
                "ListParticipants",
                ListParticipantsRequest(room=livekit_room),
                VideoGrants(room_admin=True, room=livekit_room),
                reader.read,
                expected=(NotFound, NoNode),
                if_silent=reader.what_is_read,
            )
        except NotFound:
            return reader.empty()
        except NoNode:
            # With `enable_psrpc_for_get_list_participants` nobody answers for one that is not there
            # either.
            if await self._exists(livekit_room):
                raise
            return reader.empty()

    async def _get_participant(self, livekit_room: str, identity: str) -> CallParticipant | None:
        async def read(response: IResponse) -> CallParticipant:
            reader = FieldReader(_PARTICIPANT_FIELDS)
            await stream_body(response, reader.write)
            info = ParticipantInfo.FromString(reader.finish())
            # The identity is the one that was asked for; what is not asked for is not believed.
            info.identity = identity
            return call_participant(info, livekit_room, self._sealer)

        try:
            return await self._call(
                "GetParticipant",
                RoomParticipantIdentity(room=livekit_room, identity=identity),
                VideoGrants(room_admin=True, room=livekit_room),
                read,
                expected=(NotFound, NoNode),
                timeout_sec=PARTICIPANT_TIMEOUT_SEC,
            )
        except NotFound:
            return None
        except NoNode:
            if await self._exists(livekit_room):
                raise
            return None

    async def _exists(self, livekit_room: str) -> bool:
        answer = await self._call(
            "ListRooms",
            ListRoomsRequest(names=[livekit_room]),
            VideoGrants(room_list=True),
            _message(ListRoomsResponse),
        )
        return bool(answer.rooms)

    async def remove_participant(self, livekit_room: str, identity: str) -> bool:
        """Ends a participant's connection. Their token remains good for another one.

        Returns:
            Whether they were there.

        Raises:
            SfuError: if LiveKit refuses, or does not answer in ten seconds while they are there.
        """

        async def ask() -> bool:
            return await self._remove_participant(livekit_room, identity)

        return await self._removals.ask((livekit_room, identity), ask)

    async def _remove_participant(self, livekit_room: str, identity: str) -> bool:
        async def is_gone() -> RemoveParticipantResponse | None:
            # LiveKit waits in vain for a participant that is leaving by itself.
            is_there = await self._get_participant(livekit_room, identity)
            return None if is_there else RemoveParticipantResponse()

        request = RoomParticipantIdentity(room=livekit_room, identity=identity)
        if hasattr(request, "revoke_token_ts"):
            # In seconds. A LiveKit that revokes tokens would otherwise also reject those of the
            # next minute, and with them users who were invited again. Older livekit-protocol
            # packages do not have the field.
            request.revoke_token_ts = self._homeserver.clock.time_msec() // 1000
        try:
            await self._call(
                "RemoveParticipant",
                request,
                VideoGrants(room_admin=True, room=livekit_room),
                _message(RemoveParticipantResponse),
                if_silent=is_gone,
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
                _message(DeleteRoomResponse),
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
            _message(Room),
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
        read: Callable[[IResponse], Awaitable[T]],
        expected: tuple[type[Refused], ...] = (NotFound,),
        timeout_sec: float = TIMEOUT_SEC,
        if_silent: Callable[[], Awaitable[T | None]] | None = None,
    ) -> T:
        """Sends a request, and once more if the connection breaks.

        Args:
            method: the name of it.
            request: its body.
            grants: what the token for it allows.
            read: reads the body of a successful answer.
            expected: refusals that are not worth a line in the log.
            timeout_sec: how long all of it may take, in seconds.
            if_silent: called when that time is over, or when a node of LiveKit does not answer.
                What it returns takes the place of the answer, unless it is None.
        """
        token = self._signer.api_token(grants)
        headers = {
            "Authorization": [f"Bearer {token}"],
            "Content-Type": ["application/protobuf"],
        }

        path = f"/twirp/livekit.RoomService/{method}"

        async def post() -> T:
            try:
                response = await self._homeserver.http.request(
                    "POST", self._api_url + path, request.SerializeToString(), Headers(headers)
                )
            except ResponseFailed as e:
                # Synapse's client follows no redirect of a POST, and raises this instead.
                if e.response is None or not is_redirect(e.response.code):
                    raise
                raise _redirected(e.response, path) from None
            if is_redirect(response.code):
                raise _redirected(response, path)
            content_type = (response.headers.getRawHeaders("Content-Type") or [""])[0]
            if response.code != 200 or not content_type.startswith("application/protobuf"):
                body = await read_body(response, MAX_ANSWER_BYTES)
                raise _failure(response.code, content_type, body, token)
            try:
                return await read(response)
            except (DecodeError, Unreadable):
                raise SfuError("its answer cannot be read; is this LiveKit's API?") from None

        deadline = self._homeserver.reactor.seconds() + timeout_sec

        async def post_twice() -> T:
            try:
                return await post()
            except (SfuError, BodyTooLarge):
                raise
            except _CONNECTION_ERRORS as e:
                # So does the connection of a request that was cancelled.
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
                result = await within(timeout_sec, self._homeserver.clock, post_twice)
        except expected:
            self._succeeded(method)
            raise
        except Refused as e:
            if isinstance(e, NoNode) and if_silent is not None:
                instead = await if_silent()
                if instead is not None:
                    return instead
            metrics.sfu_failures.labels(method, e.cause).inc()
            # The text can name a room, and one bad room among good ones is logged once, too.
            if self._refused.get(method) != e.code and self._is_log_due(f"{method} {e.code}"):
                logger.error(
                    "LiveKit at %s%s does not do %s: %s. %s",
                    self._api_url,
                    self._way,
                    method,
                    e,
                    self._homeserver.check_command,
                )
            self._refused[method] = e.code
            raise
        except SfuError as e:
            raise self._failed(method, e.cause, str(e)) from None
        except TimedOut:
            instead = None if if_silent is None else await if_silent()
            if instead is not None:
                return instead
            text = f"no answer within {timeout_sec} s"
            raise self._failed(method, "timeout", text) from None
        except BodyTooLarge:
            text = "its answer is endless; is this LiveKit's API?"
            raise self._failed(method, "not_livekit", text) from None
        except (ConnectError, DNSLookupError) as e:
            raise self._failed(method, "no_connection", f"no connection: {e}") from None
        except _CONNECTION_ERRORS as e:
            text = f"the connection broke: {type(e).__name__}: {e}"
            raise self._failed(method, "no_connection", text) from None
        self._succeeded(method)
        return result

    def _failed(self, method: str, cause: metrics.SfuCause, text: str) -> SfuError:
        metrics.sfu_failures.labels(method, cause).inc()
        if text not in self._logged and self._is_log_due(text):
            self._logged.add(text)
            logger.error(
                "LiveKit at %s%s cannot be used, calls cannot be started: %s. %s",
                self._api_url,
                self._way,
                text.rstrip("."),
                self._homeserver.check_command,
            )
        return SfuError(text, cause)

    def _is_log_due(self, failure: str) -> bool:
        """Whether a failure was not logged for a while: some stop and start all the time."""
        now_sec = self._homeserver.reactor.seconds()
        if now_sec < self._logged_sec.get(failure, -math.inf) + LOG_AGAIN_SEC:
            return False
        if len(self._logged_sec) >= MAX_LOGGED:
            self._logged_sec.clear()
        self._logged_sec[failure] = now_sec
        return True

    def _succeeded(self, method: str) -> None:
        self._refused.pop(method, None)
        if self._logged:
            self._logged.clear()
            logger.info("LiveKit at %s can be used again", self._api_url)


class _ListingReader:
    """Reads an answer to ListParticipants, of any size."""

    def __init__(self, livekit_room: str, sealer: OwnerSealer, asked_ms: int) -> None:
        self._livekit_room = livekit_room
        self._sealer = sealer
        self._asked_ms = asked_ms
        self._begin()

    def _begin(self) -> None:
        self._participants: list[CallParticipant] = []
        self._too_long: list[str] = []
        self._too_long_bytes = 0
        self._is_complete = True
        self._has_begun = False

    async def read(self, response: IResponse) -> Listing:
        # The first attempt may have failed half way.
        self._begin()
        await _read_items(response, ItemsReader(_PARTICIPANT_FIELDS, self._receive))
        return self._listing(self._is_complete)

    async def what_is_read(self) -> Listing | None:
        """The participants that have been read of an answer that is not at its end yet.

        How long it is, and so how long it takes, is up to the participants.
        """
        return self._listing(is_complete=False) if self._has_begun else None

    def empty(self) -> Listing:
        """The listing of a room that does not exist."""
        return Listing(self._asked_ms, ())

    def _listing(self, is_complete: bool) -> Listing:
        return Listing(
            self._asked_ms, tuple(self._participants), tuple(self._too_long), is_complete
        )

    def _receive(self, item: bytes, too_long: frozenset[int]) -> None:
        self._has_begun = True
        try:
            info = ParticipantInfo.FromString(item)
        except DecodeError:
            # One participant must not hide the others.
            self._is_complete = False
            return
        if not is_of_user(info):
            return
        identity = info.identity
        if (
            ParticipantInfo.IDENTITY_FIELD_NUMBER in too_long
            or len(self._participants) >= MAX_PARTICIPANTS
        ):
            self._is_complete = False
        elif not is_too_long(identity):
            self._participants.append(call_participant(info, self._livekit_room, self._sealer))
        elif self._too_long_bytes + len(identity) <= MAX_TOO_LONG_BYTES:
            self._too_long_bytes += len(identity)
            self._too_long.append(identity)
        else:
            self._is_complete = False


async def _read_items(response: IResponse, reader: ItemsReader) -> None:
    await stream_body(response, reader.write)
    reader.finish()


def _message(answer: type[M]) -> Callable[[IResponse], Awaitable[M]]:
    """Reads an answer that is one small message."""

    async def read(response: IResponse) -> M:
        return answer.FromString(await read_body(response, MAX_ANSWER_BYTES))

    return read


def _redirected(response: IResponse, path: str) -> SfuError:
    """What a redirect says; `path` is the one of the request below `livekit_internal_url`."""
    location = (response.headers.getRawHeaders("Location") or [""])[0]
    url = redirected_url(location, path)
    if url is None:
        return SfuError(f"it redirects to another page ({response.code}); is this LiveKit's API?")
    where = "https" if url.startswith("https:") else "another URL"
    return SfuError(f"it redirects to {where} ({response.code}). Write livekit_internal_url: {url}")


def _failure(status: int, content_type: str, body: bytes, token: str) -> SfuError:
    """What an HTTP response that is no success says, of the SFU or of another server there."""
    if status in (401, 403):
        # LiveKit's text quotes the token.
        option = rejected_option(body) or "livekit_key and livekit_secret"
        text = f"it rejected {option} ({status}). Compare keys: in LiveKit's configuration"
        return SfuError(text, "unauthorized")
    try:
        # Twirp's errors are JSON whatever was asked for.
        error = json.loads(body)
        code, message = str(error["code"]), str(error.get("msg", ""))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        if is_down_behind_proxy(status, is_twirp=False):
            return SfuError(
                f"a proxy answers {status}: LiveKit is down behind it. Start LiveKit, or correct"
                " the port that the proxy forwards to",
                "no_connection",
            )
        if status == 407:
            return SfuError("the proxy wants a user and a password (407)", "no_connection")
        if content_type.startswith("text/html"):
            return SfuError(f"a web page ({status}) answers; does a proxy stand in front of it?")
        return SfuError(f"it answers {status}; is this LiveKit's API?")
    if status == 404 and code == "not_found":
        return NotFound()
    refused = NoNode if code == "unavailable" else Refused
    return refused(
        f"it answers {status} {code[:40]!r}: {message.replace(token, '…')[:200]!r}", code[:40]
    )
