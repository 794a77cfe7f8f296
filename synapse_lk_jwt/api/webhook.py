# SPDX-License-Identifier: Apache-2.0
"""LiveKit's webhooks: verified, bounded, and turned into the module's own types."""

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

# Webhooks usually have a few KB. A larger one is hashed piece by piece, and only its beginning is
# read.
MAX_READ_BYTES = 256 * 1024
PIECE_BYTES = 4 * 1024 * 1024

# The name for events that LiveKit does not document, and for participants that are not users.
OTHER_EVENT = "other"

# The number of blanks between the parts varies. The names of our LiveKit rooms have 43 characters.
_BEGINNING = re.compile(
    rb'\{\s*"event"\s*:\s*"(?P<event>\w{1,64})"\s*,\s*"room"\s*:\s*\{\s*"sid"\s*:\s*"\w{0,64}"'
    rb'\s*,\s*"name"\s*:\s*"(?P<room>[A-Za-z0-9+/]{43})"'
)


class SfuWebhookResource(Endpoint):
    """Receives the events of LiveKit's rooms and participants.

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
        # Why webhooks were rejected since the last one that was accepted, for the log.
        self._reasons: set[str] = set()

    async def _async_render_POST(self, request: SynapseRequest) -> tuple[int, JsonDict]:
        rejected = metrics.webhooks_rejected
        try:
            signed = self._signer.verify_webhook(authorization(request))
            body, is_whole = await self._read(request, signed)
        except InvalidSignature as e:
            rejected.labels(e.cause).inc()
            self._report(e, authorization(request))
            text = "The signature of the webhook is not valid"
            raise SynapseError(401, text, Codes.UNAUTHORIZED) from None
        try:
            webhook = read_webhook(body, self._sealer) if is_whole else read_beginning(body)
        except ValueError:
            rejected.labels("unreadable").inc()
            logger.warning(
                "Ignored a webhook of LiveKit that cannot be read. If LiveKit is newer than"
                " synapse-lk-jwt, upgrade synapse-lk-jwt"
            )
            return 200, {}
        self._reasons.clear()
        self._processes.note_webhook(webhook.livekit_room)
        try:
            await self._webhooks.on_webhook(webhook)
        except (self._homeserver.database.error, OSError) as e:
            # LiveKit sends the webhook again, as after the 500 that a programming error causes.
            rejected.labels("not_stored").inc()
            logger.error(
                "Could not store a webhook of LiveKit in the database: %s: %s. LiveKit sends it"
                " again",
                type(e).__name__,
                e,
            )
            raise SynapseError(503, "The webhook could not be stored", Codes.UNKNOWN) from None
        name = webhook.event if webhook.event in metrics.WEBHOOK_EVENTS else OTHER_EVENT
        metrics.webhooks.labels(name).inc()
        return 200, {}

    def _report(self, error: InvalidSignature, token: str) -> None:
        """Logs a rejected webhook, once for each reason until the next accepted one."""
        claims = unverified_claims(token)
        if self._signer.has_key(claims.get("iss")) and isinstance(claims.get("sha256"), str):
            # It may be LiveKit's. These claims are no proof, because any client can write them.
            self._processes.note_rejected()
        if str(error) not in self._reasons:
            self._reasons.add(str(error))
            logger.warning(
                "Rejected a request to the webhook endpoint that is not signed with livekit_key"
                " and livekit_secret: %s. Any client can send one. If webhooks do not arrive: %s",
                error,
                self._homeserver.check_command,
            )

    async def _read(self, request: SynapseRequest, signed: str) -> tuple[bytes, bool]:
        """Returns the body, or its beginning if it is large, and whether it is the whole body.

        Synapse accepts requests of 50 MB, or of 13 MB with another `max_upload_size`. Hashing so
        large a body in one piece would delay all other requests.

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
    """Reads a webhook.

    Args:
        body: the whole body.
        sealer: opens the owner of the participant.

    Raises:
        ValueError: if the body is no webhook.
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
    """Reads the event and the room of a webhook that is too large to be parsed.

    A webhook holds all tracks of a participant, and the name of a track can have megabytes.

    Args:
        body: the beginning of the body. LiveKit writes the event and the room first.

    Raises:
        ValueError: if the webhook is not about one of our calls.
    """
    match = _BEGINNING.match(body)
    if match is None:
        raise ValueError("event and room are not at the beginning")
    return Webhook(match["event"].decode("ascii"), match["room"].decode("ascii"), None)
