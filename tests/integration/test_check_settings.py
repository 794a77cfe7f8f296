# SPDX-License-Identifier: Apache-2.0
"""Checks of Synapse's configuration, on the files of a running homeserver."""

from pathlib import Path
from typing import Any

import pytest

from testbed.check import Report
from testbed.process import wait_until
from testbed.public import Public, stage
from testbed.service import PREFIX
from testbed.sets import running
from testbed.synapse import Synapse

FOCI = "org.matrix.msc4143.rtc_foci"
OLD = "https://old.example.com/livekit/jwt"
OTHER = {"type": "livekit", "livekit_service_url": OLD}


def check_and_fix(
    public: Public,
    check: str,
    config: dict[str, Any] | None = None,
    module: dict[str, Any] | None = None,
) -> Report:
    """Find a problem, write the printed lines into the files, and find none any more.

    Returns:
        The first report.
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


def test_delayed_events_off_is_wrong(public: Public) -> None:
    report = check_and_fix(public, "delayed events", {"max_event_delay_duration": None})
    assert "stays listed in the call" in report.the("wrong", "delayed events").text
    assert report.status == 1


def test_default_rate_limits_are_a_warning(public: Public) -> None:
    report = check_and_fix(
        public, "rate limits", {"rc_message": None, "rc_delayed_event_mgmt": None}
    )
    message, delayed = report.all("warning", "rate limits")
    assert message.text.startswith("rc_message of 0.2/s, burst 10, is too low")
    assert delayed.text.startswith("rc_delayed_event_mgmt of 1/s, burst 5, is too low")
    assert report.status == 0


def test_empty_transports_are_wrong(public: Public) -> None:
    report = check_and_fix(public, "rtc/transports", module={"advertise": False})
    assert "is empty: advertise is off" in report.the("wrong", "rtc/transports").text
    assert report.status == 1


@pytest.mark.parametrize(
    ("transports", "text"),
    [
        ([OTHER], f"names {OLD}, which matrix_rtc in homeserver.yaml sets"),
        (
            [{"type": "livekit", "url": "wss://old.example.com"}],
            "names wss://old.example.com, which",
        ),
        (
            [{"type": "m.livekit", "url": "wss://old.example.com"}],
            "names wss://old.example.com, wh",
        ),
        ([{"type": "m.livekit"}], "names no service, which matrix_rtc"),
    ],
)
def test_transports_of_another_service_are_wrong(
    transports: list[Any], text: str, public: Public
) -> None:
    report = check_and_fix(public, "rtc/transports", {"matrix_rtc": {"transports": transports}})
    assert text in report.the("wrong", "rtc/transports").text
    assert report.status == 1


def test_check_of_entry_by_hand_that_mixes_both_kinds_warns(public: Public) -> None:
    url = public.nginx.url("livekit").replace("https:", "wss:")
    entry = {"type": "livekit", "livekit_service_url": public.service_url, "url": url}
    report = check_and_fix(public, "rtc/transports", {"matrix_rtc": {"transports": [entry]}})
    text = report.the("warning", "rtc/transports").text
    assert "with both url and livekit_service_url" in text
    assert report.status == 0


@pytest.mark.parametrize("advertise", ["both", "msc4195"])
def test_check_of_advertise_that_hand_set_entries_override_warns(
    advertise: str, public: Public
) -> None:
    entry = {"type": "livekit", "livekit_service_url": public.service_url}
    config = {"matrix_rtc": {"transports": [entry]}}
    report = public.check.run(config=config, module={"advertise": advertise})
    finding = report.the("warning", "rtc/transports")
    assert f"so advertise: {advertise} has no effect" in finding.text
    assert finding.pasted == {"matrix_rtc": {"transports": []}}


@pytest.mark.parametrize("advertise", ["both", "msc4195"])
def test_check_before_restart_with_another_advertise_asks_for_a_restart(
    advertise: str, public: Public
) -> None:
    report = public.check.run(module={"advertise": advertise})
    assert report.bad == {}, str(report)
    finding = report.the("warning", "settings")
    assert f"advertise is 'service', in the files '{advertise}'" in finding.text
    assert finding.lines[0].startswith("systemctl restart matrix-synapse")


def test_running_settings_that_differ_from_the_files_are_named(
    public: Public, tmp_path: Path
) -> None:
    second = stage(tmp_path, "r", public.livekit)
    second.synapse.extra_config |= {"max_event_delay_duration": None}
    second.synapse.module_config = {
        **(second.synapse.module_config or {}),
        "full_access_homeservers": ["*"],
    }
    with running(second.synapse, second.nginx):
        config: dict[str, Any] = {"max_event_delay_duration": "24h"}
        module: dict[str, Any] = {"full_access_homeservers": []}
        report = second.check.run(config=config, module=module)
        # The files are right, but the running Synapse has no delayed events.
        assert report.the("ok", "delayed events")
        finding = report.the("wrong", "settings")
        assert "the main process runs with other settings than these files have" in finding.text
        assert "max_event_delay_duration is '0s', in the files '86400s'" in finding.text
        assert "full_access_homeservers is '*', in the files empty" in finding.text
        assert "These cause problems with delayed events" in finding.text
        assert report.status == 1
        second.synapse.extra_config |= config
        second.synapse.module_config = {**second.synapse.module_config, **module}
        second.synapse.restart()
        assert second.check.run().the("ok", "settings")


@pytest.mark.parametrize("foci", [[OTHER], [{**OTHER, "livekit_service_url": 7}]])
def test_well_known_content_of_another_service_is_wrong(foci: Any, public: Public) -> None:
    config = {"extra_well_known_client_content": {FOCI: foci}}
    report = public.check.run(config=config)
    finding = report.the("wrong", ".well-known")
    assert "in homeserver.yaml names" in finding.text
    assert ".well-known" in report.skipped
    config = {"extra_well_known_client_content": finding.pasted}
    assert public.check.run(config=config).bad == {}


@pytest.mark.parametrize("foci", [None, "text", 7, {"a": 1}, [1, "text", None], []])
def test_well_known_content_of_wrong_types_is_found(foci: Any, public: Public) -> None:
    # The running Synapse has the right content.
    for module in ({}, {"advertise": False}):
        config = {"extra_well_known_client_content": {FOCI: foci}}
        report = public.check.run(config=config, module=module)
        # The module adds itself to a list.
        is_found = not isinstance(foci, list) or bool(module)
        assert (".well-known" in report.bad) == is_found, str(report)


@pytest.mark.parametrize(
    ("module", "verdict"), [({}, "wrong"), ({"service_url": "{service_url}"}, "warning")]
)
def test_public_baseurl_unset_is_found_and_public_checks_are_skipped(
    module: dict[str, str], verdict: str, public: Public
) -> None:
    module = {key: value.format(service_url=public.service_url) for key, value in module.items()}
    report = public.check.run(config={"public_baseurl": None}, module=module)
    finding = report.the(verdict, "public_baseurl")
    assert list(finding.pasted) == ["public_baseurl"]
    assert "serves no .well-known" in finding.text
    # From the document that clients fetch.
    assert finding.pasted == {"public_baseurl": f"{public.nginx.url('matrix')}/"}
    assert report.bad == {"public_baseurl": verdict}, str(report)
    skipped = {"/versions", "/rtc/transports", "MSC4195"}
    if not module:
        skipped |= {"service", "preflight", ".well-known"}
    assert report.skipped == skipped


# Who may start calls


@pytest.mark.parametrize("entry", ["example.org:", "example.org:99999"])
def test_entry_that_cannot_be_a_server_name_is_a_warning(entry: str, public: Public) -> None:
    servers = ["example.org", entry, "*.example.com", "example.??", "[::1]:8448"]
    report = public.check.run(module={"full_access_homeservers": servers})
    finding = report.the("warning", "full access")
    assert finding.text.startswith(f"{entry!r} cannot be a server name")
    assert list(finding.pasted) == ["full_access_homeservers"]
    assert report.bad == {"full access": "warning"}
    assert report.status == 0


def test_full_access_list_with_the_own_server_is_ok(public: Public) -> None:
    own = public.synapse.server_name.upper()
    report = public.check.run(module={"full_access_homeservers": [own, "a.example"]})
    assert report.bad == {}, str(report)
    assert (
        report.the("ok", "full access").text == "your users and those of a.example may start calls"
    )


@pytest.mark.parametrize("servers", ["*", ["*"], ["**", "example.org"], None])
def test_full_access_for_every_homeserver_is_a_warning(servers: Any, public: Public) -> None:
    report = public.check.run(module={"full_access_homeservers": servers})
    assert "users of every homeserver can start calls" in report.the("warning", "module").text
    assert "every homeserver may start calls" in report.the("ok", "full access").text
    assert report.bad == {"module": "warning"}


# Federation


@pytest.mark.parametrize("whitelist", [[], ["elsewhere.example"]])
def test_federation_whitelist_without_a_listed_server_is_wrong(
    whitelist: list[str], public: Public
) -> None:
    config = {"federation_domain_whitelist": whitelist}
    module = {"full_access_homeservers": ["example.org"]}
    report = check_and_fix(public, "federation", config, module)
    finding = report.the("wrong", "federation")
    assert "federation_domain_whitelist excludes servers" in finding.text
    assert "example.org" in finding.text
    config = {"federation_domain_whitelist": []}
    report = public.check.run(config=config, module={"full_access_homeservers": ["*"]})
    assert report.the("warning", "federation")
    # Without a listed server there is nothing to verify.
    assert public.check.run(config=config).bad == {}


@pytest.mark.parametrize("names", [["client"], ["client", "openid"]])
def test_federation_without_a_listener_is_wrong(names: list[str], public: Public) -> None:
    port = int(public.synapse.client_url.rpartition(":")[2])
    listener = {"port": port, "type": "http", "resources": [{"names": names}]}
    config = {"listeners": [listener]}
    module = {"full_access_homeservers": ["example.org"]}
    report = public.check.run(config=config, module=module)
    finding = report.the("wrong", "federation")
    assert "no listener has federation" in finding.text
    assert ("and openid" in finding.text) == ("openid" not in names)
    assert report.bad == {"federation": "wrong", "x_forwarded": "warning"}, str(report)
    (added,) = finding.pasted["listeners"]
    config = {"listeners": [listener, added]}
    assert public.check.run(config=config, module=module).bad == {"x_forwarded": "warning"}


# Listeners of all kinds


@pytest.mark.parametrize(
    "changes",
    [
        {"bind_addresses": ["::"]},
        {"bind_addresses": ["0.0.0.0"]},
        {"bind_addresses": ["127.0.0.1", "::1"]},
        {"bind_address": "127.0.0.1", "bind_addresses": []},
        {"bind_addresses": None},
        {"resources": [{"names": ["client"]}, {"names": ["federation"]}]},
    ],
)
def test_listener_of_each_kind_is_queried(changes: dict[str, Any], public: Public) -> None:
    port = int(public.synapse.client_url.rpartition(":")[2])
    listener = {
        "port": port,
        "type": "http",
        "bind_addresses": ["127.0.0.1"],
        "x_forwarded": True,
        "resources": [{"names": ["client", "federation"]}],
        **changes,
    }
    listener = {key: value for key, value in listener.items() if value is not None}
    metrics = {"port": 1, "type": "metrics"}
    manhole = {"port": 2, "type": "manhole", "bind_addresses": ["127.0.0.1"]}
    report = public.check.run(config={"listeners": [metrics, manhole, listener]})
    assert report.bad == {}, str(report)


@pytest.mark.parametrize("listeners", [[], [{"port": 1, "type": "metrics"}]])
def test_configuration_without_a_listener_is_a_warning(
    listeners: list[Any], public: Public
) -> None:
    report = public.check.run(config={"listeners": listeners})
    assert "has no listener" in report.the("warning", "processes").text


# In a Synapse that starts


def test_start_with_several_problems_logs_each_once(tmp_path: Path) -> None:
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
        texts = (
            "delayed events: are off",
            "rate limits: rc_message of",
            "public_baseurl: is not set",
            "rtc/transports: is empty",
            ".well-known: org.matrix.msc4143.rtc_foci in homeserver.yaml names",
            "full access: 'example.org:99999' cannot be a server name",
            "federation: federation_domain_whitelist excludes",
            "LiveKit at https://127.0.0.1:1 cannot be used",
        )
        wait_until(lambda: all(text in synapse.log_text() for text in texts), "all lines")
    finally:
        synapse.stop()
    command = f"-m synapse_lk_jwt check -c {synapse.directory / 'homeserver.json'}'"
    lines = [line for line in synapse.log_text().splitlines() if command in line]
    assert len(lines) == len(texts), lines
    for text in texts:
        (line,) = (line for line in lines if text in line)
        assert line.endswith(command), line
    assert "Traceback" not in synapse.log_text()


def test_start_without_problems_logs_none(public: Public) -> None:
    log_of = public.synapse.log_text
    wait_until(lambda: "/rtc/validate: 404" in log_of(), "check of LiveKit")
    # The rest of the log is about other tests, which share this homeserver.
    start, _, _ = log_of().partition("/rtc/validate: 404")
    log = [line for line in start.splitlines() if " - synapse_lk_jwt" in line]
    assert [line for line in log if " - INFO - " not in line] == []
    assert f"Serving LiveKit access tokens at {public.nginx.url('matrix')}{PREFIX}" in log[0]
