# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path
from typing import Any

import attr
import pytest
import yaml
from synapse.config._base import ConfigError
from synapse.config.ratelimiting import RatelimitSettings

from synapse_lk_jwt import LiveKitJwtModule
from synapse_lk_jwt.access import ServerList
from synapse_lk_jwt.config import KEYS, LiveKitJwtConfig, parse_config
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


def test_the_smallest() -> None:
    config = parse()
    (warning,) = config.warnings
    assert warning.startswith("full_access_homeservers is '*'")
    assert "full_access_homeservers: []" in warning
    assert attr.evolve(config, warnings=()) == DEFAULT
    assert SECRET not in repr(config)


def test_every_key(tmp_path: Path) -> None:
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


def test_the_environment_is_behind_the_configuration(tmp_path: Path) -> None:
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


def test_files_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    environ = {"LIVEKIT_KEY": "APIkey", "LIVEKIT_SECRET_FROM_FILE": str(tmp_path / "secret")}
    assert parse_config({"livekit_url": "wss://a.org"}, environ).livekit_secret == SECRET


@pytest.mark.parametrize("empty", ["", " ", ","])
def test_the_legacy_variable(empty: str) -> None:
    environ = {"LIVEKIT_FULL_ACCESS_HOMESERVERS": empty, "LIVEKIT_LOCAL_HOMESERVERS": "legacy.org"}
    config = parse(environ)
    assert config.full_access_homeservers == ServerList(("legacy.org",))
    (warning,) = config.warnings
    assert "LIVEKIT_LOCAL_HOMESERVERS is deprecated" in warning
    assert parse({"LIVEKIT_LOCAL_HOMESERVERS": empty}).full_access_homeservers.is_everyone


def test_all_problems_are_told_at_once() -> None:
    message = error({"livekit_ulr": 1, "advertise": "maybe", "rc_token": {"per_second": 0}})
    assert message.startswith("6 problems\n")
    for problem in (
        "livekit_ulr: is not a key of this module; did you mean livekit_url?",
        "livekit_url: is missing; write livekit_url: wss://sfu.example.com",
        "livekit_key: is missing; write livekit_key or livekit_key_path",
        "livekit_secret: is missing",
        "advertise: must be service, both, msc4195 or off. Write 'service' unless all clients are"
        " new (docs/compatibility.md)",
        "rc_token: per_second must be a number above 0",
    ):
        assert problem in message


NO_RATES: list[Any] = [0, -1, "1", True, float("nan"), float("inf"), None]
WRONG: list[tuple[str, Any, str]] = [
    *(("livekit_url", value, "must be a URL such as wss://") for value in (
        "https://a.org", "sfu.example.com", "wss://", "wss://a.org:x", "wss://a b", "wss://a\n.org",
        "wss://a.org:0", "wss://a_b.org", "wss://[::1",
    )),
    *(("livekit_url", value, "must be a plain URL") for value in (
        "wss://user@a.org", "wss://a.org/?a=b", "wss://a.org/#a",
    )),
    ("livekit_url", 1, "must be a string"),
    ("livekit_url", "", "is empty"),
    ("livekit_internal_url", "ftp://a.org", "must be a URL such as http://127.0.0.1:7880"),
    ("service_url", "wss://a.org", "must be a URL such as https://"),
    ("livekit_key", 1, "must be a string; put the value in quotes"),
    ("livekit_secret", "", "is empty"),
    ("livekit_secret", f"{SECRET}\nmore", "must be one line"),
    ("livekit_secret_path", "/tmp", "is given twice"),
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
    ("sanity_check_interval", 30, "write '30s'"),
    ("sanity_check_interval", "-5s", "must be at least one second, or 0"),
    *(("path_prefix", value, "must not lie below /_matrix") for value in (
        "/_matrix", "/_matrix/client", "/_matrix/client/v1/rtc/",
    )),
    ("path_prefix", "/_synapse/admin/livekit", "must not lie below /_synapse/admin"),
    *(("path_prefix", value, "which Synapse serves") for value in (
        "/_synapse", "/_synapse/client", "/_synapse/client/", "/.well-known",
        "/_synapse/client/pick_idp",
    )),
    *(("path_prefix", value, "must be a path such as") for value in (
        "livekit", "/", "//a", "/a/../b", "/a?b", "/a b", "/%41",
    )),
    *(("rc_openid", value, "must hold per_second and burst_count") for value in (1, "x", None)),
    *(("rc_openid", {"per_second": value}, "must be a number above 0") for value in NO_RATES),
    ("rc_openid", {"burst_count": 0.5}, "burst_count must be at least 1"),
    ("rc_openid", {"burst": 1}, "has an unknown key 'burst'"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "fix"), WRONG)
def test_what_is_wrong(key: str, value: Any, fix: str) -> None:
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
def test_what_is_wrong_in_the_environment(variable: str, value: str) -> None:
    assert error(SMALLEST, {variable: value}).startswith(f"{variable}: ")


def test_two_sources_for_one_secret(tmp_path: Path) -> None:
    pair = tmp_path / "pair"
    pair.write_text(f"key: {SECRET}")
    both = {**SMALLEST, "livekit_key_file": str(pair)}
    assert "remove livekit_key and livekit_secret" in error(both)
    environ = {"LIVEKIT_KEY_FILE": str(pair), "LIVEKIT_SECRET": SECRET}
    assert "unset LIVEKIT_SECRET" in error({"livekit_url": "wss://a.org"}, environ)
    environ = {"LIVEKIT_KEY": "k", "LIVEKIT_SECRET": SECRET, "LIVEKIT_SECRET_FROM_FILE": "/x"}
    assert "LIVEKIT_SECRET: is given twice" in error({"livekit_url": "wss://a.org"}, environ)


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        (f"key: {SECRET}", ("key", SECRET)),
        (f"# ours\n'key': \"{SECRET}\"\n", ("key", SECRET)),
        (f"key:{SECRET}\n", ("key", SECRET)),
        ("123: 00123", ("123", "00123")),
    ],
)
def test_key_files(text: str, pair: tuple[str, str], tmp_path: Path) -> None:
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
        f"a: {SECRET}\nb: {SECRET}",
        f"key: [{SECRET}",
        f"- {SECRET}",
        f"a: {{b: {SECRET}}}",
    ],
)
def test_bad_key_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    message = error({"livekit_url": "wss://a.org", "livekit_key_file": str(tmp_path / "keys")})
    assert "must hold exactly one line 'key: secret'" in message or "is empty" in message


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(SECRET.encode() + b"\xff")
    for path, cause in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "binary", "not a text file"),
    ):
        config = {**SMALLEST, "livekit_secret_path": str(path)}
        del config["livekit_secret"]
        assert cause in error(config)


def test_a_short_secret_and_a_short_lifetime_are_warned_of() -> None:
    config = parse(livekit_secret="short", token_lifetime="5s", full_access_homeservers=[])
    lifetime, secret = sorted(config.warnings, reverse=True)
    assert lifetime.startswith("token_lifetime is 5 seconds")
    assert secret.startswith("livekit_secret has fewer than 32 characters")


def test_the_sample(tmp_path: Path) -> None:
    text = SAMPLE.read_text()
    for key in KEYS:
        assert re.search(rf"^\s*(# ?)?{key}:", text, re.M), key
    (module,) = yaml.safe_load(text)["modules"]
    assert module["module"] == "synapse_lk_jwt.LiveKitJwtModule"
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    block = {**module["config"], "livekit_secret_path": str(secret)}
    assert LiveKitJwtModule.parse_config(block).livekit_secret == SECRET


def test_the_sample_holds_the_defaults() -> None:
    """What is commented out is what counts without it."""
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
