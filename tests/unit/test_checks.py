# SPDX-License-Identifier: Apache-2.0
"""Parts of the checks that need no server."""

import asyncio
from typing import Any

import pytest

from synapse_lk_jwt.check import settings
from synapse_lk_jwt.check.command import _connect_to
from synapse_lk_jwt.check.probe import Answer, HttpProbe, NoAnswer
from synapse_lk_jwt.check.public import Public
from synapse_lk_jwt.check.running import Running
from synapse_lk_jwt.check.setup import MAIN, Listener, Setup
from synapse_lk_jwt.check.sfu import Sfu
from synapse_lk_jwt.compat.rate_limits import RatelimitSettings
from synapse_lk_jwt.config import parse_config

SECRET = "not-a-secret-at-all-but-long-enough"
REPLICATION = Listener("http://10.0.0.1:9093", ("replication",))
CLIENT = Listener("http://10.0.0.1:8008", ("client", "federation"))
SOCKET = Listener("http://%2Frun%2Fs.sock", ("client",))


def make_setup(module: dict[str, Any] | None = None, **more: Any) -> Setup:
    config = {"livekit_url": "wss://sfu.example.com", "livekit_key": "APIkey", **(module or {})}
    rate = RatelimitSettings("rc", 1, 100)
    values: dict[str, Any] = {
        "module": parse_config({**config, "livekit_secret": SECRET}, {}),
        "files": ("homeserver.yaml",),
        "file_of": {},
        "server_name": "example.com",
        "public_baseurl": "https://matrix.example.com",
        "has_public_baseurl": True,
        "has_delayed_events": True,
        "rc_message": rate,
        "rc_delayed_event_mgmt": rate,
        "transports": [],
        "foci": None,
        "instance": MAIN,
        "background": MAIN,
        "listeners": (CLIENT,),
        "workers": {},
        "whitelist": None,
        "claims": {},
        "times_loaded": 1,
        **more,
    }
    return Setup(**values)


@pytest.mark.parametrize(
    ("listeners", "proxied", "told"),
    [
        ((REPLICATION, CLIENT), "http://10.0.0.1:8008", "http://10.0.0.1:8008"),
        ((SOCKET,), "http://unix:/run/s.sock", "http://127.0.0.1:8008"),
        ((), "http://127.0.0.1:8008", "http://127.0.0.1:8008"),
    ],
)
def test_the_address_that_is_written_into_other_configurations(
    listeners: tuple[Listener, ...], proxied: str, told: str
) -> None:
    running = Running(HttpProbe({}), make_setup(listeners=listeners), lambda: 0)
    assert running.proxied_url == proxied
    assert running.webhook_url == f"{told}/_synapse/client/livekit/jwt/sfu_webhook"


class NoUpgrade:
    """A proxy that takes no WebSockets."""

    async def request(self, *_args: Any) -> Answer:
        return Answer(404, [], b"")


@pytest.mark.parametrize(
    ("internal", "passed_on"),
    [
        (None, "http://127.0.0.1:7880"),
        ("http://10.0.0.2:7880", "http://10.0.0.2:7880"),
    ],
)
def test_no_proxy_is_told_to_ask_itself(internal: str | None, passed_on: str) -> None:
    setup = make_setup({"livekit_internal_url": internal} if internal else {})
    probe = NoUpgrade()
    sfu = Sfu(probe, setup.module, lambda: 0)
    public = Public(probe, setup, Running(probe, setup, lambda: 0), sfu)
    finding = asyncio.run(public.visit("room"))
    assert f"    proxy_pass {passed_on};" in finding.lines


def test_a_whitelist_keeps_what_it_has() -> None:
    setup = make_setup(
        {"full_access_homeservers": ["a.org", "b.org"]}, whitelist=frozenset({"a.org", "c.org"})
    )
    (finding,) = (f for f in settings.check(setup) if f.check == "federation")
    assert "b.org's users" in finding.text
    assert "a.org" not in finding.text
    assert finding.lines[1:] == ("  - a.org", "  - c.org", "  - b.org")


def test_workers_need_no_federation_listener() -> None:
    for instance, verdicts in ((MAIN, ["wrong"]), ("background", ["ok"])):
        setup = make_setup({"full_access_homeservers": ["a.org"]}, listeners=(), instance=instance)
        found = [f.verdict.value for f in settings.check(setup) if f.check == "federation"]
        assert found == verdicts


@pytest.mark.parametrize(
    "url",
    ["https://h:abc/", "http://[::1/x", "http://a..b/", "http://h:99999/", "http://h/\u00fc"],
)
def test_what_is_no_address_is_told(url: str) -> None:
    with pytest.raises(NoAnswer):
        asyncio.run(HttpProbe({}).request("GET", url))


def test_an_address_to_connect_to() -> None:
    assert _connect_to("example.com:443:10.0.0.1:8443") == (
        ("example.com", 443),
        ("10.0.0.1", 8443),
    )
    assert _connect_to("example.com:443:[::1]:8443") == (("example.com", 443), ("::1", 8443))
