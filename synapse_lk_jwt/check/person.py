# SPDX-License-Identifier: Apache-2.0
"""One user's way into a call, and where it ends."""

import os
from collections.abc import AsyncIterator
from datetime import datetime

from livekit.api import VideoGrants
from livekit.protocol.models import ParticipantInfo
from livekit.protocol.room import (
    ListParticipantsRequest,
    ListParticipantsResponse,
    ListRoomsRequest,
    ListRoomsResponse,
)
from synapse.types import get_domain_from_id

from synapse_lk_jwt.auth.access import Access, Standing
from synapse_lk_jwt.check.probe import NoAnswer
from synapse_lk_jwt.check.report import Finding, Verdict, ok, warning, wrong
from synapse_lk_jwt.check.running import State
from synapse_lk_jwt.check.setup import Setup
from synapse_lk_jwt.check.sfu import Sfu
from synapse_lk_jwt.livekit.naming import (
    DEFAULT_SLOT,
    device_identity,
    livekit_room_name,
    user_of_device_identity,
)
from synapse_lk_jwt.livekit.ownership import OwnerSealer, ParticipantOwner

# What is said of who is not joined.
_MEMBERSHIPS = {
    None: "has never been in",
    "ban": "is banned from",
    "invite": "has not taken the invitation to",
    "knock": "has not been let into",
    "leave": "has left",
}


class Person:
    """A user who wants to be in the call of a room."""

    def __init__(self, user_id: str, room_id: str, setup: Setup, sfu: Sfu, state: State) -> None:
        """
        Args:
            user_id: the user.
            room_id: the Matrix room.
            setup: the homeserver's configuration.
            sfu: LiveKit.
            state: what the running homeserver says of this user and room.
        """
        self._user_id = user_id
        self._room_id = room_id
        self._setup = setup
        self._sfu = sfu
        self._state = state["user"]
        module = setup.module
        self._sealer = OwnerSealer(module.livekit_secret, *module.other_livekit_pairs.values())
        access = Access(
            setup.server_name, module.full_access_homeservers, module.remote_can_publish
        )
        self._standing = Standing(self._state["standing"])
        self._permissions = access.permissions(get_domain_from_id(user_id), self._standing)

    async def way(self) -> list[Finding]:
        """Step by step; the last one is where it ends."""
        findings = []
        async for finding in self._steps():
            findings.append(finding)
            if finding.verdict is Verdict.WRONG:
                break
        return findings

    async def _steps(self) -> AsyncIterator[Finding]:
        yield self._account()
        yield self._member()
        yield self._level()
        async for finding in self._call():
            yield finding

    def _account(self) -> Finding:
        server = get_domain_from_id(self._user_id)
        if self._state["is_mine"]:
            if self._state["auth_blocked"]:
                return wrong(
                    "account",
                    f"Synapse does not serve {self._user_id}: {self._state['auth_blocked']}",
                )
            if self._state["is_active"]:
                return ok("account", f"{self._user_id} is a user of this homeserver")
            return wrong(
                "account",
                f"{self._user_id} does not exist here, or is deactivated, locked, suspended, erased"
                " or expired",
            )
        if self._state["cannot_ask"]:
            return wrong(
                "account",
                f"{server} cannot be asked who its users are, so that none of them gets a token:"
                f" {self._state['cannot_ask']}",
            )
        return ok("account", f"{server} can be asked who its users are")

    def _member(self) -> Finding:
        state, room_id = self._state, self._room_id
        if state["is_blocked"]:
            return wrong("member", f"an admin of this homeserver has blocked {room_id}")
        if not state["is_here"]:
            if state["is_allowed"]:
                return warning(
                    "member",
                    f"this homeserver is not in {room_id}, and believes users of others. MSC4195's"
                    " endpoints refuse them",
                )
            return wrong("member", f"this homeserver is not in {room_id}")
        membership = state["membership"]
        if state["acl_allows"] is False:
            server = get_domain_from_id(self._user_id)
            return wrong("member", f"the server ACL of {room_id} shuts out {server}")
        if membership == "join":
            return ok("member", f"is joined to {room_id}")
        how = f"{_MEMBERSHIPS.get(membership, membership)} {room_id}"
        if state["is_allowed"]:
            return warning(
                "member",
                f"{how}, and gets a token all the same:"
                " require_room_membership is off, or the room's state is not complete yet",
            )
        return wrong("member", f"{how}, and only members get a token (403)")

    def _level(self) -> Finding:
        publishes = "publish" if self._permissions.can_publish else "listen only"
        if self._permissions.has_full_access:
            return ok("level", f"full access: may start calls, and {publishes}")
        text = f"restricted: may join a call that is running, and {publishes}"
        if self._standing is Standing.NORMAL:
            return ok("level", text)
        how = "a guest" if self._standing is Standing.GUEST else "shadow-banned"
        return warning("level", f"{text}, as this user is {how}")

    async def _call(self) -> AsyncIterator[Finding]:
        rooms = {livekit_room_name(self._room_id, DEFAULT_SLOT): f"slot {DEFAULT_SLOT}"}
        for livekit_room in self._state["livekit_rooms"]:
            rooms.setdefault(livekit_room, f"LiveKit room {livekit_room}")
        present: list[tuple[str, ParticipantInfo]] = []
        others = 0
        for livekit_room, name in rooms.items():
            try:
                participants = await self._participants(livekit_room)
            except NoAnswer as e:
                yield wrong("SFU", f"cannot be used: {e}; see 'check' without --as")
                return
            for participant in participants:
                if self._user_of(participant) == self._user_id:
                    present.append((name, participant))
                else:
                    others += 1
        yield await self._token(next(iter(rooms)))
        for name, participant in present:
            since = datetime.fromtimestamp(participant.joined_at).strftime("%H:%M:%S")
            tracks = len(participant.tracks)
            yield ok(
                "in the call",
                f"since {since} as {participant.identity!r}, {name}, publishing {tracks or 'no'}"
                f" track{'s' if tracks != 1 else ''}",
            )
        if not present:
            yield warning(
                "in the call",
                f"not now; {others or 'no'} other{' is' if others == 1 else 's are'} there",
            )

    async def _token(self, livekit_room: str) -> Finding:
        """Whether LiveKit would take the token that this user gets."""
        server = get_domain_from_id(self._user_id)
        has_full_access = self._permissions.has_full_access
        identity = device_identity(self._user_id, f"CHECK{os.urandom(4).hex()}")
        owner = ParticipantOwner(self._user_id, self._room_id, DEFAULT_SLOT)
        token = self._sfu.signer.participant_token(
            identity,
            livekit_room,
            may_create_room=has_full_access,
            can_publish=self._permissions.can_publish,
            can_update_own_metadata=self._setup.module.can_update_own_metadata,
            attributes=self._sealer.seal(owner, identity),
            lifetime_ms=60_000,
        )
        try:
            answer = await self._sfu.validate(self._setup.module.livekit_internal_url, token)
            # With `auto_create: true` LiveKit finds out only when it would create the room.
            is_there = has_full_access or await self._sfu.exists(livekit_room)
        except NoAnswer as e:
            return wrong("SFU", f"cannot be used: {e}; see 'check' without --as")
        if answer.status == 200 and is_there:
            return ok("SFU", "takes the token that this user gets")
        if answer.status == 404 and has_full_access:
            return ok("SFU", "takes the token; the room is made when this user asks for one")
        if answer.status in (200, 404) and self._state["is_mine"]:
            return warning(
                "SFU",
                "says that there is no such room: no full-access user has started the call, and"
                " this user may not",
            )
        if answer.status in (200, 404):
            servers = [*self._setup.module.full_access_homeservers.entries, server]
            return warning(
                "SFU",
                "says that there is no such room: nobody with full access has started the call, and"
                " this user may not. That is as configured",
                self._setup.block,
                f"full_access_homeservers: {servers}    # to let its users start calls",
            )
        return wrong("SFU", f"refuses the token ({answer.status}); see 'check' without --as")

    async def _participants(self, livekit_room: str) -> list[ParticipantInfo]:
        answer = await self._sfu.call(
            "ListParticipants",
            ListParticipantsRequest(room=livekit_room),
            VideoGrants(room_admin=True, room=livekit_room),
        )
        if answer.status == 404:
            return []
        error = answer.json
        if isinstance(error, dict) and error.get("code") == "unavailable":
            # With `enable_psrpc_for_get_list_participants` nobody answers for a room that is not
            # there.
            rooms = await self._sfu.call(
                "ListRooms", ListRoomsRequest(names=[livekit_room]), VideoGrants(room_list=True)
            )
            if rooms.status == 200 and not ListRoomsResponse.FromString(rooms.body).rooms:
                return []
        if answer.status != 200:
            raise NoAnswer(f"it answers {answer.status}")
        return list(ListParticipantsResponse.FromString(answer.body).participants)

    def _user_of(self, participant: ParticipantInfo) -> str | None:
        owner = self._sealer.open(participant.attributes, participant.identity)
        return owner.user_id if owner else user_of_device_identity(participant.identity)
