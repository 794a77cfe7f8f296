# SPDX-License-Identifier: Apache-2.0
"""How often tokens may be asked for, with Synapse's own rate limiter."""

from synapse.config.ratelimiting import RatelimitSettings
from synapse.types import get_domain_from_id

from synapse_lk_jwt.homeserver import Homeserver


class Limits:
    """The rate limits of one process; every method raises LimitExceededError, Synapse's 429."""

    def __init__(
        self, homeserver: Homeserver, rc_token: RatelimitSettings, rc_openid: RatelimitSettings
    ) -> None:
        self._homeserver = homeserver
        self._tokens = homeserver.ratelimiter(rc_token)
        self._look_ups = homeserver.ratelimiter(rc_openid)

    async def ask_for_token(self, user_id: str, room_id: str) -> None:
        """Counts a request for a token, of a verified user of any server.

        In rooms that this homeserver is not in it also counts for the user's server: a hostile one
        has endless users there, and nobody here can know which of them are real.
        """
        homeserver = self._homeserver
        if await homeserver.is_exempt_from_limits(user_id):
            return
        await self._tokens.ratelimit(None, key=user_id)
        if not homeserver.is_mine(user_id) and not await homeserver.is_in_room(
            homeserver.server_name, room_id
        ):
            await self._tokens.ratelimit(None, key=get_domain_from_id(user_id))

    async def ask_other_server(self, client_address: str) -> None:
        """Counts a look-up of an OpenID token on another homeserver, ahead of it."""
        await self._look_ups.ratelimit(None, key=client_address)
