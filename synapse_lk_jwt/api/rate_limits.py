# SPDX-License-Identifier: Apache-2.0
"""Limits how often clients may request tokens, with Synapse's own rate limiter."""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv6Address, IPv6Network, ip_address

from synapse.api.errors import LimitExceededError
from synapse.types import get_domain_from_id

from synapse_lk_jwt.compat.homeserver import Homeserver
from synapse_lk_jwt.compat.rate_limits import RatelimitSettings

# How many OpenID tokens a process looks up on other homeservers at a time. Each look-up holds
# a connection open.
MAX_LOOK_UPS = 100
# The same for one client address: a client whose servers never answer must not block all others.
MAX_LOOK_UPS_FOR_ADDRESS = 50

# In rooms that this homeserver is not in, all users together may send this many times the requests
# of one user. An attacker can invent such users and their servers.
ELSEWHERE_FACTOR = 10


class Limits:
    """The rate limits of one process; every method raises LimitExceededError, Synapse's 429."""

    def __init__(
        self, homeserver: Homeserver, rc_token: RatelimitSettings, rc_openid: RatelimitSettings
    ) -> None:
        self._homeserver = homeserver
        self._tokens = homeserver.rate_limits.limiter(rc_token)
        self._elsewhere = homeserver.rate_limits.limiter(
            RatelimitSettings(
                key="rc_token (rooms elsewhere)",
                per_second=rc_token.per_second * ELSEWHERE_FACTOR,
                burst_count=rc_token.burst_count * ELSEWHERE_FACTOR,
            )
        )
        self._look_ups = homeserver.rate_limits.limiter(rc_openid)
        # The number of look-ups by address block, without zeros.
        self._in_flight: Counter[str] = Counter()

    async def count_token_request(self, user_id: str, room_id: str) -> None:
        """Counts a request of a verified user, local or remote.

        In rooms that this homeserver is not in, the request also counts for the user's server, and
        for all such rooms together. A hostile server can invent users, and its operator can invent
        servers.
        """
        homeserver = self._homeserver
        if await homeserver.rate_limits.is_exempt(user_id):
            return
        await self._tokens.ratelimit(None, key=user_id)
        if not homeserver.is_mine(user_id) and not await homeserver.rooms.is_host_joined(
            homeserver.server_name, room_id
        ):
            await self._tokens.ratelimit(None, key=get_domain_from_id(user_id))
            await self._elsewhere.ratelimit(None, key="all")

    @asynccontextmanager
    async def look_up(self, client_address: str) -> AsyncIterator[None]:
        """Counts a look-up of an OpenID token on another homeserver while it lasts."""
        block = address_block(client_address)
        await self._look_ups.ratelimit(None, key=block)
        in_flight = self._in_flight
        if in_flight.total() >= MAX_LOOK_UPS or in_flight[block] >= MAX_LOOK_UPS_FOR_ADDRESS:
            raise LimitExceededError("look-ups in flight", retry_after_ms=1000)
        in_flight[block] += 1
        try:
            yield
        finally:
            in_flight[block] -= 1
            if not in_flight[block]:
                del in_flight[block]


def address_block(address: str) -> str:
    """The addresses that share a limit: the /64 of an IPv6 address, or one IPv4 address.

    A single host commonly has a whole /64 (RFC 4291, section 2.5.4).
    """
    try:
        ip = ip_address(address)
    except ValueError:
        # The client is connected through a Unix socket.
        return address
    if isinstance(ip, IPv6Address):
        return str(ip.ipv4_mapped or IPv6Network((int(ip), 64), strict=False))
    return str(ip)
