# SPDX-License-Identifier: Apache-2.0
"""Which users have full access, and which users may publish.

The module creates LiveKit rooms for users with full access. Restricted users can only join a call
that a user with full access has started. Both server lists are about other homeservers: registered
users of this homeserver have full access and may publish, unless they are shadow-banned.
"""

import re
from enum import Enum

import attr
from matrix_common.regex import glob_to_regex


@attr.s(frozen=True, slots=True)
class ServerList:
    """Server names, exact or as globs with `*` and `?`.

    Entries match the whole server name, port included, and ignore case.

    Attributes:
        entries: the names and globs, as the admin wrote them.
    """

    entries: tuple[str, ...] = attr.ib()
    _patterns: tuple["re.Pattern[str]", ...] = attr.ib(init=False, eq=False, repr=False)

    @_patterns.default
    def _compile(self) -> tuple["re.Pattern[str]", ...]:
        return tuple(glob_to_regex(entry, ignore_case=True) for entry in self.entries)

    @property
    def has_all(self) -> bool:
        """Whether every server is on the list."""
        return any(set(entry) == {"*"} for entry in self.entries)

    def __contains__(self, server_name: str) -> bool:
        return self.has_all or any(p.match(server_name) for p in self._patterns)


class Standing(Enum):
    """What Synapse knows about an account that changes its permissions in calls."""

    NORMAL = "normal"
    GUEST = "guest"
    SHADOW_BANNED = "shadow_banned"


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Permissions:
    """What one user may do on this homeserver's SFU.

    Attributes:
        has_full_access: whether the module creates LiveKit rooms for the user.
        can_publish: whether the user may publish audio, video and data, or only listen.
    """

    has_full_access: bool
    can_publish: bool


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Access:
    """The access rule of one homeserver.

    Attributes:
        server_name: this homeserver's own name.
        full_access_homeservers: other servers whose users have full access.
        remote_can_publish: other servers whose users may publish audio, video and data.
    """

    server_name: str
    full_access_homeservers: ServerList
    remote_can_publish: ServerList

    def permissions(self, server_name: str, standing: Standing = Standing.NORMAL) -> Permissions:
        """What a user may do.

        Args:
            server_name: the user's server.
            standing: the user's standing; NORMAL for users of other servers.
        """
        if server_name == self.server_name:
            return Permissions(
                has_full_access=standing is Standing.NORMAL,
                can_publish=standing is not Standing.SHADOW_BANNED,
            )
        return Permissions(
            has_full_access=server_name in self.full_access_homeservers,
            can_publish=server_name in self.remote_can_publish,
        )
