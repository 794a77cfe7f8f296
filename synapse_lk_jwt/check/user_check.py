# SPDX-License-Identifier: Apache-2.0
"""Traces one user's next token request, up to the step that fails."""

import os
from collections.abc import Iterator
from datetime import datetime

from livekit.protocol.models import ParticipantInfo
from synapse.types import get_domain_from_id

from synapse_lk_jwt.auth.access import Access, Standing
from synapse_lk_jwt.check.livekit_requests import LiveKit
from synapse_lk_jwt.check.probe import NoAnswer, Probe
from synapse_lk_jwt.check.processes import State
from synapse_lk_jwt.check.report import Finding, Verdict, ok, warning, wrong
from synapse_lk_jwt.check.setup import Setup
from synapse_lk_jwt.livekit.naming import (
    DEFAULT_SLOT,
    device_identity,
    livekit_room_name,
)
from synapse_lk_jwt.livekit.ownership import OwnerSealer, ParticipantOwner
from synapse_lk_jwt.livekit.participants import call_participant, is_too_long

# The words for each membership but `join`.
_MEMBERSHIPS = {
    None: "has never been in",
    "ban": "is banned from",
    "invite": "has not accepted the invitation to",
    "knock": "has knocked, but is not admitted to",
    "leave": "has left",
}


class UserCheck:
    """A user who wants to be in the call of a room."""

    def __init__(
        self,
        user_id: str,
        room_id: str,
        setup: Setup,
        livekit: LiveKit,
        probe: Probe,
        state: State,
    ) -> None:
        """
        Args:
            user_id: the user.
            room_id: the Matrix room.
            setup: the homeserver's configuration.
            livekit: LiveKit's API.
            probe: sends requests to it as Synapse does.
            state: what the running homeserver reports about this user and room.
        """
        self._user_id = user_id
        self._room_id = room_id
        self._setup = setup
        self._livekit = livekit
        self._probe = probe
        self._state = state["user"]
        module = setup.module
        self._sealer = OwnerSealer(module.livekit_secret, *module.other_livekit_pairs.values())
        access = Access(
            setup.server_name, module.full_access_homeservers, module.remote_can_publish
        )
        self._standing = Standing(self._state["standing"])
        self._permissions = access.permissions(get_domain_from_id(user_id), self._standing)

    def trace(self) -> list[Finding]:
        """All steps up to the first that fails."""
        findings = []
        for finding in self._steps():
            findings.append(finding)
            if finding.verdict is Verdict.WRONG:
                break
        return findings

    def _steps(self) -> Iterator[Finding]:
        yield self._account()
        yield self._member()
        yield self._level()
        yield from self._call()

    def _account(self) -> Finding:
        server = get_domain_from_id(self._user_id)
        if not self._state["is_mine"]:
            if self._state["cannot_verify"]:
                return wrong(
                    "account",
                    f"this homeserver cannot verify users of {server}, so none of them gets a"
                    f" token: {self._state['cannot_verify']}",
                )
            return ok("account", f"this homeserver can verify users of {server}")
        if self._state["auth_blocked"]:
            cause = self._state["auth_blocked"]
            return wrong("account", f"Synapse does not serve {self._user_id}: {cause}")
        if self._state["is_active"]:
            return ok("account", f"{self._user_id} is a user of this homeserver")
        return wrong(
            "account",
            f"{self._user_id} does not exist here, or is deactivated, locked, suspended, erased"
            " or expired",
        )

    def _member(self) -> Finding:
        state, room_id = self._state, self._room_id
        if state["is_blocked"]:
            return wrong("member", f"an admin of this homeserver has blocked {room_id}")
        if not state["is_here"]:
            if state["is_allowed"]:
                return warning(
                    "member",
                    f"this homeserver is not in {room_id}. It trusts users of other homeservers to"
                    " be in it (rooms_elsewhere). MSC4195's endpoints reject them",
                )
            return wrong("member", f"this homeserver is not in {room_id}")
        membership = state["membership"]
        if state["acl_allows"] is False:
            server = get_domain_from_id(self._user_id)
            return wrong("member", f"the server ACL of {room_id} excludes {server}")
        if membership == "join":
            return ok("member", f"is joined to {room_id}")
        how = f"{_MEMBERSHIPS.get(membership, membership)} {room_id}"
        if state["is_allowed"]:
            return warning(
                "member",
                f"{how}, but still gets a token, because require_room_membership is off or the"
                " room's state is not complete yet",
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
        return warning("level", f"{text}, because this user is {how}")

    def _call(self) -> Iterator[Finding]:
        rooms = {livekit_room_name(self._room_id, DEFAULT_SLOT): f"slot {DEFAULT_SLOT}"}
        for livekit_room in self._state["livekit_rooms"]:
            rooms.setdefault(livekit_room, f"LiveKit room {livekit_room}")
        try:
            connected = [
                (livekit_room, participant)
                for livekit_room in rooms
                for participant in self._probe.run(self._livekit.participants(livekit_room))
            ]
            yield self._token(next(iter(rooms)))
        except NoAnswer as e:
            text = f"cannot be used: {e}. Run 'check' without --as to see why"
            yield wrong("LiveKit", text)
            return
        own = [(room, p) for room, p in connected if self._user_of(p, room) == self._user_id]
        for livekit_room, participant in own:
            where = rooms[livekit_room]
            since = datetime.fromtimestamp(participant.joined_at).strftime("%H:%M:%S")
            tracks = len(participant.tracks)
            yield ok(
                "in the call",
                f"since {since} as {participant.identity!r}, {where}, publishing {tracks or 'no'}"
                f" track{'s' if tracks != 1 else ''}",
            )
        others = len(connected) - len(own)
        if not own:
            yield warning(
                "in the call",
                f"not now. {others or 'No'} other participant{' is' if others == 1 else 's are'} in"
                " it",
            )

    def _token(self, livekit_room: str) -> Finding:
        """Whether LiveKit would accept the token that this user gets.

        Raises:
            NoAnswer: if LiveKit cannot be used.
        """
        has_full_access = self._permissions.has_full_access
        token = self._token_for_user(livekit_room)
        answer = self._probe.send(self._livekit.validate(token))
        # With `auto_create: true` LiveKit fails only when it would create the room.
        exists = has_full_access or self._probe.run(self._livekit.exists(livekit_room))
        if answer.status == 200 and exists:
            return ok("LiveKit", "accepts the token that this user gets")
        if answer.status not in (200, 404):
            text = f"rejects the token ({answer.status}). Run 'check' without --as to see why"
            return wrong("LiveKit", text)
        if has_full_access:
            text = "accepts the token, and the module creates the room when this user requests one"
            return ok("LiveKit", text)
        text = (
            "has no such room: no full-access user has started the call, and this user may not"
            " start it"
        )
        if self._state["is_mine"]:
            return warning("LiveKit", text)
        server = get_domain_from_id(self._user_id)
        servers = [*self._setup.module.full_access_homeservers.entries, server]
        return warning(
            "LiveKit",
            f"{text}. The configuration intends this",
            self._setup.block,
            f"full_access_homeservers: {servers}    # to let its users start calls",
        )

    def _token_for_user(self, livekit_room: str) -> str:
        """A token as this user gets it, for a device that does not exist."""
        identity = device_identity(self._user_id, f"CHECK{os.urandom(4).hex()}")
        owner = ParticipantOwner(self._user_id, self._room_id, DEFAULT_SLOT)
        return self._livekit.signer.participant_token(
            identity,
            livekit_room,
            may_create_room=self._permissions.has_full_access,
            can_publish=self._permissions.can_publish,
            can_update_own_metadata=self._setup.module.can_update_own_metadata,
            attributes=self._sealer.seal(owner, identity),
            lifetime_ms=60_000,
        )

    def _user_of(self, participant: ParticipantInfo, livekit_room: str) -> str | None:
        if is_too_long(participant.identity):
            return None
        return call_participant(participant, livekit_room, self._sealer).user_id
