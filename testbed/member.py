# SPDX-License-Identifier: Apache-2.0
"""A user in a call as clients are: connected, with a membership event and a delegated leave."""

from __future__ import annotations

from dataclasses import dataclass

from testbed import service
from testbed.call import CallRejected, Participant
from testbed.livekit import LiveKit
from testbed.matrix import User
from testbed.process import until

MEMBER = "org.matrix.msc3401.call.member"
# With these power levels, every user may send a membership event.
POWER_LEVELS = {"events": {MEMBER: 0}}


@dataclass
class Member:
    """A user in a call.

    Attributes:
        user: the user.
        room_id: the Matrix room.
        jwt: the LiveKit access token.
        there: the participant, connected to LiveKit.
    """

    user: User
    room_id: str
    jwt: str
    there: Participant

    @property
    def key(self) -> str:
        """The state key of the membership event."""
        return f"_{self.user.user_id}_{self.user.device_id}"

    @property
    def livekit_room(self) -> str:
        room: str = service.claims(self.jwt)["video"]["room"]
        return room

    def is_in_room(self, seen_by: User) -> bool:
        """Whether the room state contains the membership of this member."""
        return bool(seen_by.state(self.room_id, MEMBER, self.key))

    def leaves_sent(self) -> int:
        """The number of leaves of this member in the timeline."""
        return sum(
            event["type"] == MEMBER and event["state_key"] == self.key and not event["content"]
            for event in self.user.timeline(self.room_id)
        )


async def enter(
    user: User, room_id: str, livekit: LiveKit, delay_ms: int, client_url: str | None = None
) -> Member:
    """Join a call as clients do, and delegate the leave as in `delegate_leave`."""
    body = service.get_token_body(user, room_id)
    jwt = service.post(client_url or user.client_url, "/get_token", body).ok()["jwt"]
    member = Member(user, room_id, jwt, await Participant.join(livekit.url, jwt))
    user.send_state(room_id, MEMBER, {"in": "the call"}, member.key)
    delegate_leave(member, delay_ms, client_url)
    return member


def delegate_leave(member: Member, delay_ms: int, client_url: str | None = None) -> None:
    """Schedule the delayed leave of a member, and delegate it to the module.

    Args:
        member: the member.
        delay_ms: the delay of the leave in milliseconds.
        client_url: the URL of the process that gets the request, by default the user's.
    """
    delay_id = member.user.delay_state(member.room_id, MEMBER, {}, member.key, delay_ms)
    delay = {"delay_id": delay_id, "delay_timeout": delay_ms}
    body = service.get_token_body(member.user, member.room_id, **delay)
    service.post(client_url or member.user.client_url, "/delegate_delayed_leave", body).ok()


async def is_kept_out(url: str, jwt: str) -> None:
    """Connect with a token, and wait until the module has removed the participant.

    The removal may happen while the client is still connecting.

    Raises:
        TimedOut
    """
    try:
        there = await Participant.join(url, jwt, timeout=5.0)
    except CallRejected:
        return
    await until(lambda: not there.is_connected, "removal", 5)
