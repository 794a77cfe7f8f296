# SPDX-License-Identifier: Apache-2.0
"""LiveKit's webhooks: verified, bounded, and turned into what the rest of the module works with."""

import hashlib
import logging
import re

from google.protobuf.json_format import Parse, ParseError
from livekit.protocol.webhook import WebhookEvent
from synapse.api.errors import Codes, SynapseError
from synapse.http.site import SynapseRequest
from synapse.types import JsonDict

from synapse_lk_jwt import metrics
from synapse_lk_jwt.api.endpoint import Endpoint, authorization
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.livekit.ownership import OwnerSealer
from synapse_lk_jwt.livekit.participants import call_participant, is_of_user, is_too_long
from synapse_lk_jwt.livekit.tokens import (
    InvalidSignature,
    TokenSigner,
    unverified_claims,
    verify_webhook_body,
)
from synapse_lk_jwt.process_registry import ProcessRegistry
from synapse_lk_jwt.webhooks import Webhook, WebhookHandler

logger = logging.getLogger(__name__)

# A webhook of a client in the field has a few KB. A larger one is hashed piece by piece, and only
# its beginning is read.
MAX_READ_BYTES = 256 * 1024
PIECE_BYTES = 4 * 1024 * 1024

# Stands for all events that this module has no use for.
OTHER_EVENT = "other"

# LiveKit puts varying blanks between the parts. Our LiveKit rooms have names of 43 letters.
_BEGINNING = re.compile(
    rb'\{\s*"event"\s*:\s*"(?P<event>\w{1,64})"\s*,\s*"room"\s*:\s*\{\s*"sid"\s*:\s*"\w{0,64}"'
    rb'\s*,\s*"name"\s*:\s*"(?P<room>[A-Za-z0-9+/]{43})"'
)


class SfuWebhookResource(Endpoint):
    """LiveKit tells who has come and gone.

    POST /_synapse/client/livekit/jwt/sfu_webhook HTTP/1.1
    Authorization: …

    {"event": "participant_left", "room": {…}, "participant": {…}, …}
    """

    def __init__(
        self,
        homeserver: Homeserver,
        signer: TokenSigner,
        sealer: OwnerSealer,
        webhooks: WebhookHandler,
        processes: ProcessRegistry,
    ) -> None:
        super().__init__(homeserver)
        self._signer = signer
        self._sealer = sealer
        self._webhooks = webhooks
        self._processes = processes
        # Why webhooks were refused since the last one was taken.
        self._refused: set[str] = set()

    async def _async_render_POST(self, request: SynapseRequest) -> tuple[int, JsonDict]:
        rejected = metrics.webhooks_rejected
        try:
            signed = self._signer.verify_webhook(authorization(request))
            body, is_whole = await self._read(request, signed)
        except InvalidSignature as e:
            rejected.labels(e.cause).inc()
            claims = unverified_claims(authorization(request))
            if self._signer.has_key(claims.get("iss")) and isinstance(claims.get("sha256"), str):
                # It may be LiveKit's. That is no proof: anyone can write so.
                self._processes.note_rejected()
            if str(e) not in self._refused:
                self._refused.add(str(e))
                logger.warning(
                    "Rejected a request to the webhook endpoint that is not signed with livekit_key"
                    " and livekit_secret: %s. Anyone can send one. If webhooks do not arrive: %s",
                    e,
                    self._homeserver.check_command,
                )
            raise SynapseError(401, "The webhook is not signed", Codes.UNAUTHORIZED) from None
        try:
            webhook = read_webhook(body, self._sealer) if is_whole else read_beginning(body)
        except ValueError:
            # It is LiveKit's, but nothing that this version knows.
            rejected.labels("unreadable").inc()
            logger.warning("A webhook of LiveKit cannot be read")
            return 200, {}
        self._refused.clear()
        self._processes.note_webhook(webhook.livekit_room)
        try:
            await self._webhooks.on_webhook(webhook)
        except (self._homeserver.database.error, OSError) as e:
            # LiveKit tries again, also after the 500 that a programming error gives.
            rejected.labels("not_stored").inc()
            logger.error("A webhook of LiveKit cannot be noted: %s: %s", type(e).__name__, e)
            raise SynapseError(503, "The webhook cannot be noted", Codes.UNKNOWN) from None
        name = webhook.event if webhook.event in metrics.WEBHOOK_EVENTS else OTHER_EVENT
        metrics.webhooks.labels(name).inc()
        return 200, {}

    async def _read(self, request: SynapseRequest, signed: str) -> tuple[bytes, bool]:
        """The body, or its beginning if it is large, and whether that is all of it.

        Synapse's own limit for a request is 50 MB, or 13 MB with another `max_upload_size`. To hash
        as much at once would hold up all other requests.

        Raises:
            InvalidSignature: if LiveKit has signed another body.
        """
        assert request.content is not None
        body: bytes = request.content.read(MAX_READ_BYTES)
        sha256 = hashlib.sha256(body)
        is_whole = True
        while piece := request.content.read(PIECE_BYTES):
            is_whole = False
            await self._homeserver.background.sleep(0)
            sha256.update(piece)
        verify_webhook_body(signed, sha256.digest())
        return body, is_whole


def read_webhook(body: bytes, sealer: OwnerSealer) -> Webhook:
    """What a webhook says.

    Args:
        body: all of it.
        sealer: opens the owner of the participant.

    Raises:
        ValueError: if it is no webhook that this version knows.
    """
    try:
        event = Parse(body, WebhookEvent(), ignore_unknown_fields=True)
    except ParseError as e:
        raise ValueError(str(e)) from None
    participant = None
    if event.HasField("participant"):
        if not is_of_user(event.participant):
            return Webhook(OTHER_EVENT, event.room.name, None)
        if not is_too_long(event.participant.identity):
            participant = call_participant(event.participant, event.room.name, sealer)
    # Older livekit-protocol packages do not have the field.
    room_end_reason = getattr(event, "room_end_reason", 0)
    return Webhook(event.event, event.room.name, participant, room_end_reason)


def read_beginning(body: bytes) -> Webhook:
    """The event and the room of a webhook that is too large to be parsed.

    LiveKit puts all tracks of a participant into a webhook, and a track's name can have megabytes.

    Args:
        body: the beginning of it. LiveKit puts event and room first.

    Raises:
        ValueError: if it is not about a call of ours.
    """
    match = _BEGINNING.match(body)
    if match is None:
        raise ValueError("event and room are not at the beginning")
    return Webhook(match["event"].decode("ascii"), match["room"].decode("ascii"), None)
