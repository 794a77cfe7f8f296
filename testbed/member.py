# SPDX-License-Identifier: Apache-2.0
"""A user in a call, as clients have it: in LiveKit, in the room's state, with a leave ahead."""

from __future__ import annotations

from dataclasses import dataclass

from testbed import service
from testbed.call import CallRefused, Participant
from testbed.livekit import LiveKit
from testbed.matrix import User
from testbed.process import until

MEMBER = "org.matrix.msc3401.call.member"
# What a room has to allow for everybody to say that they are in the call.
POWER_LEVELS = {"events": {MEMBER: 0}}


@dataclass
class Member:
    """A user in a call.

    Attributes:
        user: the user.
        room_id: the Matrix room.
        jwt: the LiveKit access token.
        there: the connection to LiveKit.
    """

    user: User
    room_id: str
    jwt: str
    there: Participant

    @property
    def key(self) -> str:
        """The state key of the membership in the call."""
        return f"_{self.user.user_id}_{self.user.device_id}"

    @property
    def livekit_room(self) -> str:
        room: str = service.claims(self.jwt)["video"]["room"]
        return room

    def is_in_room(self, seen_by: User) -> bool:
        """Whether the room's state says that this member is in the call."""
        return bool(seen_by.state(self.room_id, MEMBER, self.key))

    def leaves_sent(self) -> int:
        """How many leaves of this member the timeline has."""
        return sum(
            event["type"] == MEMBER and event["state_key"] == self.key and not event["content"]
            for event in self.user.timeline(self.room_id)
        )


async def enter(
    user: User, room_id: str, livekit: LiveKit, delay_ms: int, client_url: str | None = None
) -> Member:
    """Join a call as clients do, and hand over the leave as in `hand_over`."""
    body = service.get_token_body(user, room_id)
    jwt = service.post(client_url or user.client_url, "/get_token", body).ok()["jwt"]
    member = Member(user, room_id, jwt, await Participant.join(livekit.url, jwt))
    user.send_state(room_id, MEMBER, {"in": "the call"}, member.key)
    hand_over(member, delay_ms, client_url)
    return member


def hand_over(member: Member, delay_ms: int, client_url: str | None = None) -> None:
    """Schedule the leave of a member for so long ahead, and have it looked after.

    Args:
        member: whose leave it is.
        delay_ms: milliseconds until the leave would be sent.
        client_url: of the process that is asked, by default the user's.
    """
    delay_id = member.user.delay_state(member.room_id, MEMBER, {}, member.key, delay_ms)
    delay = {"delay_id": delay_id, "delay_timeout": delay_ms}
    body = service.get_token_body(member.user, member.room_id, **delay)
    service.post(client_url or member.user.client_url, "/delegate_delayed_leave", body).ok()


async def is_kept_out(url: str, jwt: str) -> None:
    """Come with a token, and wait until LiveKit has been told to throw its holder out.

    That may happen before the client is through with connecting.

    Raises:
        TimedOut
    """
    try:
        there = await Participant.join(url, jwt, timeout=5.0)
    except CallRefused:
        return
    await until(lambda: not there.is_connected, "removal", 5)
