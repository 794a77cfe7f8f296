# SPDX-License-Identifier: Apache-2.0
"""Who may do what: full access or restricted, and who may publish.

Full-access users make the LiveKit room come into being; restricted users can join a call that
somebody with full access has started, and no other. Users of this homeserver always have full
access and may always publish, whatever the lists say.
"""

import re

import attr
from matrix_common.regex import glob_to_regex


@attr.s(frozen=True, slots=True)
class ServerList:
    """Server names, exact or as globs with `*` and `?`.

    Entries are matched against the whole server name, port included, without regard to case.

    Attributes:
        entries: the names and globs, as they were written.
    """

    entries: tuple[str, ...] = attr.ib()
    _patterns: tuple["re.Pattern[str]", ...] = attr.ib(init=False, eq=False, repr=False)

    @_patterns.default
    def _compile(self) -> tuple["re.Pattern[str]", ...]:
        return tuple(glob_to_regex(entry, ignore_case=True) for entry in self.entries)

    @property
    def is_everyone(self) -> bool:
        """Whether every server is on the list."""
        return any(set(entry) == {"*"} for entry in self.entries)

    def __contains__(self, server_name: str) -> bool:
        return self.is_everyone or any(p.match(server_name) for p in self._patterns)


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

    def has_full_access(self, server_name: str) -> bool:
        """Whether users of that server may bring LiveKit rooms into being."""
        return server_name == self.server_name or server_name in self.full_access_homeservers

    def can_publish(self, server_name: str) -> bool:
        """Whether users of that server may publish, or only listen."""
        return server_name == self.server_name or server_name in self.remote_can_publish
