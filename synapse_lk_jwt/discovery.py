# SPDX-License-Identifier: Apache-2.0
"""The transports (MSC4143) that this homeserver announces to clients.

A client requests tokens from the endpoints that an entry names, and these determine its participant
identity. Clients copy the entry into their call membership, where other clients read which identity
to expect. So no entry names both kinds of endpoint.
"""

import logging
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

logger = logging.getLogger(__name__)

# The feature in `/versions` that announces `rtc/transports`.
MSC4143 = "org.matrix.msc4143"

# The key of the list of services in `.well-known/matrix/client`.
FOCI = "org.matrix.msc4143.rtc_foci"

# The types of an entry that names a LiveKit server. MSC4195 changed it when it was accepted.
LIVEKIT_TYPES = ("livekit", "m.livekit")


class Advertise(Enum):
    """The values of the option `advertise`."""

    SERVICE = "service"
    BOTH = "both"
    MSC4195 = "msc4195"
    OFF = "off"

    @property
    def names_msc4195(self) -> bool:
        """Whether an entry names MSC4195's homeserver endpoints."""
        return self in (Advertise.BOTH, Advertise.MSC4195)

    def where_served(self, has_msc4195: bool) -> "Advertise":
        """The value that can take effect.

        Where MSC4195's endpoints are not served, the service takes their place: with an empty list
        clients report that calls are not supported.

        Args:
            has_msc4195: whether MSC4195's endpoints are served.
        """
        return self if has_msc4195 or not self.names_msc4195 else Advertise.SERVICE


def transports(advertise: Advertise, livekit_url: str, service_url: str) -> list[dict[str, str]]:
    """The entries for `rtc/transports`, in the order of preference of new clients."""
    return {
        Advertise.SERVICE: [_service(service_url)],
        Advertise.BOTH: [_msc4195(livekit_url), _service(service_url)],
        Advertise.MSC4195: [_msc4195(livekit_url)],
        Advertise.OFF: [],
    }[advertise]


def foci(advertise: Advertise, service_url: str) -> list[dict[str, str]]:
    """The entries for `.well-known/matrix/client`, where clients expect services only."""
    return [_service(service_url)] if advertise in (Advertise.SERVICE, Advertise.BOTH) else []


def _service(service_url: str) -> dict[str, str]:
    return {"type": "livekit", "livekit_service_url": service_url}


def _msc4195(livekit_url: str) -> dict[str, str]:
    return {"type": "m.livekit", "url": livekit_url}


def livekit_transports(entries: Any) -> list[Mapping[str, Any]]:
    """The entries of a list of transports or foci that name a LiveKit server.

    Clients and admins write such lists, so `entries` may be anything.
    """
    if not isinstance(entries, list):
        return []
    return [e for e in entries if isinstance(e, Mapping) and e.get("type") in LIVEKIT_TYPES]


def destination(entry: Mapping[str, Any]) -> str:
    """The URL that an entry of a list of transports or foci sends clients to, for messages."""
    return str(entry.get("livekit_service_url") or entry.get("url") or "no service")


def add_transports(where: str, entries: list[Any], ours: Sequence[Mapping[str, str]]) -> list[Any]:
    """The entries followed by ours, or unchanged if one of them names a LiveKit server.

    Args:
        where: names the list in the log.
        entries: the admin's entries.
        ours: the module's entries.
    """
    existing = livekit_transports(entries)
    if not existing:
        return [*entries, *ours]
    if any(entry not in existing for entry in ours):
        logger.info(
            "%s already names a LiveKit server in homeserver.yaml. The module adds no entry to it",
            where,
        )
    return entries
