# SPDX-License-Identifier: Apache-2.0
"""A participant in a LiveKit call: LiveKit's own client, with a tone as its microphone."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from array import array
from typing import Any

from livekit import rtc
from livekit.rtc import _ffi_client

_SAMPLE_RATE = 48_000
_FRAME_SAMPLES = 480
_AMPLITUDE = 8_000
# Such a tone arrives with a loudness of about 5,000. Silence has less than 1.
_LOUD = 1_000

# The client logs failures that tests expect. Its native part writes them itself while Python shuts
# down.
logging.getLogger("livekit").setLevel(logging.CRITICAL)
os.environ.setdefault("RUST_LOG", "off")


class _Os:
    """The module `os` for LiveKit's client, which sends SIGTERM to its own process on a panic.

    One of the native part's threads has then failed, for example one that was reconnecting while
    LiveKit was killed. The client prints the panic. The tests of other participants continue.
    """

    @staticmethod
    def kill(pid: int, number: int) -> None:
        """Sends no signal."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


setattr(_ffi_client, "os", _Os())  # noqa: B010


class CallRejected(Exception):
    """LiveKit rejected the connection. The message is LiveKit's answer."""


class Participant:
    """A participant in a call."""

    def __init__(self, room: rtc.Room) -> None:
        self._room = room
        self._tone: asyncio.Task[None] | None = None

    @classmethod
    async def join(cls, url: str, jwt: str, timeout: float = 15.0) -> Participant:
        """Connect to the call that the token is for.

        Args:
            url: the URL of the LiveKit server, `ws://…`.
            jwt: a LiveKit access token.
            timeout: seconds.

        Raises:
            CallRejected
        """
        room = rtc.Room()
        try:
            await asyncio.wait_for(room.connect(url, jwt), timeout)
        except rtc.ConnectError as error:
            raise CallRejected(error.message) from None
        except asyncio.TimeoutError:
            raise CallRejected(f"no answer within {timeout:.0f} s") from None
        return cls(room)

    @property
    def identity(self) -> str:
        return self._room.local_participant.identity

    @property
    def others(self) -> list[str]:
        """The identities of the other participants."""
        return list(self._room.remote_participants)

    @property
    def is_connected(self) -> bool:
        """Whether the client is still in the call. LiveKit may have removed it."""
        return self._room.isconnected()

    async def publish_tone(self, hertz: float = 440.0) -> None:
        """Publish a microphone track with a tone, until this participant leaves."""
        source = rtc.AudioSource(_SAMPLE_RATE, 1)
        track = rtc.LocalAudioTrack.create_audio_track("tone", source)
        options = rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_MICROPHONE)
        await self._room.local_participant.publish_track(track, options)
        self._tone = asyncio.create_task(_play(source, hertz))

    async def hear(self, identity: str, frames: int = 25, timeout: float = 15.0) -> int:
        """Wait until sound arrives from the microphone of another participant.

        Args:
            identity: the identity of the other participant.
            frames: how many loud frames, of 10 ms, must arrive.
            timeout: seconds.

        Returns:
            How many loud frames arrived.

        Raises:
            asyncio.TimeoutError
        """
        return await asyncio.wait_for(self._listen(identity, frames), timeout)

    async def leave(self) -> None:
        if self._tone is not None:
            self._tone.cancel()
        await self._room.disconnect()

    async def _listen(self, identity: str, frames: int) -> int:
        stream = rtc.AudioStream(await self._microphone(identity), sample_rate=_SAMPLE_RATE)
        loud = 0
        try:
            async for event in stream:
                if _loudness(event.frame) > _LOUD:
                    loud += 1
                if loud >= frames:
                    break
        finally:
            await stream.aclose()
        return loud

    async def _microphone(self, identity: str) -> rtc.Track:
        while True:
            other = self._room.remote_participants.get(identity)
            for publication in [] if other is None else other.track_publications.values():
                if publication.track is not None:
                    return publication.track
            await asyncio.sleep(0.02)


def _loudness(frame: rtc.AudioFrame) -> float:
    """The mean absolute value of the samples, 0 to 32,768."""
    samples = frame.data
    return sum(abs(sample) for sample in samples) / max(len(samples), 1)


async def _play(source: rtc.AudioSource, hertz: float) -> None:
    # One second, so that it contains a whole number of waves.
    tone = array(
        "h",
        (
            int(_AMPLITUDE * math.sin(2 * math.pi * round(hertz) * sample / _SAMPLE_RATE))
            for sample in range(_SAMPLE_RATE)
        ),
    ).tobytes()
    bytes_per_frame = _FRAME_SAMPLES * 2
    while True:
        for start in range(0, len(tone), bytes_per_frame):
            data = tone[start : start + bytes_per_frame]
            await source.capture_frame(rtc.AudioFrame(data, _SAMPLE_RATE, 1, _FRAME_SAMPLES))
