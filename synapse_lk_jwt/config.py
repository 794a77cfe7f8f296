# SPDX-License-Identifier: Apache-2.0
"""The module's configuration: the block in homeserver.yaml, then the environment, then the default.

All values are checked here, secret files included: Synapse shows an error of `parse_config` as a
sentence, and any later error as a traceback. One error lists all problems. No message contains a
secret.
"""

import difflib
import ipaddress
import math
import os
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import attr
import idna
import yaml
from synapse.module_api.errors import ConfigError

from synapse_lk_jwt.auth.access import ServerList
from synapse_lk_jwt.compat.config import parse_duration
from synapse_lk_jwt.compat.rate_limits import RatelimitSettings
from synapse_lk_jwt.discovery import Advertise

T = TypeVar("T")

DEFAULT_PATH_PREFIX = "/_synapse/client/livekit/jwt"

# Paths outside of `/_matrix` that Synapse serves itself. A module's resource replaces resources at
# the same path and below it.
SYNAPSE_PATHS = (
    "/.well-known",
    "/_synapse/admin",
    "/_synapse/client/media_upload_limit_exceeded",
    "/_synapse/client/new_user_consent",
    "/_synapse/client/oidc",
    "/_synapse/client/password_reset",
    "/_synapse/client/pick_idp",
    "/_synapse/client/pick_username",
    "/_synapse/client/rendezvous",
    "/_synapse/client/saml2",
    "/_synapse/client/sso_register",
    "/_synapse/client/unsubscribe",
    "/_synapse/client/v1/config/federation_whitelist",
    "/_synapse/mas",
    "/_synapse/metrics",
    "/_synapse/replication",
    "/health",
)

# Synapse routes all requests below these paths to one resource, so ours would get none there.
SYNAPSE_SUBTREES = ("/_matrix", "/_synapse/admin", "/_synapse/metrics", "/health")

# Quotes that admins write around a value, and that `docker --env-file` keeps as part of it.
QUOTES = ('""', "''", "``", "“”", "‘’")

# Characters that fonts show as blank although their Unicode categories are those of visible ones.
BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | frozenset(
    map(chr, range(0xFE00, 0xFE10))
)

# LiveKit logs an error for shorter secrets, and RFC 7518 (section 3.2) forbids them for HS256.
RECOMMENDED_SECRET_LENGTH = 32


@attr.s(auto_attribs=True, frozen=True, slots=True, kw_only=True)
class LiveKitJwtConfig:
    """The checked configuration. Code that uses it does not check it again.

    Attributes:
        livekit_url: LiveKit's WebSocket URL for clients, without a slash at the end.
        livekit_internal_url: LiveKit's API for Synapse, `http(s)://`, without a slash at the end.
        livekit_key: LiveKit's API key.
        livekit_secret: the secret of that key.
        other_livekit_pairs: the other pairs of key and secret in livekit_key_file. The module signs
            no tokens with them. It accepts webhooks that they sign, and recognises participants
            whose tokens they signed.
        full_access_homeservers: servers whose users can start calls. Local users always can.
        remote_can_publish: other servers whose users can publish.
        require_room_membership: whether users must be joined to the Matrix room to get a token.
        believe_rooms_elsewhere: whether users of other servers get tokens for rooms that this
            homeserver is not in.
        token_lifetime_ms: milliseconds from issue to `exp`.
        can_update_own_metadata: LiveKit's grant `canUpdateOwnMetadata`.
        path_prefix: path of the service endpoints, without a slash at the end.
        service_url: the URL to advertise, or None for `public_baseurl` + `path_prefix`.
        advertise: the entries to add to `rtc/transports` and `.well-known`.
        sanity_check_interval_ms: milliseconds between two polls of LiveKit, or 0 for none.
        rc_token: rate of token requests for each user.
        rc_openid: rate of OpenID look-ups on other servers for each client address.
        warnings: log lines for the admin at start.
    """

    livekit_url: str
    livekit_internal_url: str
    livekit_key: str
    livekit_secret: str = attr.ib(repr=False)
    other_livekit_pairs: Mapping[str, str] = attr.ib(repr=False)
    full_access_homeservers: ServerList
    remote_can_publish: ServerList
    require_room_membership: bool
    believe_rooms_elsewhere: bool
    token_lifetime_ms: int
    can_update_own_metadata: bool
    path_prefix: str
    service_url: str | None
    advertise: Advertise
    sanity_check_interval_ms: int
    rc_token: RatelimitSettings
    rc_openid: RatelimitSettings
    warnings: tuple[str, ...]

    def service_url_at(self, public_baseurl: str) -> str:
        """The URL of the service endpoints that is advertised to clients.

        Args:
            public_baseurl: Synapse's own, used unless `service_url` is set.
        """
        return self.service_url or f"{public_baseurl.rstrip('/')}{self.path_prefix}"


OPTIONS = (
    "livekit_url",
    "livekit_internal_url",
    "livekit_key",
    "livekit_key_path",
    "livekit_secret",
    "livekit_secret_path",
    "livekit_key_file",
    "full_access_homeservers",
    "remote_can_publish",
    "require_room_membership",
    "rooms_elsewhere",
    "token_lifetime",
    "can_update_own_metadata",
    "path_prefix",
    "service_url",
    "advertise",
    "sanity_check_interval",
    "rc_token",
    "rc_openid",
)


class _Invalid(Exception):
    """A value is invalid. The text says what to write instead."""


def parse_config(
    config: Mapping[str, Any], environ: Mapping[str, str] | None = None
) -> LiveKitJwtConfig:
    """Checks the module's block in homeserver.yaml.

    Args:
        config: the `config:` mapping of the module.
        environ: the environment variables, by default those of this process.

    Raises:
        ConfigError: listing all invalid options and what to write instead.
    """
    return _Parser(config, os.environ if environ is None else environ).parse()


class _Parser:
    """Reads one configuration and collects its problems."""

    def __init__(self, config: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        if not isinstance(config, Mapping):
            raise ConfigError("must be a mapping of options to values")
        self._config = config
        # An empty variable counts as unset: compose files and unit files pass unset variables so.
        self._environ: dict[str, str] = {}
        self._quoted: set[str] = set()
        for name, value in environ.items():
            text = _strip(value)
            unquoted = _strip(text[1:-1]) if _is_quoted(text) else text
            if unquoted:
                self._environ[name] = unquoted
                if unquoted != text:
                    self._quoted.add(name)
        self._problems: list[tuple[str, str]] = []
        self._warnings: list[str] = []

    def parse(self) -> LiveKitJwtConfig:
        for name in map(str, self._config):
            if name not in OPTIONS:
                self._problems.append((name, _unknown(name)))

        if "livekit_url" not in self._config and "LIVEKIT_URL" not in self._environ:
            self._problems.append(
                ("livekit_url", "is missing. Write livekit_url: wss://sfu.example.com")
            )
        livekit_url = self._livekit_url()
        internal_url = self._value("livekit_internal_url", _api_url, "")
        pairs = self._credentials()

        values: dict[str, Any] = {
            "full_access_homeservers": self._full_access_homeservers(),
            "remote_can_publish": self._remote_can_publish(),
            "require_room_membership": self._value(
                "require_room_membership", _boolean, True, "LIVEKIT_REQUIRE_MEMBERSHIP"
            ),
            "believe_rooms_elsewhere": self._value("rooms_elsewhere", _rooms_elsewhere, True),
            "token_lifetime_ms": self._token_lifetime(),
            "can_update_own_metadata": self._value(
                "can_update_own_metadata", _boolean, False, "LIVEKIT_CAN_UPDATE_OWN_METADATA"
            ),
            "path_prefix": self._value("path_prefix", _path_prefix, DEFAULT_PATH_PREFIX),
            "service_url": self._value("service_url", _http_url, "") or None,
            "advertise": self._value("advertise", _advertise, Advertise.SERVICE),
            "sanity_check_interval_ms": self._sanity_check_interval(),
            "rc_token": self._rate("rc_token", per_second=1, burst_count=20),
            "rc_openid": self._rate("rc_openid", per_second=10, burst_count=100),
        }
        if self._problems:
            raise self._error()

        (key, secret), *others = pairs.items()
        return LiveKitJwtConfig(
            livekit_url=livekit_url,
            livekit_internal_url=internal_url or _api_url(livekit_url),
            livekit_key=key,
            livekit_secret=secret,
            other_livekit_pairs=dict(others),
            warnings=tuple(self._warnings),
            **values,
        )

    def _error(self) -> ConfigError:
        lines = [f"{option}: {text}" for option, text in self._problems]
        if len(lines) == 1:
            return ConfigError(lines[0], path=(self._problems[0][0],))
        return ConfigError(f"{len(lines)} problems\n  " + "\n  ".join(lines))

    def _check(self, option: str, check: Callable[[Any], T], value: Any, default: T) -> T:
        if option in self._quoted:
            self._warnings.append(
                f"{option} has quotes around its value, and the module ignores them. docker"
                " --env-file does not remove quotes. Remove them, or write the option in"
                " homeserver.yaml if they belong to the value."
            )
        try:
            return check(_clean(value))
        except _Invalid as e:
            self._problems.append((option, str(e)))
            return default

    def _value(
        self, option: str, check: Callable[[Any], T], default: T, variable: str | None = None
    ) -> T:
        """The value of an option, else of its environment variable, else the default."""
        if option in self._config:
            return self._check(option, check, self._config[option], default)
        if variable is not None and variable in self._environ:
            return self._check(variable, check, self._environ[variable], default)
        return default

    def _livekit_url(self) -> str:
        url = self._value("livekit_url", _livekit_url, "", "LIVEKIT_URL")
        if not url.startswith("http"):
            return url
        websocket_url = url.replace("http", "ws", 1)
        self._warnings.append(
            f"livekit_url is {url}, but clients need a WebSocket URL. The module uses"
            f" {websocket_url}. Write livekit_url: {websocket_url}"
        )
        return websocket_url

    def _credentials(self) -> dict[str, str]:
        """LiveKit's API keys and secrets. The pair that signs tokens is the first."""
        in_block = "livekit_key_file" in self._config
        secrets_in_block = _given(self._config, "livekit_secret", "livekit_secret_path")
        if in_block or ("LIVEKIT_KEY_FILE" in self._environ and not secrets_in_block):
            pairs = self._key_file(in_block)
        else:
            key = self._text_or_file("livekit_key", "LIVEKIT_KEY")
            secret = self._text_or_file("livekit_secret", "LIVEKIT_SECRET")
            pairs = {} if key is None or secret is None else {key: secret}
        for key, secret in pairs.items():
            self._warn_of_pair(key, secret)
        return pairs

    def _text_or_file(self, option: str, variable: str) -> str | None:
        """The API key or the secret, from its option or from its file."""
        for values, direct, path in (
            (self._config, option, f"{option}_path"),
            (self._environ, variable, f"{variable}_FROM_FILE"),
        ):
            if direct in values and path in values:
                self._problems.append((direct, f"conflicts with {path}. Remove one of them"))
                return None
            if direct in values:
                return self._check(direct, _credential, values[direct], None)
            if path in values:
                return self._check(path, _credential_file, values[path], None)
        self._problems.append(
            (option, f"is missing. Write {option} or {option}_path, as in LiveKit's configuration")
        )
        return None

    def _key_file(self, in_block: bool) -> dict[str, str]:
        """The pairs of a key file. The pair that livekit_key chooses is the first."""
        values: Mapping[str, Any] = self._config if in_block else self._environ
        name = "livekit_key_file" if in_block else "LIVEKIT_KEY_FILE"
        verb = "Remove" if in_block else "Unset"
        secrets = (
            ("livekit_secret", "livekit_secret_path")
            if in_block
            else ("LIVEKIT_SECRET", "LIVEKIT_SECRET_FROM_FILE")
        )
        given = _given(values, *secrets)
        if given:
            self._problems.append((name, f"contains the secret. {verb} {' and '.join(given)}"))
            return {}
        pairs: dict[str, str] = self._check(name, _pairs_of_file, values[name], {})
        chooses = _given(self._config, "livekit_key", "livekit_key_path")
        # The environment must not reject the only pair of a file in the block.
        if not in_block or len(pairs) > 1:
            chooses += _given(self._environ, "LIVEKIT_KEY", "LIVEKIT_KEY_FROM_FILE")
        if not pairs or (len(pairs) == 1 and not chooses):
            return pairs
        if not chooses:
            # The message shows no key: in a file with key and secret swapped it is the secret.
            self._problems.append(
                (name, f"contains {len(pairs)} pairs. Set livekit_key to the key to use")
            )
            return {}
        key = self._text_or_file("livekit_key", "LIVEKIT_KEY")
        if key is None:
            return {}
        if key not in pairs:
            text = f"is none of the {len(pairs)} keys in {name}. Write one of them"
            self._problems.append((chooses[0], text))
            return {}
        return {key: pairs.pop(key), **pairs}

    def _warn_of_pair(self, key: str, secret: str) -> None:
        if len(secret) < RECOMMENDED_SECRET_LENGTH:
            self._warnings.append(
                f"livekit_secret has fewer than {RECOMMENDED_SECRET_LENGTH} characters. A"
                " participant with a token can guess it. Create a longer one with 'livekit-server"
                " generate-keys', and write it into LiveKit's configuration too."
            )
        for option, value in (("livekit_key", key), ("livekit_secret", secret)):
            if _is_quoted(value):
                self._warnings.append(
                    f"{option} begins and ends with quotes, which count as part of the value."
                    " Remove them unless LiveKit's configuration has them too."
                )
            if re.fullmatch(r"\S+:\s+\S+", value):
                self._warnings.append(
                    f"{option} looks like 'key: secret'. Write only one of the two, or set"
                    " livekit_key_file to the file."
                )

    def _full_access_homeservers(self) -> ServerList:
        option = "full_access_homeservers"
        if option in self._config:
            servers = self._check(option, _servers, self._config[option], ServerList(()))
        else:
            servers = self._full_access_from_environment()
        if servers.has_all:
            self._warnings.append(
                "full_access_homeservers is '*', so users of every homeserver can start calls on"
                " your LiveKit. To allow only your own users, write full_access_homeservers: []."
            )
        return servers

    def _full_access_from_environment(self) -> ServerList:
        name, legacy = "LIVEKIT_FULL_ACCESS_HOMESERVERS", "LIVEKIT_LOCAL_HOMESERVERS"
        for variable in (name, legacy):
            if not self._lists_servers(variable):
                continue
            if variable == legacy:
                self._warnings.append(
                    f"{legacy} is deprecated. Rename it to {name}, or write"
                    " full_access_homeservers in homeserver.yaml."
                )
            return self._check(variable, _servers, self._environ[variable], ServerList(()))
        return ServerList(("*",))

    def _remote_can_publish(self) -> ServerList:
        variable = "LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS"
        return self._value(
            "remote_can_publish",
            _servers,
            ServerList(("*",)),
            variable if self._lists_servers(variable) else None,
        )

    def _lists_servers(self, variable: str) -> bool:
        """Whether a variable lists a server. One with separators only counts as unset."""
        return bool(re.sub(r"[,\s]+", "", self._environ.get(variable, "")))

    def _token_lifetime(self) -> int:
        lifetime = self._value("token_lifetime", _token_lifetime, 900_000)
        if lifetime < 60_000:
            self._warnings.append(
                f"token_lifetime is {lifetime / 1000:g} seconds. LiveKit rejects clients that need"
                " longer to connect or reconnect. The default is '15m'."
            )
        return lifetime

    def _sanity_check_interval(self) -> int:
        option, variable = "sanity_check_interval", "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS"
        if option not in self._config and variable in self._environ:
            return self._check(variable, _seconds, self._environ[variable], 0)
        return self._value(option, _interval, 30_000)

    def _rate(self, option: str, per_second: float, burst_count: int) -> RatelimitSettings:
        default = RatelimitSettings(key=option, per_second=per_second, burst_count=burst_count)

        def check(value: Any) -> RatelimitSettings:
            if not isinstance(value, dict):
                raise _Invalid(
                    f"must have per_second and burst_count, such as"
                    f" {{per_second: {per_second}, burst_count: {burst_count}}}"
                )
            for name, number in value.items():
                if name not in ("per_second", "burst_count"):
                    raise _Invalid(f"has no option {name!r}. Write per_second or burst_count")
                if type(number) not in (int, float) or not math.isfinite(number) or number <= 0:
                    raise _Invalid(f"{name} must be a number above 0")
            settings = RatelimitSettings(
                key=option,
                per_second=value.get("per_second", per_second),
                burst_count=int(value.get("burst_count", burst_count)),
            )
            if settings.burst_count < 1:
                raise _Invalid("burst_count must be at least 1")
            return settings

        return self._value(option, check, default)


def _unknown(option: str) -> str:
    near = difflib.get_close_matches(option, OPTIONS, n=1, cutoff=0)
    return f"is not an option of this module. Did you mean {near[0]}?"


def _given(values: Mapping[str, Any], *names: str) -> list[str]:
    return [name for name in names if name in values]


def _strip(text: str) -> str:
    """Removes white space and byte-order marks around a text."""
    return re.sub(r"^[\s\ufeff]+|[\s\ufeff]+$", "", text)


def _is_quoted(text: str) -> bool:
    return len(text) > 1 and text[0] + text[-1] in QUOTES


def _clean(value: Any) -> Any:
    """Strips a string, or each string of a list, as for every option.

    Raises:
        _Invalid: if it contains an invisible character.
    """
    if isinstance(value, list):
        return [_clean(entry) for entry in value]
    if not isinstance(value, str):
        return value
    text = _strip(value)
    for character in text:
        if _is_invisible(character):
            raise _Invalid(
                f"has an invisible character (U+{ord(character):04X}). Remove it, or type the value"
                " again"
            )
    return text


def _is_invisible(character: str) -> bool:
    if character in " \t\n\r":
        # Some options accept these, so each option checks them itself.
        return False
    category = unicodedata.category(character)
    return category[0] == "C" or category in ("Zs", "Zl", "Zp") or character in BLANK


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Invalid("must be a string. Put the value in quotes")
    if not value.strip():
        raise _Invalid("is empty. Write a value or remove the option")
    return value


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "1", "0"):
        # Environment variables are always strings. A quoted value in YAML is as clear.
        return value.strip().lower() in ("true", "1")
    raise _Invalid("must be true or false")


def _advertise(value: Any) -> Advertise:
    # YAML reads a bare `off` as false.
    values: dict[Any, Advertise] = {True: Advertise.SERVICE, False: Advertise.OFF}
    values |= {"true": Advertise.SERVICE, "false": Advertise.OFF}
    values |= {advertise.value: advertise for advertise in Advertise}
    if isinstance(value, str):
        value = value.strip().lower()
    if not isinstance(value, str | bool) or value not in values:
        raise _Invalid(
            "must be service, both, msc4195 or off. Write advertise: service unless all clients are"
            " new (docs/compatibility.md)"
        )
    return values[value]


def _rooms_elsewhere(value: Any) -> bool:
    if value not in ("believe", "refuse"):
        raise _Invalid(
            "must be 'believe' or 'refuse'. Write 'refuse' to issue no tokens for rooms that this"
            " homeserver is not in"
        )
    return bool(value == "believe")


def _url(value: Any, schemes: tuple[str, ...], example: str) -> str:
    """Checks a URL.

    Args:
        value: the value of an option.
        schemes: the accepted schemes. Messages name the first two.
        example: a URL for messages.

    Returns:
        The URL with scheme and host in lower case, and without a slash at the end.

    Raises:
        _Invalid: also for URLs that clients, proxies and Synapse could read differently.
    """
    text = _text(value)
    # The URL can contain a password, so no message before this check shows a part of it.
    if "@" in text:
        raise _Invalid(f"must be a URL without user and password, such as {example}")
    if re.search(r"\s", text) or len(text) > 2048:
        raise _Invalid(f"must be one URL without spaces, such as {example}")
    if "?" in text or "#" in text:
        raise _Invalid(f"must be a URL without '?' and '#', such as {example}")
    try:
        parts = urlsplit(text)
        name = parts.hostname
    except ValueError:
        what = "IPv6 address in brackets" if "[" in text or "]" in text else "host name"
        raise _Invalid(f"has no valid {what}. Write a URL such as {example}") from None
    if parts.scheme not in schemes or not parts.netloc:
        instead = f", not {parts.scheme}://" if "://" in text and parts.scheme else ""
        starts = " or ".join(f"{scheme}://" for scheme in schemes[:2])
        raise _Invalid(f"must start with {starts}{instead}. Write a URL such as {example}")
    host = _host(name or "", parts, example)
    port = _port(parts, f"{parts.scheme}://{host}:7880")
    if not re.fullmatch(r"[A-Za-z0-9._~!$&'()*+,;=:@%/-]*", parts.path):
        raise _Invalid(f"has characters in its path that must be written as %XX, such as {example}")
    if re.search(r"/\.\.?(/|$)", parts.path):
        raise _Invalid(f"must be a URL without '.' and '..' in its path, such as {example}")
    return f"{parts.scheme}://{host}{port}{parts.path}".rstrip("/")


def _host(name: str, parts: SplitResult, example: str) -> str:
    """The host of a URL, with brackets if it is an IPv6 address."""
    if "[" in parts.netloc or name.count(":") > 1 or parts.netloc.count(":") > 1:
        return _ipv6_host(name, parts, example)
    if not name.isascii():
        try:
            ascii_name = idna.encode(name, uts46=True).decode("ascii")
        except idna.IDNAError:
            ascii_name = "xn--…"
        raise _Invalid(
            f"has letters in its host name {name!r} that are not ASCII. Synapse and LiveKit do not"
            f" resolve them. Write {ascii_name}"
        )
    if "_" in name:
        raise _Invalid(
            f"has '_' in its host name {name!r}, which Synapse's HTTP client rejects. Write a name"
            f" without it, such as a container alias {name.replace('_', '-')!r}"
        )
    name = name.removesuffix(".")
    labels = name.split(".")
    if len(name) > 253 or not all(
        re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", label) for label in labels
    ):
        raise _Invalid(f"has no valid host name. Write a URL such as {example}")
    if labels[-1].isdigit() and not _is_address(name, ipaddress.IPv4Address):
        raise _Invalid(f"has no valid IPv4 address ({name}). Write four numbers from 0 to 255")
    return name


def _ipv6_host(name: str, parts: SplitResult, example: str) -> str:
    if "[" not in parts.netloc:
        address = parts.netloc
        if _is_address(address, ipaddress.IPv6Address):
            raise _Invalid(
                f"has an IPv6 address without brackets. Write {parts.scheme}://[{address}]"
            )
        raise _Invalid(f"has more than one port. Write a URL such as {example}")
    if not _is_address(name, ipaddress.IPv6Address) or "%" in name:
        raise _Invalid(
            f"has no valid IPv6 address in brackets. Write {parts.scheme}://[2001:db8::1] without a"
            " zone"
        )
    return f"[{name}]"


def _is_address(text: str, kind: type[ipaddress.IPv4Address] | type[ipaddress.IPv6Address]) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _port(parts: SplitResult, example: str) -> str:
    """The port of a URL, with its colon."""
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port is None:
        return ""
    if port == 0:
        raise _Invalid(f"must have a port from 1 to 65535, such as {example}")
    return f":{port}"


def _livekit_url(value: Any) -> str:
    return _url(value, ("wss", "ws", "https", "http"), "wss://sfu.example.com")


def _api_url(value: Any) -> str:
    url = _url(value, ("http", "https", "ws", "wss"), "http://127.0.0.1:7880")
    return re.sub(r"^ws", "http", url)


def _http_url(value: Any) -> str:
    return _url(value, ("https", "http"), f"https://matrix.example.com{DEFAULT_PATH_PREFIX}")


def _path_prefix(value: Any) -> str:
    text = _text(value)
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+/?", text) or re.search(r"/\.\.?(/|$)", text):
        raise _Invalid(f"must be a path such as {DEFAULT_PATH_PREFIX}")
    path = text.rstrip("/")
    for taken in SYNAPSE_SUBTREES:
        if path == taken or path.startswith(f"{taken}/"):
            raise _Invalid(f"must not be below {taken}. Write {DEFAULT_PATH_PREFIX}")
    for taken in SYNAPSE_PATHS:
        if taken == path or taken.startswith(f"{path}/"):
            raise _Invalid(
                f"would replace {taken}, which Synapse serves. Write {DEFAULT_PATH_PREFIX}"
            )
    return path


def _servers(value: Any) -> ServerList:
    example = "['example.org', '*.example.com'], or [] for none"
    if isinstance(value, str):
        _text(value)
        entries = [value]
    elif isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        entries = value
    else:
        raise _Invalid(f"must be a list of server names, such as {example}")
    names = [name for entry in entries for name in re.split(r"[,\s]+", entry) if name]
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9.:*?\[\]-]+", name):
            raise _Invalid(f"{name!r} is not a server name. Write server names, such as {example}")
    return ServerList(tuple(names))


def _duration(value: Any, example: str) -> int:
    wrong = _Invalid(f"must be a duration such as '{example}'")
    if isinstance(value, str) and not value.strip():
        raise wrong
    try:
        return parse_duration(value)
    except (ValueError, TypeError):
        raise wrong from None


def _token_lifetime(value: Any) -> int:
    duration = _duration(value, "15m")
    if duration < 1000:
        raise _Invalid(
            "must be at least one second. Write '15m' (a bare number counts milliseconds)"
        )
    return duration


def _interval(value: Any) -> int:
    duration = _duration(value, "30s")
    if duration < 0 or 0 < duration < 1000:
        raise _Invalid(
            "must be at least one second, or 0 for off. Write '30s' (a bare number counts"
            " milliseconds)"
        )
    return duration


def _seconds(value: Any) -> int:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0 or 0 < seconds < 1:
        raise _Invalid("must be a number of seconds, at least 1, or 0 for off. Write 30")
    return int(seconds * 1000)


def _credential(value: Any) -> str:
    text = _text(_clean(value))
    if re.search(r"[\t\n\r]", text):
        raise _Invalid("must be one line of text. Copy it from LiveKit's configuration")
    return text


def _read_file(path: Any) -> str:
    name = _text(path)
    try:
        with open(name, encoding="utf-8") as file:
            text = _strip(file.read())
    except (OSError, ValueError) as e:
        # The text of a ValueError quotes the bytes, which may be the secret.
        cause = e.strerror if isinstance(e, OSError) else "it is not a text file"
        raise _Invalid(
            f"cannot read {name!r} ({cause}). Name a file that Synapse's user can read"
        ) from None
    if not text:
        raise _Invalid(f"{name!r} is empty. Write the value from LiveKit's configuration into it")
    return text


def _credential_file(path: Any) -> str:
    text = _read_file(path)
    try:
        return _credential(text)
    except _Invalid as e:
        raise _Invalid(f"{path!r} {e}") from None


def _pairs_of_file(path: Any) -> dict[str, str]:
    """Reads a file in the form of LiveKit's `key_file`: YAML, a map of API keys to secrets."""
    text = _read_file(path)
    wrong = _Invalid(f"{path!r} must contain only lines 'key: secret', like LiveKit's own key_file")
    try:
        # BaseLoader reads every scalar as a string, so a secret of digits keeps its zeros.
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        # The YAML error quotes the line, which may contain the secret.
        raise wrong from None
    if isinstance(node, yaml.MappingNode):
        nodes = [part for pair in node.value for part in pair]
        if not all(isinstance(part, yaml.ScalarNode) for part in nodes):
            raise wrong
        pairs = [(key.value, secret.value) for key, secret in node.value]
    else:
        # lk-jwt-service also accepts 'key:secret' without a blank.
        lines = [line.partition(":") for line in text.splitlines() if not line.startswith("#")]
        pairs = [(key, secret) for key, _, secret in lines if key or secret]
    found: dict[str, str] = {}
    for number, pair in enumerate(pairs, 1):
        try:
            key, secret = map(_credential, pair)
        except _Invalid as e:
            # The message shows no key: if the two are swapped, it is the secret.
            raise _Invalid(f"{path!r}: key or secret of pair {number} {e}") from None
        if key in found:
            raise _Invalid(f"{path!r} has the key of pair {number} twice. Remove one of them")
        found[key] = secret
    if not found:
        raise wrong
    return found
