# SPDX-License-Identifier: Apache-2.0
"""`python -m synapse_lk_jwt migrate`: from the environment of lk-jwt-service to homeserver.yaml."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from synapse_lk_jwt.check.command import main
from synapse_lk_jwt.commands.migrate import report
from synapse_lk_jwt.config import parse_config

SECRET = "a-secret-that-must-never-be-printed"
ENVIRONMENT = {
    "LIVEKIT_URL": "wss://sfu.example.com",
    "LIVEKIT_KEY": "APIkey",
    "LIVEKIT_SECRET": SECRET,
}

COMPOSE = """
services:
  synapse:
    image: matrixdotorg/synapse:v1.163.2
  auth-service:
    image: ghcr.io/element-hq/lk-jwt-service:0.6.0
    env_file: [jwt.env]
    environment:
      LIVEKIT_URL: wss://${DOMAIN}/sfu
      LIVEKIT_KEY: ${KEY:-APIdefault}
      LIVEKIT_CAN_UPDATE_OWN_METADATA: true
"""


def block(text: str) -> dict[str, Any]:
    """What the report says to add to homeserver.yaml."""
    (part,) = (part for part in text.split("\n\n") if part.startswith("modules:"))
    content: dict[str, Any] = yaml.safe_load(part)
    assert content["max_event_delay_duration"] == "24h"
    (module,) = content["modules"]
    assert module["module"] == "synapse_lk_jwt.LiveKitJwtModule"
    config: dict[str, Any] = module["config"]
    return config


def options(**variables: str) -> dict[str, Any]:
    """The options for `ENVIRONMENT` with other variables."""
    return block(report({**ENVIRONMENT, **variables}, "the file"))


def test_migrate_smallest_environment_gives_the_three_options() -> None:
    assert options() == {
        "livekit_url": "wss://sfu.example.com",
        "livekit_key": "APIkey",
        "livekit_secret_path": "/etc/matrix-synapse/livekit_secret",
    }


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LIVEKIT_FULL_ACCESS_HOMESERVERS": "*"}, {"full_access_homeservers": "*"}),
        (
            {"LIVEKIT_FULL_ACCESS_HOMESERVERS": "a.example, b.example"},
            {"full_access_homeservers": ["a.example", "b.example"]},
        ),
        (
            {"LIVEKIT_LOCAL_HOMESERVERS": "a.example"},
            {"full_access_homeservers": ["a.example"]},
        ),
        (
            {
                "LIVEKIT_LOCAL_HOMESERVERS": "a.example",
                "LIVEKIT_FULL_ACCESS_HOMESERVERS": "b.example",
            },
            {"full_access_homeservers": ["b.example"]},
        ),
        (
            {"LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS": "a.example"},
            {"remote_can_publish": ["a.example"]},
        ),
        ({"LIVEKIT_REQUIRE_MEMBERSHIP": "false"}, {"require_room_membership": False}),
        ({"LIVEKIT_CAN_UPDATE_OWN_METADATA": "true"}, {"can_update_own_metadata": True}),
        ({"LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS": "60"}, {"sanity_check_interval": "60s"}),
        ({"LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS": "0"}, {"sanity_check_interval": 0}),
        ({"LIVEKIT_JWT_BIND": ":8080"}, {}),
    ],
)
def test_migrate_variable_gives_its_option(
    variables: dict[str, str], expected: dict[str, Any]
) -> None:
    assert options(**variables) == {**options(), **expected}


def test_migrate_files_for_key_and_secret_win_over_values() -> None:
    assert options(
        LIVEKIT_KEY_FROM_FILE="/run/secrets/key", LIVEKIT_SECRET_FROM_FILE="/run/secrets/secret"
    ) == {
        "livekit_url": "wss://sfu.example.com",
        "livekit_key_path": "/run/secrets/key",
        "livekit_secret_path": "/run/secrets/secret",
    }


def test_migrate_key_file_wins_over_all_other_sources() -> None:
    assert options(LIVEKIT_KEY_FILE="/keys.yaml", LIVEKIT_SECRET_FROM_FILE="/secret") == {
        "livekit_url": "wss://sfu.example.com",
        "livekit_key_file": "/keys.yaml",
    }


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"LIVEKIT_FULL_ACCESS_HOMESERVERS": "*", "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS": "0"},
        {
            "LIVEKIT_FULL_ACCESS_HOMESERVERS": "a.example b.example,",
            "LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS": "a.example",
            "LIVEKIT_REQUIRE_MEMBERSHIP": "1",
            "LIVEKIT_CAN_UPDATE_OWN_METADATA": "no",
            "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS": "30",
        },
    ],
)
def test_migrate_printed_block_is_a_valid_configuration(
    variables: dict[str, str], tmp_path: Path
) -> None:
    secret = tmp_path / "livekit_secret"
    secret.write_text(SECRET)
    config = block(report({**ENVIRONMENT, **variables}, "the file", str(secret)))
    assert parse_config(config, {}).livekit_secret == SECRET


def test_migrate_report_never_contains_a_secret() -> None:
    secrets = {
        "LIVEKIT_SECRET": SECRET,
        "LIVEKIT_AS_TOKEN": f"{SECRET}-as",
        "LIVEKIT_HS_TOKEN": f"{SECRET}-hs",
        "LIVEKIT_REDIS_URL": f"redis://:{SECRET}@redis:6379",
        "LIVEKIT_REDIS_PASSWORD": SECRET,
        "LIVEKIT_UNKNOWN": SECRET,
        "LIVEKIT_URL": f"wss://user:{SECRET}@sfu.example.com",
        "LIVEKIT_CAN_UPDATE_OWN_METADATA": SECRET,
    }
    assert SECRET not in report({**ENVIRONMENT, **secrets}, "the file")


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"LIVEKIT_URL": "ws://livekit:7880"}, "'livekit' is no public name"),
        ({}, "Write [] to allow only your own users"),
        ({}, "docs/migration.md"),
        ({"LIVEKIT_CAN_UPDATE_OWN_METADATA": "yes"}, "can_update_own_metadata: the value of"),
        ({"LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS": "1m"}, "sanity_check_interval: the value of"),
        ({"LIVEKIT_REDIS_URL": "redis://redis"}, "the Redis of lk-jwt-service"),
        ({"LIVEKIT_AS_REGISTRATION_FILE": "/as.yaml"}, "the registration file /as.yaml"),
        (
            {"LIVEKIT_AS_TOKEN": "t", "LIVEKIT_FULL_ACCESS_HOMESERVERS": "a.example"},
            "lk-jwt-service ignored this list",
        ),
        ({"LIVEKIT_NEW": "1"}, "LIVEKIT_NEW: this command does not know it"),
        ({"LIVEKIT_JWT_PORT": "8080"}, "LIVEKIT_JWT_PORT: no option replaces it"),
    ],
)
def test_migrate_report_names_what_differs_and_what_to_delete(
    variables: dict[str, str], line: str
) -> None:
    text = report({**ENVIRONMENT, **variables}, "the file")
    assert line in " ".join(text.split())


def test_migrate_env_file_with_quotes_exports_and_comments_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "jwt.env"
    file.write_text(
        "\ufeff# the service\n"
        "export LIVEKIT_URL=wss://sfu.example.com # public\n"
        "LIVEKIT_KEY='APIkey'\r\n"
        f'LIVEKIT_SECRET="{SECRET}"\n'
        "no variable at all\n"
    )
    assert main(["migrate", "--env", str(file), "--secret-path", "/data/secret"]) == 0
    out = capsys.readouterr().out
    assert block(out) == {
        "livekit_url": "wss://sfu.example.com",
        "livekit_key": "APIkey",
        "livekit_secret_path": "/data/secret",
    }
    assert SECRET not in out


def test_migrate_compose_file_is_read_with_its_env_files_and_references(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KEY", raising=False)
    (tmp_path / ".env").write_text("DOMAIN=example.com\n")
    (tmp_path / "jwt.env").write_text(f"LIVEKIT_SECRET={SECRET}\nLIVEKIT_KEY=overridden\n")
    file = tmp_path / "compose.yaml"
    file.write_text(COMPOSE)
    assert main(["migrate", "--compose", str(file)]) == 0
    out = capsys.readouterr().out
    assert block(out) == {
        "livekit_url": "wss://example.com/sfu",
        "livekit_key": "APIdefault",
        "livekit_secret_path": "/etc/matrix-synapse/livekit_secret",
        "can_update_own_metadata": True,
    }
    assert SECRET not in out


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("LIVEKIT_KEY=APIkey", "lacks LIVEKIT_URL, LIVEKIT_SECRET or LIVEKIT_SECRET_FROM_FILE"),
        ("", "lacks LIVEKIT_URL, LIVEKIT_KEY or LIVEKIT_KEY_FROM_FILE, LIVEKIT_SECRET or"),
    ],
)
def test_migrate_incomplete_environment_is_reported_with_the_names(
    content: str, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "jwt.env"
    file.write_text(content)
    assert main(["migrate", "--env", str(file)]) == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (f"services: {{a: [{SECRET}", "this is not valid YAML"),
        ("- a list", "has no `services`, so it is not a Compose file"),
        ("services: {a: {image: nginx}}", "no service has an image named lk-jwt-service"),
        (
            "services: {a: {image: lk-jwt-service}, b: {image: lk-jwt-service}}",
            "2 services run lk-jwt-service. Name the service with --service",
        ),
    ],
)
def test_migrate_unusable_compose_file_is_reported_without_its_content(
    content: str, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "compose.yaml"
    file.write_text(content)
    assert main(["migrate", "--compose", str(file)]) == 2
    printed = capsys.readouterr().err
    assert error in printed
    assert SECRET not in printed


def test_migrate_missing_file_is_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", "--env", "/does/not/exist"]) == 2
    assert capsys.readouterr().err == ("Cannot read /does/not/exist: No such file or directory.\n")
