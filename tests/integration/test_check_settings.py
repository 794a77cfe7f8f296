# SPDX-License-Identifier: Apache-2.0
"""Checks of Synapse's configuration, on the files of a homeserver that runs."""

from pathlib import Path
from typing import Any

import pytest

from testbed.check import Report
from testbed.process import wait_until
from testbed.public import Public
from testbed.service import PREFIX
from testbed.synapse import Synapse

FOCI = "org.matrix.msc4143.rtc_foci"
OLD = "https://old.example.com/livekit/jwt"
OTHER = {"type": "livekit", "livekit_service_url": OLD}


def mended(
    public: Public,
    check: str,
    config: dict[str, Any] | None = None,
    module: dict[str, Any] | None = None,
) -> Report:
    """Find a fault, paste the lines of all that is said of it, and see that it is gone.

    Returns:
        What was reported before.
    """
    config, module = dict(config or {}), dict(module or {})
    before = public.check.run(config=config, module=module)
    bad = [f for verdict in ("wrong", "warning") for f in before.all(verdict, check)]
    assert bad, str(before)
    for finding in bad:
        assert str(finding.file).startswith("changed.json")
        (module if "of the module" in str(finding.file) else config).update(finding.pasted)
    after = public.check.run(config=config, module=module)
    assert not after.all("wrong", check), str(after)
    assert not after.all("warning", check), str(after)
    assert after.all("ok", check), str(after)
    return before


def test_no_delayed_events(public: Public) -> None:
    report = mended(public, "delayed events", {"max_event_delay_duration": None})
    assert "stays in the call as a ghost" in report.the("wrong", "delayed events").text
    assert report.status == 1


def test_rate_limits_as_synapse_has_them(public: Public) -> None:
    report = mended(public, "rate limits", {"rc_message": None, "rc_delayed_event_mgmt": None})
    message, delayed = report.all("warning", "rate limits")
    assert message.text.startswith("rc_message lets a client do 0.2 a second and 10 at once")
    assert delayed.text.startswith("rc_delayed_event_mgmt lets a client do 1 a second and 5 at")
    assert report.status == 0


def test_nothing_is_advertised(public: Public) -> None:
    report = mended(public, "rtc/transports", module={"advertise": False})
    assert "is empty: advertise is off" in report.the("wrong", "rtc/transports").text
    assert report.status == 1


@pytest.mark.parametrize(
    ("transports", "text"),
    [
        ([OTHER], f"names {OLD}, which was set by hand"),
        (
            [{"type": "livekit", "url": "wss://old.example.com"}],
            "names wss://old.example.com, which",
        ),
        (
            [{"type": "m.livekit", "url": "wss://old.example.com"}],
            "names wss://old.example.com, wh",
        ),
        ([{"type": "m.livekit"}], "names no service, which was set by hand"),
    ],
)
def test_another_service_is_advertised(transports: list[Any], text: str, public: Public) -> None:
    report = mended(public, "rtc/transports", {"matrix_rtc": {"transports": transports}})
    assert text in report.the("wrong", "rtc/transports").text
    assert report.status == 1


def test_check_of_entry_by_hand_that_mixes_both_kinds_warns(public: Public) -> None:
    url = public.nginx.url("livekit").replace("https:", "wss:")
    entry = {"type": "livekit", "livekit_service_url": public.service_url, "url": url}
    report = mended(public, "rtc/transports", {"matrix_rtc": {"transports": [entry]}})
    text = report.the("warning", "rtc/transports").text
    assert "with url beside livekit_service_url" in text
    assert report.status == 0


@pytest.mark.parametrize("advertise", ["both", "msc4195"])
def test_check_of_advertise_that_hand_set_entries_override_warns(
    advertise: str, public: Public
) -> None:
    entry = {"type": "livekit", "livekit_service_url": public.service_url}
    config = {"matrix_rtc": {"transports": [entry]}}
    report = public.check.run(config=config, module={"advertise": advertise})
    finding = report.the("warning", "rtc/transports")
    assert f"so that advertise: {advertise} has no effect" in finding.text
    assert finding.pasted == {"matrix_rtc": {"transports": []}}


@pytest.mark.parametrize("advertise", ["both", "msc4195"])
def test_check_before_restart_with_another_advertise_asks_for_a_restart(
    advertise: str, public: Public
) -> None:
    report = public.check.run(module={"advertise": advertise})
    assert report.bad == {"rtc/transports": "warning"}, str(report)
    text = report.the("warning", "rtc/transports").text
    assert text == f"names {public.service_url}, as the running Synapse has it: restart it"


@pytest.mark.parametrize("foci", [[OTHER], [{**OTHER, "livekit_service_url": 7}]])
def test_well_known_content_that_is_old(foci: Any, public: Public) -> None:
    config = {"extra_well_known_client_content": {FOCI: foci}}
    report = public.check.run(config=config)
    finding = report.the("wrong", ".well-known")
    assert "which was set by hand, and not this module" in finding.text
    assert public.check.run(config=finding.pasted).bad == {}


@pytest.mark.parametrize("foci", ["text", 7, {"a": 1}, [1, "text", None], []])
def test_well_known_content_of_wrong_types(foci: Any, public: Public) -> None:
    # What the running Synapse serves is right.
    for module in ({}, {"advertise": False}):
        config = {"extra_well_known_client_content": {FOCI: foci}}
        report = public.check.run(config=config, module=module)
        # The module adds itself to a list.
        is_told = not isinstance(foci, list) or bool(module)
        assert (".well-known" in report.bad) == is_told, str(report)


@pytest.mark.parametrize(
    ("module", "verdict"), [({}, "wrong"), ({"service_url": "{service_url}"}, "warning")]
)
def test_no_public_baseurl(module: dict[str, str], verdict: str, public: Public) -> None:
    module = {key: value.format(service_url=public.service_url) for key, value in module.items()}
    report = public.check.run(config={"public_baseurl": None}, module=module)
    finding = report.the(verdict, "public_baseurl")
    assert list(finding.pasted) == ["public_baseurl"]
    assert "serves no .well-known" in finding.text
    assert report.bad["public_baseurl"] == verdict


# Who may start calls


@pytest.mark.parametrize("entry", ["example.org:", "example.org:99999"])
def test_entries_that_match_nobody(entry: str, public: Public) -> None:
    servers = ["example.org", entry, "*.example.com", "example.??", "[::1]:8448"]
    report = public.check.run(module={"full_access_homeservers": servers})
    finding = report.the("warning", "full access")
    assert finding.text.startswith(f"no server can be called {entry!r}:")
    assert list(finding.pasted) == ["full_access_homeservers"]
    assert report.bad == {"full access": "warning"}
    assert report.status == 0


def test_ones_own_server_on_the_list(public: Public) -> None:
    own = public.synapse.server_name.upper()
    report = mended(public, "full access", module={"full_access_homeservers": [own, "a.example"]})
    finding = report.the("warning", "full access")
    assert finding.text.startswith(f"{own!r} is this homeserver")
    assert finding.pasted == {"full_access_homeservers": ["a.example"]}


@pytest.mark.parametrize("servers", ["*", ["*"], ["**", "example.org"], None])
def test_everybody_may_start_calls(servers: Any, public: Public) -> None:
    report = public.check.run(module={"full_access_homeservers": servers})
    assert "users of every homeserver can start calls" in report.the("warning", "module").text
    assert "every homeserver may start calls" in report.the("ok", "full access").text
    assert report.bad == {"module": "warning"}


# Federation


@pytest.mark.parametrize("whitelist", [[], ["elsewhere.example"]])
def test_federation_that_is_restricted(whitelist: list[str], public: Public) -> None:
    config = {"federation_domain_whitelist": whitelist}
    module = {"full_access_homeservers": ["example.org"]}
    report = mended(public, "federation", config, module)
    finding = report.the("wrong", "federation")
    assert "is restricted by federation_domain_whitelist: example.org's users" in finding.text
    config = {"federation_domain_whitelist": []}
    report = public.check.run(config=config, module={"full_access_homeservers": ["*"]})
    assert report.the("warning", "federation")
    # Whom nobody has listed nobody misses.
    assert public.check.run(config=config).bad == {}


@pytest.mark.parametrize("names", [["client"], ["client", "openid"]])
def test_no_listener_for_other_homeservers(names: list[str], public: Public) -> None:
    port = int(public.synapse.client_url.rpartition(":")[2])
    listener = {"port": port, "type": "http", "resources": [{"names": names}]}
    config = {"listeners": [listener]}
    module = {"full_access_homeservers": ["example.org"]}
    report = public.check.run(config=config, module=module)
    finding = report.the("wrong", "federation")
    assert "no listener has federation" in finding.text
    assert ("and openid" in finding.text) == ("openid" not in names)
    assert report.bad == {"federation": "wrong"}, str(report)
    (added,) = finding.pasted["listeners"]
    config = {"listeners": [listener, added]}
    assert public.check.run(config=config, module=module).bad == {}


# Listeners of all kinds


@pytest.mark.parametrize(
    "changes",
    [
        {"bind_addresses": ["::"]},
        {"bind_addresses": ["0.0.0.0"]},
        {"bind_addresses": ["127.0.0.1", "::1"]},
        {"bind_address": "127.0.0.1", "bind_addresses": []},
        {"bind_addresses": None, "x_forwarded": True},
        {"resources": [{"names": ["client"]}, {"names": ["federation"]}]},
    ],
)
def test_addresses_of_listeners(changes: dict[str, Any], public: Public) -> None:
    port = int(public.synapse.client_url.rpartition(":")[2])
    listener = {
        "port": port,
        "type": "http",
        "bind_addresses": ["127.0.0.1"],
        "resources": [{"names": ["client", "federation"]}],
        **changes,
    }
    listener = {key: value for key, value in listener.items() if value is not None}
    metrics = {"port": 1, "type": "metrics"}
    manhole = {"port": 2, "type": "manhole", "bind_addresses": ["127.0.0.1"]}
    report = public.check.run(config={"listeners": [metrics, manhole, listener]})
    assert report.bad == {}, str(report)


@pytest.mark.parametrize("listeners", [[], [{"port": 1, "type": "metrics"}]])
def test_no_listener_at_all(listeners: list[Any], public: Public) -> None:
    report = public.check.run(config={"listeners": listeners})
    assert "has no listener" in report.the("warning", "processes").text


# In a Synapse that starts


def test_a_neglected_homeserver_says_so_at_its_start(tmp_path: Path) -> None:
    config = {
        "livekit_url": "wss://127.0.0.1:1",
        "livekit_key": "APIkey",
        "livekit_secret": "s" * 32,
        "full_access_homeservers": ["example.org", "example.org:99999"],
        "advertise": False,
    }
    extra: dict[str, Any] = {"federation_domain_whitelist": []}
    extra |= {
        "rc_message": {"per_second": 0.2, "burst_count": 10},
        "max_event_delay_duration": None,
    }
    extra |= {"extra_well_known_client_content": {FOCI: [OTHER]}, "public_baseurl": None}
    synapse = Synapse("n", tmp_path, config, extra)
    synapse.start()
    try:
        synapse.wait_ready()
        told = (
            "delayed events: are off",
            "rate limits: rc_message lets",
            "public_baseurl: is not set",
            "rtc/transports: is empty",
            ".well-known: org.matrix.msc4143.rtc_foci names",
            "full access: no server can be called 'example.org:99999'",
            "federation: is restricted",
            "LiveKit at https://127.0.0.1:1 cannot be used",
        )
        wait_until(lambda: all(text in synapse.log_text() for text in told), "all lines")
    finally:
        synapse.stop()
    command = f"-m synapse_lk_jwt check -c {synapse.directory / 'homeserver.json'}'"
    lines = [line for line in synapse.log_text().splitlines() if command in line]
    assert len(lines) == len(told), lines
    for text in told:
        (line,) = (line for line in lines if text in line)
        assert line.endswith(command), line
    assert "Traceback" not in synapse.log_text()


def test_nothing_is_said_at_a_clean_start(public: Public) -> None:
    log_of = public.synapse.log_text
    wait_until(lambda: "/rtc/validate: 404" in log_of(), "look at LiveKit")
    log = [line for line in public.synapse.log_text().splitlines() if " - synapse_lk_jwt" in line]
    assert [line for line in log if " - INFO - " not in line] == []
    assert f"Serving LiveKit access tokens at {public.nginx.url('matrix')}{PREFIX}" in log[0]
