# SPDX-License-Identifier: Apache-2.0
"""An OpenID token is turned into the user whose it is.

Tokens of this homeserver are looked up in its own database. Tokens of others are shown to the
homeserver that made them, which is a stranger: its answer is bounded, and it speaks for its own
users only (Matrix federation API, `GET /_matrix/federation/v1/openid/userinfo`).
"""

import logging

import attr

from synapse_lk_jwt import metrics
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.compat.http import NETWORK_ERRORS, read_body, within
from synapse_lk_jwt.identifiers import is_user_id
from synapse_lk_jwt.untrusted import parse_json

logger = logging.getLogger(__name__)

LOOK_UP_TIMEOUT_SEC = 10

# A user ID is 255 bytes at most; the rest is for keys that other implementations add.
MAX_ANSWER_BYTES = 16 * 1024


class InvalidToken(Exception):
    """The token proves nothing. The text says why, for the log alone."""

    def __init__(self, cause: metrics.OpenIdCause, text: str) -> None:
        super().__init__(text)
        self.cause = cause


@attr.s(auto_attribs=True, frozen=True, slots=True)
class OpenIdToken:
    """What a client got from its homeserver's `openid/request_token`.

    Attributes:
        access_token: the secret.
        matrix_server_name: the homeserver that made it.
    """

    access_token: str = attr.ib(repr=False)
    matrix_server_name: str


async def verify(homeserver: Homeserver, token: OpenIdToken) -> str:
    """Finds out who a token stands for.

    Returns:
        The user ID; of this homeserver if the token names it, else of the server that it names.

    Raises:
        InvalidToken: if the token is unknown, expired or another server's, if the user must not
            use this homeserver any more, or if the other server gave no proper answer.
    """
    is_local = homeserver.is_own_name(token.matrix_server_name)
    look_up, where = (_look_up, "local") if is_local else (_ask, "remote")
    with metrics.timing(metrics.openid_lookup_seconds.labels(where), homeserver.reactor):
        return await look_up(homeserver, token)


async def _look_up(homeserver: Homeserver, token: OpenIdToken) -> str:
    user_id = await homeserver.users.of_openid_token(token.access_token)
    if user_id is None:
        raise InvalidToken("unknown", "unknown or expired")
    if not await homeserver.users.is_active(user_id):
        raise InvalidToken(
            "inactive_user", f"{user_id} is deactivated, locked, suspended, erased or expired"
        )
    return user_id


async def _ask(homeserver: Homeserver, token: OpenIdToken) -> str:
    server = token.matrix_server_name

    async def ask() -> tuple[int, bytes]:
        response = await homeserver.federation.request(
            "GET",
            server,
            "/_matrix/federation/v1/openid/userinfo",
            {"access_token": token.access_token},
        )
        return response.code, await read_body(response, MAX_ANSWER_BYTES)

    try:
        status, body = await within(LOOK_UP_TIMEOUT_SEC, homeserver.clock, ask)
    except NETWORK_ERRORS as e:
        # The text of such an error may hold the URL and with it the token.
        raise InvalidToken(
            "unreachable", f"{server} could not be asked ({type(e).__name__})"
        ) from None
    if status in (401, 403):
        raise InvalidToken("refused", f"{server} answered {status}")
    if status != 200:
        raise InvalidToken("bad_answer", f"{server} answered {status}")
    try:
        answer = parse_json(body)
    except ValueError:
        raise InvalidToken("bad_answer", f"{server} did not answer with JSON") from None
    user_id = answer.get("sub") if isinstance(answer, dict) else None
    if not is_user_id(user_id, of_server=server):
        raise InvalidToken("bad_answer", f"{server} did not answer with a user of its own")
    return user_id
