# SPDX-License-Identifier: Apache-2.0
"""What the checks need to know about Synapse's configuration."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attr

from synapse_lk_jwt.compat.config import MAIN, HomeServerConfig, SynapseConfig, relevant_options
from synapse_lk_jwt.compat.forward_proxy import ForwardProxy, forward_proxy
from synapse_lk_jwt.compat.rate_limits import RatelimitSettings
from synapse_lk_jwt.config import LiveKitJwtConfig
from synapse_lk_jwt.discovery import destination, livekit_transports, transports
from synapse_lk_jwt.identifiers import is_same_url

MODULE = "synapse_lk_jwt.LiveKitJwtModule"


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Credentials:
    """Where the API key and secret of LiveKit were read from.

    Attributes:
        secret_option: the option that gave the secret, such as `livekit_secret_path`; the name of
            an environment variable if it was one.
        files: all files that hold the key or the secret.
    """

    secret_option: str = "livekit_secret"  # noqa: S105
    files: tuple[str, ...] = ()

    @property
    def from_environment(self) -> bool:
        """Whether the secret came from an environment variable."""
        return self.secret_option.isupper()


@attr.s(auto_attribs=True, frozen=True, slots=True, kw_only=True)
class Setup(SynapseConfig):
    """A homeserver as its configuration describes it, without what the module adds to it.

    Attributes:
        module: the module's own configuration.
        file_of: the file of each top-level option.
        background: the name of the process that runs background tasks.
        times_loaded: how many times `modules:` lists the module.
        duplicate_options: top-level options that a file sets more than once, by file. `modules` is
            among them if more than one file sets it.
        credentials: where LiveKit's API key and secret were read from.
        livekit_proxy: the forward proxy between Synapse and LiveKit; None without one.
        base_url: `m.homeserver` of the public `.well-known/matrix/client`, if it was fetched.
    """

    module: LiveKitJwtConfig
    file_of: Mapping[str, str]
    background: str
    times_loaded: int
    duplicate_options: Mapping[str, Sequence[str]] = attr.ib(factory=dict)
    credentials: Credentials = attr.ib(factory=Credentials)
    livekit_proxy: ForwardProxy | None = None
    base_url: str | None = None

    @property
    def service_url(self) -> str:
        """The URL of the service endpoints that clients discover."""
        return self.module.service_url_at(self.public_baseurl)

    def announced(self, *, has_msc4195: bool = True) -> list[Mapping[str, Any]]:
        """The LiveKits that `rtc/transports` names: the admin's entries, else the module's.

        Args:
            has_msc4195: whether MSC4195's homeserver endpoints are served.
        """
        module = self.module
        advertise = module.advertise.where_served(has_msc4195)
        return livekit_transports(list(self.transports)) or [
            *transports(advertise, module.livekit_url, self.service_url)
        ]

    def is_among(self, entries: Iterable[Mapping[str, Any]]) -> bool:
        """Whether one of the entries names this module."""
        own = (self.service_url, self.module.livekit_url.rstrip("/"))
        places = [destination(entry).rstrip("/") for entry in entries]
        return any(is_same_url(place, url) for place in places for url in own)

    def file(self, option: str) -> str:
        """The file to write a top-level option to."""
        return self.file_of.get(option, self.files[0])

    @property
    def block(self) -> str:
        """Where to write an option of the module."""
        return f"{self.file('modules')}, below 'config:' of the module"

    @property
    def public_baseurl_line(self) -> str:
        """The line that sets `public_baseurl`, to the URL that clients use already if known."""
        if self.base_url is not None:
            return f"public_baseurl: {self.base_url}"
        return "public_baseurl: https://matrix.example.com/    # where clients reach Synapse"

    def settings(self) -> dict[str, str]:
        """The options that decide about calls, as text, without secrets.

        The running Synapse and the command both compute this, so that the command sees which
        options were changed since Synapse was started.
        """
        module = self.module
        return {
            "livekit_url": module.livekit_url,
            "livekit_internal_url": module.livekit_internal_url,
            "livekit_key": module.livekit_key,
            "livekit_key_file": " ".join(sorted(module.other_livekit_pairs)),
            "full_access_homeservers": " ".join(module.full_access_homeservers.entries),
            "remote_can_publish": " ".join(module.remote_can_publish.entries),
            "require_room_membership": str(module.require_room_membership).lower(),
            "rooms_elsewhere": "believe" if module.believe_rooms_elsewhere else "refuse",
            "token_lifetime": _duration(module.token_lifetime_ms),
            "can_update_own_metadata": str(module.can_update_own_metadata).lower(),
            "path_prefix": module.path_prefix,
            "service_url": module.service_url or "",
            "advertise": module.advertise.value,
            "sanity_check_interval": _duration(module.sanity_check_interval_ms),
            "rc_token": _rate(module.rc_token),
            "rc_openid": _rate(module.rc_openid),
            "public_baseurl": f"{self.public_baseurl}/" if self.has_public_baseurl else "",
            "max_event_delay_duration": _duration(self.max_event_delay_ms or 0),
            "msc4222_enabled": str(self.has_msc4222).lower(),
            "rc_message": _rate(self.rc_message),
            "rc_delayed_event_mgmt": _rate(self.rc_delayed_event_mgmt),
            "matrix_rtc": " ".join(map(destination, livekit_transports(list(self.transports)))),
            "extra_well_known_client_content": " ".join(
                map(destination, livekit_transports(self.foci))
            ),
            "federation_domain_whitelist": " ".join(sorted(self.whitelist or ())),
        }


def from_synapse(config: HomeServerConfig, module: LiveKitJwtConfig) -> Setup:
    """Reads Synapse's own configuration object.

    Args:
        config: Synapse's configuration.
        module: the module's part.
    """
    return Setup(
        module=module,
        file_of={},
        background=MAIN,
        times_loaded=1,
        livekit_proxy=forward_proxy(config, module.livekit_internal_url),
        **attr.asdict(relevant_options(config), recurse=False),
    )


def _duration(ms: int) -> str:
    return f"{ms / 1000:g}s"


def _rate(limit: RatelimitSettings) -> str:
    return f"{limit.per_second:g} per second, burst {limit.burst_count:g}"
