# SPDX-License-Identifier: Apache-2.0
"""The files in contrib/docker agree with each other and with the module."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from synapse_lk_jwt.config import DEFAULT_PATH_PREFIX, parse_config

DOCKER = Path(__file__).resolve().parents[2] / "contrib/docker"


def read(name: str) -> Any:
    return yaml.safe_load((DOCKER / name).read_text())


def test_compose_block_for_the_module_is_a_valid_configuration(tmp_path: Path) -> None:
    (module,) = read("homeserver.yaml")["modules"]
    config = module["config"]
    keys = tmp_path / "livekit-keys.yaml"
    keys.write_text(f"APIxxxx: {'s' * 32}\n")
    assert config["livekit_key_file"] == "/run/livekit-keys.yaml"
    parsed = parse_config({**config, "livekit_key_file": str(keys)}, {})
    assert parsed.livekit_key == read("livekit.yaml")["webhook"]["api_key"]
    assert parsed.livekit_internal_url == f"http://livekit:{read('livekit.yaml')['port']}"


def test_compose_webhook_reaches_the_synapse_container() -> None:
    (url,) = read("livekit.yaml")["webhook"]["urls"]
    assert url == f"http://synapse:8008{DEFAULT_PATH_PREFIX}/sfu_webhook"


@pytest.mark.parametrize("service", ["synapse", "livekit"])
def test_compose_services_share_the_key_file(service: str) -> None:
    volumes = read("compose.yaml")["services"][service]["volumes"]
    assert "./livekit-keys.yaml:/run/livekit-keys.yaml:ro" in volumes


def test_compose_publishes_the_media_ports_of_livekit() -> None:
    rtc = read("livekit.yaml")["rtc"]
    assert read("compose.yaml")["services"]["livekit"]["ports"] == [
        f"{rtc['tcp_port']}:{rtc['tcp_port']}/tcp",
        f"{rtc['udp_port']}:{rtc['udp_port']}/udp",
    ]


def test_compose_and_dockerfile_name_the_same_synapse() -> None:
    build = read("compose.yaml")["services"]["synapse"]["build"]
    dockerfile = (DOCKER / "Dockerfile").read_text()
    assert f"ARG SYNAPSE_VERSION={build['args']['SYNAPSE_VERSION']}\n" in dockerfile
    assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == DOCKER / "Dockerfile"


def test_caddyfile_forwards_no_api_of_livekit() -> None:
    caddyfile = (DOCKER / "Caddyfile").read_text()
    assert re.findall(r"reverse_proxy (\S+) livekit:7880", caddyfile) == ["/rtc*"]
