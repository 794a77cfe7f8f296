# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path
from typing import Any

import attr
import pytest
import yaml
from synapse.module_api.errors import ConfigError

from synapse_lk_jwt import LiveKitJwtModule
from synapse_lk_jwt.auth.access import ServerList
from synapse_lk_jwt.compat.rate_limits import RatelimitSettings
from synapse_lk_jwt.config import OPTIONS, LiveKitJwtConfig, parse_config
from synapse_lk_jwt.discovery import Advertise

SECRET = "a-secret-that-no-message-may-ever-show"
SMALLEST = {
    "livekit_url": "wss://sfu.example.com",
    "livekit_key": "APIkey",
    "livekit_secret": SECRET,
}
SAMPLE = Path(__file__).resolve().parents[2] / "sample_homeserver.yaml"

DEFAULT = LiveKitJwtConfig(
    livekit_url="wss://sfu.example.com",
    livekit_internal_url="https://sfu.example.com",
    livekit_key="APIkey",
    livekit_secret=SECRET,
    other_livekit_pairs={},
    full_access_homeservers=ServerList(("*",)),
    remote_can_publish=ServerList(("*",)),
    require_room_membership=True,
    believe_rooms_elsewhere=True,
    token_lifetime_ms=900_000,
    can_update_own_metadata=False,
    path_prefix="/_synapse/client/livekit/jwt",
    service_url=None,
    advertise=Advertise.SERVICE,
    sanity_check_interval_ms=30_000,
    rc_token=RatelimitSettings(key="rc_token", per_second=1, burst_count=20),
    rc_openid=RatelimitSettings(key="rc_openid", per_second=10, burst_count=100),
    warnings=(),
)


def parse(environ: dict[str, str] | None = None, **config: Any) -> LiveKitJwtConfig:
    return parse_config({**SMALLEST, **config}, environ or {})


def error(config: Any, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as raised:
        parse_config(config, environ or {})
    assert SECRET not in raised.value.msg
    cause: BaseException | None = raised.value
    while cause is not None:
        assert SECRET not in str(cause)
        cause = cause.__cause__
    return raised.value.msg


def test_config_smallest_block_has_defaults_and_warns_of_full_access() -> None:
    config = parse()
    (warning,) = config.warnings
    assert warning.startswith("full_access_homeservers is '*'")
    assert "full_access_homeservers: []" in warning
    assert attr.evolve(config, warnings=()) == DEFAULT
    assert SECRET not in repr(config)


def with_secret_file(file: Path, content: bytes) -> dict[str, Any]:
    """The smallest block, with its secret in a file."""
    file.write_bytes(content)
    block = {key: value for key, value in SMALLEST.items() if key != "livekit_secret"}
    return {**block, "livekit_secret_path": str(file)}


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
def test_secret_file_with_any_line_ending_is_read(ending: bytes, tmp_path: Path) -> None:
    block = with_secret_file(tmp_path / "secret", SECRET.encode() + ending)
    assert parse_config(block, {}).livekit_secret == SECRET


@pytest.mark.parametrize(
    "content", [f"{SECRET}\nmore\n".encode(), SECRET.encode("utf-16"), b"\xff\xfe\n"]
)
def test_secret_file_with_two_lines_or_another_encoding_is_named(
    content: bytes, tmp_path: Path
) -> None:
    assert "livekit_secret_path" in error(with_secret_file(tmp_path / "secret", content))


def test_config_every_option_is_read(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("APIfile\n")
    (tmp_path / "secret").write_text(f"  {SECRET}\n")
    config = parse_config(
        {
            "livekit_url": "ws://sfu.example.com:7880/livekit",
            "livekit_internal_url": "ws://10.0.0.1:7880/",
            "livekit_key_path": str(tmp_path / "key"),
            "livekit_secret_path": str(tmp_path / "secret"),
            "full_access_homeservers": ["example.org", "*.example.com"],
            "remote_can_publish": [],
            "require_room_membership": False,
            "rooms_elsewhere": "refuse",
            "token_lifetime": "10m",
            "can_update_own_metadata": True,
            "path_prefix": "/livekit/jwt/",
            "service_url": "https://example.com/livekit/jwt/",
            "advertise": False,
            "sanity_check_interval": 0,
            "rc_token": {"per_second": 0.5, "burst_count": 5},
            "rc_openid": {"per_second": 2},
        },
        {},
    )
    assert config == LiveKitJwtConfig(
        livekit_url="ws://sfu.example.com:7880/livekit",
        livekit_internal_url="http://10.0.0.1:7880",
        livekit_key="APIfile",
        livekit_secret=SECRET,
        other_livekit_pairs={},
        full_access_homeservers=ServerList(("example.org", "*.example.com")),
        remote_can_publish=ServerList(()),
        require_room_membership=False,
        believe_rooms_elsewhere=False,
        token_lifetime_ms=600_000,
        can_update_own_metadata=True,
        path_prefix="/livekit/jwt",
        service_url="https://example.com/livekit/jwt",
        advertise=Advertise.OFF,
        sanity_check_interval_ms=0,
        rc_token=RatelimitSettings(key="rc_token", per_second=0.5, burst_count=5),
        rc_openid=RatelimitSettings(key="rc_openid", per_second=2, burst_count=100),
        warnings=(),
    )


def test_config_environment_is_used_where_block_is_silent(tmp_path: Path) -> None:
    (tmp_path / "pair").write_text(f"APIpair: {SECRET}\n")
    environ = {
        "LIVEKIT_URL": "wss://environment.example.com",
        "LIVEKIT_KEY_FILE": str(tmp_path / "pair"),
        "LIVEKIT_FULL_ACCESS_HOMESERVERS": "a.org, b.org\tc.org,",
        "LIVEKIT_LOCAL_HOMESERVERS": "legacy.org",
        "LIVEKIT_CAN_UPDATE_OWN_METADATA": "true",
        "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS": "5",
    }
    config = parse_config({}, environ)
    assert config == attr.evolve(
        DEFAULT,
        livekit_url="wss://environment.example.com",
        livekit_internal_url="https://environment.example.com",
        livekit_key="APIpair",
        full_access_homeservers=ServerList(("a.org", "b.org", "c.org")),
        can_update_own_metadata=True,
        sanity_check_interval_ms=5000,
    )
    config = parse(
        environ,
        full_access_homeservers=[],
        can_update_own_metadata=False,
        sanity_check_interval="1m",
    )
    assert config == attr.evolve(
        DEFAULT, full_access_homeservers=ServerList(()), sanity_check_interval_ms=60_000
    )


def test_config_secret_file_of_environment_is_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    environ = {"LIVEKIT_KEY": "APIkey", "LIVEKIT_SECRET_FROM_FILE": str(tmp_path / "secret")}
    assert parse_config({"livekit_url": "wss://a.org"}, environ).livekit_secret == SECRET


@pytest.mark.parametrize("empty", ["", " ", ","])
def test_config_legacy_variable_is_read_if_new_one_is_empty(empty: str) -> None:
    environ = {"LIVEKIT_FULL_ACCESS_HOMESERVERS": empty, "LIVEKIT_LOCAL_HOMESERVERS": "legacy.org"}
    config = parse(environ)
    assert config.full_access_homeservers == ServerList(("legacy.org",))
    (warning,) = config.warnings
    assert "LIVEKIT_LOCAL_HOMESERVERS is deprecated" in warning
    assert parse({"LIVEKIT_LOCAL_HOMESERVERS": empty}).full_access_homeservers.has_all


def test_config_with_several_problems_error_lists_all() -> None:
    message = error({"livekit_ulr": 1, "advertise": "maybe", "rc_token": {"per_second": 0}})
    assert message.startswith("6 problems\n")
    for problem in (
        "livekit_ulr: is not an option of this module. Did you mean livekit_url?",
        "livekit_url: is missing. Write livekit_url: wss://sfu.example.com",
        "livekit_key: is missing. Write livekit_key or livekit_key_path",
        "livekit_secret: is missing",
        "advertise: must be service, both, msc4195 or off. Write advertise: service unless all"
        " clients are new (docs/compatibility.md)",
        "rc_token: per_second must be a number above 0",
    ):
        assert problem in message


NO_RATES: list[Any] = [0, -1, "1", True, float("nan"), float("inf"), None]
WRONG: list[tuple[str, Any, str]] = [
    ("livekit_url", 1, "must be a string"),
    ("livekit_url", "", "is empty"),
    ("livekit_internal_url", "ftp://a.org", "http:// or https://, not ftp://. Write a URL"),
    ("service_url", "wss://a.org", "must start with https:// or http://, not wss://"),
    ("livekit_key", 1, "must be a string. Put the value in quotes"),
    ("livekit_secret", "", "is empty"),
    ("livekit_secret", f"{SECRET}\nmore", "must be one line"),
    ("livekit_secret_path", "/tmp", "conflicts with livekit_secret_path"),
    ("full_access_homeservers", None, "must be a list of server names"),
    ("full_access_homeservers", [1], "must be a list of server names"),
    ("full_access_homeservers", "", "is empty"),
    ("full_access_homeservers", ["https://a.org"], "'https://a.org' is not a server name"),
    ("remote_can_publish", {"a.org": True}, "must be a list of server names"),
    ("require_room_membership", 1, "must be true or false"),
    ("require_room_membership", None, "must be true or false"),
    ("rooms_elsewhere", "believed", "must be 'believe' or 'refuse'"),
    ("rooms_elsewhere", False, "must be 'believe' or 'refuse'"),
    ("rooms_elsewhere", ["refuse"], "must be 'believe' or 'refuse'"),
    ("token_lifetime", 60, "a bare number counts milliseconds"),
    ("token_lifetime", "1 hour", "must be a duration such as '15m'"),
    ("token_lifetime", True, "must be a duration"),
    ("token_lifetime", "", "must be a duration"),
    ("sanity_check_interval", 30, "Write '30s'"),
    ("sanity_check_interval", "-5s", "must be at least one second, or 0"),
    *(("path_prefix", value, "must not be below /_matrix") for value in (
        "/_matrix", "/_matrix/client", "/_matrix/client/v1/rtc/",
    )),
    ("path_prefix", "/_synapse/admin/livekit", "must not be below /_synapse/admin"),
    *(("path_prefix", value, "which Synapse serves") for value in (
        "/_synapse", "/_synapse/client", "/_synapse/client/", "/.well-known",
        "/_synapse/client/pick_idp",
    )),
    *(("path_prefix", value, "must be a path such as") for value in (
        "livekit", "/", "//a", "/a/../b", "/a?b", "/a b", "/%41",
    )),
    *(("rc_openid", value, "must have per_second and burst_count") for value in (1, "x", None)),
    *(("rc_openid", {"per_second": value}, "must be a number above 0") for value in NO_RATES),
    ("rc_openid", {"burst_count": 0.5}, "burst_count must be at least 1"),
    ("rc_openid", {"burst": 1}, "has no option 'burst'. Write per_second or burst_count"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "fix"), WRONG)
def test_config_invalid_value_error_names_option_and_fix(key: str, value: Any, fix: str) -> None:
    message = error({**SMALLEST, key: value})
    assert fix in message
    assert key in message


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "soon"),
        ("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "-1"),
        ("LIVEKIT_CAN_UPDATE_OWN_METADATA", "perhaps"),
        ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "a/b"),
    ],
)
def test_config_invalid_variable_error_names_variable(variable: str, value: str) -> None:
    assert error(SMALLEST, {variable: value}).startswith(f"{variable}: ")


@pytest.mark.parametrize(
    ("block", "environ", "fix"),
    [
        (
            {**SMALLEST, "livekit_key_file": "{pair}"},
            {},
            "livekit_key_file: contains the secret. Remove livekit_secret",
        ),
        (
            {"livekit_url": "wss://a.org"},
            {"LIVEKIT_KEY_FILE": "{pair}", "LIVEKIT_SECRET": SECRET},
            "LIVEKIT_KEY_FILE: contains the secret. Unset LIVEKIT_SECRET",
        ),
        (
            {"livekit_url": "wss://a.org"},
            {"LIVEKIT_KEY": "k", "LIVEKIT_SECRET": SECRET, "LIVEKIT_SECRET_FROM_FILE": "/x"},
            "LIVEKIT_SECRET: conflicts with LIVEKIT_SECRET_FROM_FILE. Remove one of them",
        ),
    ],
    ids=["block", "environment", "variable and file"],
)
def test_config_with_two_sources_for_one_secret_is_rejected(
    block: dict[str, str], environ: dict[str, str], fix: str, tmp_path: Path
) -> None:
    pair = tmp_path / "pair"
    pair.write_text(f"key: {SECRET}")
    block = {name: value.format(pair=pair) for name, value in block.items()}
    environ = {name: value.format(pair=pair) for name, value in environ.items()}
    assert error(block, environ) == fix


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        (f"key: {SECRET}", ("key", SECRET)),
        (f"# ours\n'key': \"{SECRET}\"\n", ("key", SECRET)),
        (f"key:{SECRET}\n", ("key", SECRET)),
        ("123: 00123", ("123", "00123")),
    ],
)
def test_key_file_with_one_pair_is_read(text: str, pair: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    config = parse_config(
        {"livekit_url": "wss://a.org", "livekit_key_file": str(tmp_path / "keys")}, {}
    )
    assert (config.livekit_key, config.livekit_secret) == pair


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        SECRET,
        f"a: {SECRET}\nbc",
        f"keys:\n  a: {SECRET}",
        f"key: [{SECRET}",
        f"- {SECRET}",
        f"a: {{b: {SECRET}}}",
    ],
)
def test_key_file_in_another_form_is_rejected(text: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    message = error({"livekit_url": "wss://a.org", "livekit_key_file": str(tmp_path / "keys")})
    assert "must contain only lines 'key: secret'" in message or "is empty" in message


@pytest.mark.parametrize(
    ("name", "cause"),
    [("none", "No such file"), ("", "Is a directory"), ("binary", "it is not a text file")],
)
def test_secret_file_that_cannot_be_read_error_names_cause(
    name: str, cause: str, tmp_path: Path
) -> None:
    (tmp_path / "binary").write_bytes(SECRET.encode() + b"\xff")
    config = {**SMALLEST, "livekit_secret_path": str(tmp_path / name)}
    del config["livekit_secret"]
    message = error(config)
    assert message.startswith("livekit_secret_path: cannot read '")
    assert f"({cause}" in message


@pytest.mark.parametrize(
    ("option", "value", "warned"),
    [
        ("livekit_secret", "short", "livekit_secret has fewer than 32 characters"),
        ("token_lifetime", "5s", "token_lifetime is 5 seconds"),
    ],
)
def test_config_short_value_gets_warning(option: str, value: str, warned: str) -> None:
    block: dict[str, Any] = {"full_access_homeservers": [], option: value}
    (warning,) = parse(**block).warnings
    assert warning.startswith(warned)


@pytest.mark.parametrize("option", OPTIONS)
def test_sample_has_every_option(option: str) -> None:
    assert re.search(rf"^\s*(# ?)?{option}:", SAMPLE.read_text(), re.M)


def test_sample_is_accepted(tmp_path: Path) -> None:
    text = SAMPLE.read_text()
    (module,) = yaml.safe_load(text)["modules"]
    assert module["module"] == "synapse_lk_jwt.LiveKitJwtModule"
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    block = {**module["config"], "livekit_secret_path": str(secret)}
    assert LiveKitJwtModule.parse_config(block).livekit_secret == SECRET


def test_sample_options_in_comments_hold_defaults() -> None:
    (module,) = yaml.safe_load(re.sub(r"^(\s+)# ?(\w+:)", r"\1\2", SAMPLE.read_text(), flags=re.M))[
        "modules"
    ]
    block = module["config"]
    for key in ("livekit_key_path", "livekit_key_file", "livekit_secret_path"):
        block.pop(key)
    config = parse_config({**block, "livekit_key": "APIkey", "livekit_secret": SECRET}, {})
    assert attr.evolve(
        config, warnings=(), livekit_internal_url="https://sfu.example.com", service_url=None
    ) == attr.evolve(DEFAULT)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, Advertise.SERVICE),
        ("true", Advertise.SERVICE),
        ("service", Advertise.SERVICE),
        ("both", Advertise.BOTH),
        ("Both ", Advertise.BOTH),
        ("msc4195", Advertise.MSC4195),
        ("MSC4195", Advertise.MSC4195),
        (False, Advertise.OFF),
        ("false", Advertise.OFF),
        ("off", Advertise.OFF),
    ],
)
def test_advertise_with_a_known_value_is_accepted(value: Any, expected: Advertise) -> None:
    assert parse_config({**SMALLEST, "advertise": value}, {}).advertise is expected


@pytest.mark.parametrize("value", ["on", "", 1, 0, None, [], ["service"], {}, "service,msc4195"])
def test_advertise_with_another_value_is_rejected(value: Any) -> None:
    assert "advertise: must be service, both, msc4195 or off" in error({"advertise": value})


# URLs in the shapes that admins write them in

URL_OPTIONS = {
    "livekit_url": "wss://sfu.example.com",
    "livekit_internal_url": "http://127.0.0.1:7880",
    "service_url": "https://matrix.example.com/_synapse/client/livekit/jwt",
}
URLS: list[tuple[str, str, str]] = [
    ("{scheme}a.org/", "{scheme}a.org", "a slash at the end"),
    ("{scheme}a.org//", "{scheme}a.org", "two slashes at the end"),
    ("{scheme}a.org/livekit/", "{scheme}a.org/livekit", "a slash behind a path"),
    ("{SCHEME}SFU.Example.ORG/Path", "{scheme}sfu.example.org/Path", "capitals"),
    ("{scheme}a.org.", "{scheme}a.org", "a dot at the end"),
    ("{scheme}a.org.:7880/x", "{scheme}a.org:7880/x", "a dot ahead of the port"),
    ("{scheme}a.org:", "{scheme}a.org", "a colon without a port"),
    ("{scheme}a.org:07880", "{scheme}a.org:7880", "a zero ahead of the port"),
    ("{scheme}a.org:65535", "{scheme}a.org:65535", "the last port"),
    ("{scheme}[::1]:7880", "{scheme}[::1]:7880", "an IPv6 address"),
    ("{scheme}[2001:DB8::1]/", "{scheme}[2001:db8::1]", "an IPv6 address in capitals"),
    ("{scheme}127.0.0.1:7880", "{scheme}127.0.0.1:7880", "an IPv4 address"),
    ("{scheme}localhost:7880", "{scheme}localhost:7880", "localhost"),
    ("{scheme}livekit:7880", "{scheme}livekit:7880", "a container"),
    ("{scheme}xn--bcher-kva.example", "{scheme}xn--bcher-kva.example", "punycode"),
    (" {scheme}a.org\n", "{scheme}a.org", "white space around it"),
    ("\ufeff{scheme}a.org", "{scheme}a.org", "a byte-order mark"),
    ("\xa0{scheme}a.org\xa0", "{scheme}a.org", "non-breaking spaces around it"),
    ("{scheme}a.org/a%20b~c", "{scheme}a.org/a%20b~c", "an escaped path"),
]


@pytest.mark.parametrize("option", URL_OPTIONS)
@pytest.mark.parametrize(("written", "used", "what"), URLS, ids=[what for _, _, what in URLS])
def test_url_written_with_is_accepted(option: str, written: str, used: str, what: str) -> None:
    scheme = URL_OPTIONS[option].partition("://")[0] + "://"
    names = {"scheme": scheme, "SCHEME": scheme.upper()}
    block: dict[str, Any] = {"full_access_homeservers": [], option: written.format(**names)}
    config = parse(**block)
    assert getattr(config, option) == used.format(**names)
    assert config.warnings == ()


BAD_URLS: list[tuple[str, str]] = [
    ("sfu.example.com", "must start with"),
    ("sfu.example.com:7880", "must start with"),
    ("localhost:7880", "must start with"),
    ("//sfu.example.com", "must start with"),
    ("{scheme}:a.org", "must start with"),
    ("{scheme}:/a.org", "must start with"),
    ("{scheme}:///a.org", "must start with"),
    ("{scheme}://", "must start with"),
    ("{scheme}:\\\\a.org", "must start with"),
    ("ftp://a.org", ", not ftp://"),
    ("{scheme}:// a.org", "without spaces"),
    ("{scheme}://a.org {scheme}://b.org", "one URL"),
    ("{scheme}://a.org, {scheme}://b.org", "one URL"),
    ("{scheme}://a.org,{scheme}://b.org", "no valid host name"),
    ("{scheme}://a\n.org", "without spaces"),
    ("{scheme}://a\u200b.org", "has an invisible character (U+200B)"),
    ("{scheme}://a\xa0b.org", "has an invisible character (U+00A0)"),
    ("{scheme}://user:a-secret-that-no-message-may-ever-show@a.org", "without user and password"),
    ("{scheme}://a-secret-that-no-message-may-ever-show@a.org", "without user and password"),
    ("{scheme}://a.org/?a=b", "without '?' and '#'"),
    ("{scheme}://a.org?", "without '?' and '#'"),
    ("{scheme}://a.org#", "without '?' and '#'"),
    ("{scheme}://a.org:0", "a port from 1 to 65535"),
    ("{scheme}://a.org:65536", "a port from 1 to 65535"),
    ("{scheme}://a.org:x", "a port from 1 to 65535"),
    ("{scheme}://a.org:-1", "a port from 1 to 65535"),
    ("{scheme}://a.org:7880:7881", "more than one port"),
    ("{scheme}://live_kit:7880", "a container alias 'live-kit'"),
    ("{scheme}://sfu.b\xfccher.example", "Write sfu.xn--bcher-kva.example"),
    ("{scheme}://sfu.stra\xdfe.example", "Write sfu.xn--strae-oqa.example"),
    ("{scheme}://\u0430.org", "are not ASCII"),
    ("{scheme}://a..org", "no valid host name"),
    ("{scheme}://.a.org", "no valid host name"),
    ("{scheme}://.", "no valid host name"),
    ("{scheme}://-a.org", "no valid host name"),
    ("{scheme}://%61.org", "no valid host name"),
    ("{scheme}://a\\b.org", "no valid host name"),
    ("{scheme}://<sfu.example.com>", "no valid host name"),
    ("'{scheme}://a.org'", "must start with"),
    ("{scheme}://" + 64 * "a" + ".org", "no valid host name"),
    ("{scheme}://10.0.0.256", "no valid IPv4 address"),
    ("{scheme}://10.0.1", "no valid IPv4 address"),
    ("{scheme}://::1", "without brackets. Write {scheme}://[::1]"),
    ("{scheme}://2001:db8::1", "Write {scheme}://[2001:db8::1]"),
    ("{scheme}://[::1", "no valid IPv6 address"),
    ("{scheme}://[::g]", "no valid IPv6 address"),
    ("{scheme}://[127.0.0.1]", "no valid IPv6 address"),
    ("{scheme}://[fe80::1%25eth0]", "without a zone"),
    ("{scheme}://a.org/gr\xf6\xdfe", "must be written as %XX"),
    ("{scheme}://a.org/a\\b", "must be written as %XX"),
    ("{scheme}://a.org/../b", "without '.' and '..'"),
    ("{scheme}://a.org/" + 2048 * "a", "must be one URL"),
]  # fmt: skip


@pytest.mark.parametrize("option", URL_OPTIONS)
@pytest.mark.parametrize(("written", "text"), BAD_URLS)
def test_url_that_cannot_be_used_is_rejected_with_fix(option: str, written: str, text: str) -> None:
    scheme = URL_OPTIONS[option].partition("://")[0]
    message = error({**SMALLEST, option: written.replace("{scheme}", scheme)})
    assert message.startswith(f"{option}: ")
    assert text.replace("{scheme}", scheme) in message


@pytest.mark.parametrize("is_variable", [False, True], ids=["option", "variable"])
@pytest.mark.parametrize(
    ("written", "used"),
    [
        ("https://sfu.example.com", "wss://sfu.example.com"),
        ("http://127.0.0.1:7880", "ws://127.0.0.1:7880"),
        ("HTTPS://SFU.example.com/livekit/", "wss://sfu.example.com/livekit"),
    ],
)
def test_livekit_url_with_http_is_read_as_websocket_url_with_warning(
    written: str, used: str, is_variable: bool
) -> None:
    block: dict[str, Any] = {**SMALLEST, "livekit_url": written, "full_access_homeservers": []}
    if is_variable:
        del block["livekit_url"]
    config = parse_config(block, {"LIVEKIT_URL": written} if is_variable else {})
    assert config.livekit_url == used
    assert config.livekit_internal_url == used.replace("ws", "http", 1)
    (warning,) = config.warnings
    assert f"Write livekit_url: {used}" in warning


# Byte-order marks, invisible characters, quotes


# The ways to give the secret, with `{secret}` for the text, `{path}` and `{pair}` for files of it.
SECRET_SOURCES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "livekit_secret": ({"livekit_key": "APIkey", "livekit_secret": "{secret}"}, {}),
    "livekit_secret_path": ({"livekit_key": "APIkey", "livekit_secret_path": "{path}"}, {}),
    "livekit_key_file": ({"livekit_key_file": "{pair}"}, {}),
    "LIVEKIT_SECRET": ({"livekit_key": "APIkey"}, {"LIVEKIT_SECRET": "{secret}"}),
    "LIVEKIT_SECRET_FROM_FILE": (
        {"livekit_key": "APIkey"},
        {"LIVEKIT_SECRET_FROM_FILE": "{path}"},
    ),
    "LIVEKIT_KEY_FILE": ({}, {"LIVEKIT_KEY_FILE": "{pair}"}),
}


def with_secret(source: str, secret: str, around: str, tmp_path: Path) -> Any:
    """A block and an environment that give a secret in one of these ways.

    Args:
        around: what surrounds the secret, or the line of the key file, such as `" {}"`.
    """
    for name, text in (("secret", secret), ("pair", f"APIkey: {secret}")):
        (tmp_path / name).write_text(around.format(text), encoding="utf-8", newline="")
    values = {
        "secret": around.format(secret),
        "path": str(tmp_path / "secret"),
        "pair": str(tmp_path / "pair"),
    }
    block, environ = (
        {name: value.format(**values) for name, value in given.items()}
        for given in SECRET_SOURCES[source]
    )
    return {"livekit_url": "wss://a.org", **block}, environ


@pytest.mark.parametrize("source", SECRET_SOURCES)
@pytest.mark.parametrize("around", ["\ufeff{}", "\ufeff{}\r\n", " \t{}\n\n", "\xa0{}\u2003"])
def test_secret_with_byte_order_mark_or_white_space_around_it_is_stripped(
    around: str, source: str, tmp_path: Path
) -> None:
    block, environ = with_secret(source, SECRET, around, tmp_path)
    assert parse_config(block, environ).livekit_secret == SECRET


@pytest.mark.parametrize("around", ["\ufeff{}\r\n", " {}\n"])
def test_path_variable_with_byte_order_mark_or_white_space_around_it_is_stripped(
    around: str, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text(SECRET)
    environ = {"LIVEKIT_SECRET_FROM_FILE": around.format(tmp_path / "secret")}
    block = {"livekit_url": "wss://a.org", "livekit_key": "APIkey"}
    assert parse_config(block, environ).livekit_secret == SECRET


INVISIBLE = "\u200b\u200d\u2060\ufeff\xa0\xad\x00\x07\x7f\x85\u2028\u202e\u2800\u3164\ufe0f\ue000"


@pytest.mark.parametrize("source", ["livekit_secret", "livekit_secret_path", "LIVEKIT_SECRET"])
@pytest.mark.parametrize("character", INVISIBLE, ids=[f"U+{ord(c):04X}" for c in INVISIBLE])
def test_secret_with_invisible_character_inside_is_rejected(
    character: str, source: str, tmp_path: Path
) -> None:
    block, environ = with_secret(source, f"{SECRET}{character}x", "{}", tmp_path)
    assert f"has an invisible character (U+{ord(character):04X})" in error(block, environ)


@pytest.mark.parametrize("pair", ["APIkey: {}\u200bx", "API\xa0key: {}", "APIkey:{}\u200bx"])
def test_key_file_with_invisible_character_is_rejected(pair: str, tmp_path: Path) -> None:
    (tmp_path / "pair").write_text(pair.format(SECRET), encoding="utf-8")
    message = error({"livekit_url": "wss://a.org", "livekit_key_file": str(tmp_path / "pair")})
    assert "key or secret of pair 1 has an invisible character (U+" in message


STRINGS: dict[str, Any] = {
    "livekit_url": "wss://a.org",
    "livekit_internal_url": "http://a.org",
    "service_url": "https://a.org",
    "livekit_key": "APIkey",
    "livekit_secret": SECRET,
    "full_access_homeservers": "a.org",
    "remote_can_publish": ["a.org", "b.org"],
    "require_room_membership": "true",
    "can_update_own_metadata": "false",
    "rooms_elsewhere": "believe",
    "token_lifetime": "15m",
    "sanity_check_interval": "30s",
    "path_prefix": "/livekit/jwt",
}


@pytest.mark.parametrize("option", STRINGS)
def test_string_option_with_blanks_around_is_stripped_and_inside_rejected(option: str) -> None:
    value = STRINGS[option]

    def change(form: str) -> Any:
        if isinstance(value, list):
            return [form.format(entry) for entry in value]
        return form.format(value)

    assert parse(**{option: change("\ufeff {}\u2003\n")}) == parse(**{option: value})
    inside = value[0] if isinstance(value, list) else value
    message = error({**SMALLEST, option: f"{inside[:-1]}\u200b{inside[-1]}"})
    assert message == (
        f"{option}: has an invisible character (U+200B). Remove it, or type the value again"
    )


@pytest.mark.parametrize("quotes", ['""', "''", "\u201c\u201d", "``"])
def test_environment_variable_in_quotes_is_used_without_them_with_warning(
    quotes: str, tmp_path: Path
) -> None:
    (tmp_path / "pair").write_text(f"APIkey: {SECRET}")
    values = {
        "LIVEKIT_URL": "wss://sfu.example.com",
        "LIVEKIT_KEY": "APIkey",
        "LIVEKIT_SECRET": SECRET,
        "LIVEKIT_FULL_ACCESS_HOMESERVERS": "a.org b.org",
        "LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS": "c.org",
        "LIVEKIT_REQUIRE_MEMBERSHIP": "false",
        "LIVEKIT_CAN_UPDATE_OWN_METADATA": "true",
        "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS": "5",
    }
    with_quotes = {name: f"{quotes[0]}{value}{quotes[1]}" for name, value in values.items()}
    config = parse_config({}, with_quotes)
    assert attr.evolve(config, warnings=()) == parse_config({}, values)
    assert {w.split()[0] for w in config.warnings if "has quotes around its value" in w} == set(
        values
    )
    assert not any(SECRET in warning for warning in config.warnings)
    path = f"{quotes[0]}{tmp_path / 'pair'}{quotes[1]}"
    config = parse_config({"livekit_url": "wss://a.org"}, {"LIVEKIT_KEY_FILE": path})
    assert config.livekit_secret == SECRET


def test_environment_variable_with_nothing_in_quotes_counts_as_unset() -> None:
    assert parse({"LIVEKIT_FULL_ACCESS_HOMESERVERS": '""', "LIVEKIT_KEY_FILE": "''"}) == parse()


def test_environment_variable_in_quotes_without_use_gets_no_warning() -> None:
    assert parse({"LIVEKIT_SECRET": f'"{SECRET}"', "HOME": '"x"'}) == parse()


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        (f'"{SECRET}"', "begins and ends with quotes"),
        (f"APIkey: {SECRET}", "looks like 'key: secret'"),
    ],
)
def test_secret_file_in_quotes_or_with_its_key_gets_warning(
    text: str, warned: str, tmp_path: Path
) -> None:
    block, environ = with_secret("livekit_secret_path", text, "{}", tmp_path)
    config = parse_config({**block, "full_access_homeservers": []}, environ)
    assert config.livekit_secret == text
    (warning,) = config.warnings
    assert warning.startswith("livekit_secret ")
    assert warned in warning
    assert SECRET not in warning


# Key files with several pairs

OLD, NEW = f"old-{SECRET}", f"new-{SECRET}"
TWO = f"APIold: {OLD}\nAPInew: {NEW}\n"


def several(tmp_path: Path, text: str = TWO) -> dict[str, Any]:
    (tmp_path / "keys").write_text(text)
    return {"livekit_url": "wss://a.org", "livekit_key_file": str(tmp_path / "keys")}


@pytest.mark.parametrize("text", [TWO, f"APIold:{OLD}\nAPInew:{NEW}", f"# ours\n{TWO}"])
@pytest.mark.parametrize(
    ("choice", "environ"),
    [
        ({"livekit_key": "APInew"}, {}),
        ({"livekit_key_path": "{key}"}, {}),
        ({}, {"LIVEKIT_KEY": "APInew"}),
        ({}, {"LIVEKIT_KEY_FROM_FILE": "{key}"}),
        (
            {"livekit_key": "APInew", "livekit_key_file": None},
            {"LIVEKIT_KEY_FILE": "{keys}", "LIVEKIT_KEY": "APIold"},
        ),
        ({"livekit_key_file": None}, {"LIVEKIT_KEY_FILE": "{keys}", "LIVEKIT_KEY": "APInew"}),
    ],
)
def test_key_file_with_several_pairs_livekit_key_chooses_one(
    choice: dict[str, str | None], environ: dict[str, str], text: str, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("APInew\n")
    files = {"key": tmp_path / "key", "keys": tmp_path / "keys"}
    block = {**several(tmp_path, text), **choice}
    parsed = parse_config(
        {name: value.format(**files) for name, value in block.items() if value is not None},
        {name: value.format(**files) for name, value in environ.items()},
    )
    assert (parsed.livekit_key, parsed.livekit_secret) == ("APInew", NEW)
    assert parsed.other_livekit_pairs == {"APIold": OLD}
    assert SECRET not in repr(parsed)


def test_key_file_with_several_pairs_and_no_choice_is_rejected(tmp_path: Path) -> None:
    message = error(several(tmp_path))
    assert message == "livekit_key_file: contains 2 pairs. Set livekit_key to the key to use"


@pytest.mark.parametrize("text", [TWO, f"APIold: {OLD}", f"{OLD}: APIold\n{NEW}: APInew"])
def test_key_file_without_the_chosen_key_is_rejected(text: str, tmp_path: Path) -> None:
    message = error({**several(tmp_path, text), "livekit_key": "APIother"})
    assert message.startswith("livekit_key: is none of the ")
    assert "in livekit_key_file" in message


def test_key_file_with_one_pair_may_be_named_by_livekit_key(tmp_path: Path) -> None:
    config = parse_config({**several(tmp_path, f"APInew: {NEW}"), "livekit_key": "APInew"}, {})
    assert (config.livekit_key, config.other_livekit_pairs) == ("APInew", {})


def test_key_file_with_one_pair_in_the_block_stands_alone(tmp_path: Path) -> None:
    environ = {"LIVEKIT_KEY": "APIother", "LIVEKIT_SECRET": OLD}
    config = parse_config(several(tmp_path, f"APInew: {NEW}"), environ)
    assert (config.livekit_key, config.livekit_secret) == ("APInew", NEW)


def test_key_file_with_a_key_twice_is_rejected(tmp_path: Path) -> None:
    block = several(tmp_path, f"APIold: {OLD}\nAPIold: {NEW}")
    assert "has the key of pair 2 twice" in error({**block, "livekit_key": "APIold"})


def test_key_file_and_a_secret_are_rejected(tmp_path: Path) -> None:
    block = several(tmp_path)
    message = error({**block, "livekit_key": "APInew", "livekit_secret_path": "/x"})
    assert message == "livekit_key_file: contains the secret. Remove livekit_secret_path"


def test_short_secret_among_several_gets_warning(tmp_path: Path) -> None:
    block = several(tmp_path, f"APIold: short\nAPInew: {NEW}")
    config = parse_config({**block, "livekit_key": "APInew", "full_access_homeservers": []}, {})
    (warning,) = config.warnings
    assert "fewer than 32 characters" in warning


# Variables of lk-jwt-service


def test_require_membership_variable_is_read_behind_the_block() -> None:
    environ = {"LIVEKIT_REQUIRE_MEMBERSHIP": "false"}
    assert parse(environ).require_room_membership is False
    assert parse(environ, require_room_membership=True).require_room_membership is True
    message = error(SMALLEST, {"LIVEKIT_REQUIRE_MEMBERSHIP": "no way"})
    assert message == "LIVEKIT_REQUIRE_MEMBERSHIP: must be true or false"


def test_remote_can_publish_variable_is_read_behind_the_block() -> None:
    environ = {"LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS": "a.org, *.b.org"}
    assert parse(environ).remote_can_publish == ServerList(("a.org", "*.b.org"))
    assert parse(environ, remote_can_publish=[]).remote_can_publish == ServerList(())
    assert parse({"LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS": " , "}).remote_can_publish.has_all
    message = error(SMALLEST, {"LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS": "a/b"})
    assert message.startswith("LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS: 'a/b' is not a server name")
