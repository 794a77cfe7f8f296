# SPDX-License-Identifier: Apache-2.0
"""Finds the user that an OpenID token belongs to.

Tokens of this homeserver are in its own database. A token of another homeserver is sent to the
homeserver that the client names (Matrix federation API,
`GET /_matrix/federation/v1/openid/userinfo`). That server may be hostile: its answer is bounded in
time and in size, and it is trusted for its own users only.
"""

from synapse_lk_jwt import metrics
from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.compat.http import NETWORK_ERRORS, read_body, within
from synapse_lk_jwt.identifiers import is_user_id
from synapse_lk_jwt.untrusted import parse_json

LOOK_UP_TIMEOUT_SEC = 10

# A user ID has at most 255 bytes. Other implementations may add keys of their own.
MAX_ANSWER_BYTES = 16 * 1024


class InvalidToken(Exception):
    """The token proves no user. The text names the cause, for the log only.

    Attributes:
        cause: `unknown`, `inactive_user`, `other_user`, `unreachable`, `refused` or `bad_answer`.
    """

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause


async def user_of_local_token(homeserver: Homeserver, token: str) -> str:
    """The local user that a token of this homeserver belongs to; one database read.

    Raises:
        InvalidToken: if the token is unknown or expired, or the user is not active any more.
    """
    with metrics.timing(metrics.openid_lookup_seconds.labels("local"), homeserver.reactor):
        user_id = await homeserver.users.of_openid_token(token)
        if user_id is None:
            raise InvalidToken("unknown", "unknown or expired")
        if not await homeserver.users.is_active(user_id):
            text = f"{user_id} is deactivated, locked, suspended, erased or expired"
            raise InvalidToken("inactive_user", text)
    return user_id


async def user_of_remote_token(homeserver: Homeserver, server: str, token: str) -> str:
    """The user that a token of another homeserver belongs to, according to that homeserver.

    Raises:
        InvalidToken: if the other homeserver rejects the token, does not answer within ten seconds,
            or does not name one of its own users.
    """

    async def ask() -> tuple[int, bytes]:
        response = await homeserver.federation.request(
            "GET",
            server,
            "/_matrix/federation/v1/openid/userinfo",
            {"access_token": token},
        )
        return response.code, await read_body(response, MAX_ANSWER_BYTES)

    with metrics.timing(metrics.openid_lookup_seconds.labels("remote"), homeserver.reactor):
        try:
            status, body = await within(LOOK_UP_TIMEOUT_SEC, homeserver.clock, ask)
        except NETWORK_ERRORS as e:
            # The text of such an error can contain the URL, and the URL contains the token.
            text = f"the request to {server} failed ({type(e).__name__})"
            raise InvalidToken("unreachable", text) from None
    return _user_in_answer(server, status, body)


def _user_in_answer(server: str, status: int, body: bytes) -> str:
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
        raise InvalidToken("bad_answer", f"{server} did not name a user of its own")
    return user_id
