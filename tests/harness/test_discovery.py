# SPDX-License-Identifier: Apache-2.0
"""What clients discover, for each value of `advertise`."""

import logging
from typing import Any, ClassVar
from unittest.mock import patch

import synapse.rest as client_servlets
from parameterized import parameterized, parameterized_class
from synapse.api.errors import Codes
from synapse.rest import ClientRestResource
from synapse.rest.client import versions
from tests.server import FakeChannel
from tests.unittest import override_config

import synapse_lk_jwt.compat.discovery as discovery_module
from tests.harness.base import URL, ModuleTestCase, P

UNSTABLE = "/_matrix/client/unstable/org.matrix.msc4143/rtc/transports"
STABLE = "/_matrix/client/v1/rtc/transports"
FOCI = "org.matrix.msc4143.rtc_foci"

SERVICE = {"type": "livekit", "livekit_service_url": f"https://matrix.test{P}"}
MSC4195 = {"type": "m.livekit", "url": URL}


class DiscoveryTestCase(ModuleTestCase):
    servlets = (*ModuleTestCase.servlets, versions.register_servlets)

    def ask(self, path: str) -> FakeChannel:
        return self.make_request("GET", path, access_token=self.alices_token)

    def foci(self) -> Any:
        return self.hs.config.server.extra_well_known_client_content.get(FOCI)

    def features(self) -> Any:
        channel = self.make_request("GET", "/_matrix/client/versions")
        assert channel.code == 200
        return channel.json_body["unstable_features"]


@parameterized_class(
    ("advertise", "transports", "foci_added"),
    [
        (None, [SERVICE], [SERVICE]),
        ("service", [SERVICE], [SERVICE]),
        (True, [SERVICE], [SERVICE]),
        ("both", [MSC4195, SERVICE], [SERVICE]),
        ("msc4195", [MSC4195], None),
    ],
)
class AdvertiseTests(DiscoveryTestCase):
    advertise: Any
    transports: list[Any]
    foci_added: Any

    def default_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().default_config()
        if self.advertise is not None:
            config["modules"][0]["config"]["advertise"] = self.advertise
        return config

    def test_rtc_transports_at_unstable_path_has_the_entries(self) -> None:
        channel = self.ask(UNSTABLE)
        assert (channel.code, channel.json_body) == (200, {"rtc_transports": self.transports})

    def test_rtc_transports_at_stable_path_has_the_entries_by_both_names(self) -> None:
        channel = self.ask(STABLE)
        assert channel.code == 200
        assert channel.json_body == {
            "rtc_transports": self.transports,
            "transports": self.transports,
        }

    @parameterized.expand([UNSTABLE, STABLE])
    def test_rtc_transports_without_access_token_is_rejected_with_401(self, path: str) -> None:
        channel = self.make_request("GET", path)
        self.assert_error(channel, 401, Codes.MISSING_TOKEN)
        assert channel.headers.getRawHeaders("Access-Control-Allow-Origin") == ["*"]

    def test_well_known_with_each_advertise_names_services_only(self) -> None:
        assert self.foci() == self.foci_added

    def test_versions_with_each_advertise_names_msc4143_and_all_of_synapses_features(self) -> None:
        features = self.features()
        assert features["org.matrix.msc4143"] is True
        assert features["org.matrix.label_based_filtering"] is True
        channel = self.make_request(
            "GET", "/_matrix/client/versions", access_token=self.alices_token
        )
        assert channel.json_body["unstable_features"]["org.matrix.msc4143"] is True
        assert "v1.11" in channel.json_body["versions"]


class OffTests(DiscoveryTestCase):
    module_config: ClassVar[dict[str, Any]] = {"advertise": "off"}

    def test_module_with_advertise_off_adds_nothing(self) -> None:
        assert self.ask(UNSTABLE).code == 404
        assert self.ask(STABLE).code == 404
        assert self.foci() is None
        assert not self.features().get("org.matrix.msc4143")

    def test_two_homeservers_in_one_process_announce_their_own_entries(self) -> None:
        config = super().default_config()
        config["server_name"] = "second"
        config["modules"][0]["config"]["advertise"] = "both"
        second = self.setup_test_homeserver(server_name="second", config=config)
        resource: Any = ClientRestResource
        for hs, is_there in ((self.hs, False), (second, True)):
            paths = [pattern.pattern for pattern in resource(hs)._routes]
            assert any("rtc/transports" in path for path in paths) == is_there


OWN = {"type": "livekit", "livekit_service_url": "https://own.example.com"}


@parameterized_class(
    ("advertise", "own"),
    [
        (advertise, own)
        for advertise in ("service", "both", "msc4195")
        for own in (
            [OWN],
            [
                {
                    "type": "livekit",
                    "livekit_service_url": "https://own.example.com",
                    "url": "wss://x",
                }
            ],
            [{"type": "m.livekit", "url": "wss://own.example.com"}],
            [{"type": "m.livekit", "url": "wss://own.example.com"}, OWN],
        )
    ],
)
class AdminsOwnTests(DiscoveryTestCase):
    advertise: str
    own: list[Any]

    def default_config(self) -> dict[str, Any]:
        config = {
            **super().default_config(),
            "experimental_features": {"msc4143_enabled": True},
            "matrix_rtc": {"transports": self.own},
            "extra_well_known_client_content": {FOCI: self.own, "org.example": 1},
        }
        config["modules"][0]["config"]["advertise"] = self.advertise
        return config

    def test_entries_of_the_admin_stay_unchanged(self) -> None:
        for path in (UNSTABLE, STABLE):
            assert self.ask(path).json_body["rtc_transports"] == self.own
        assert self.foci() == self.own


class OtherTransportTests(DiscoveryTestCase):
    other: ClassVar[dict[str, str]] = {
        "type": "org.example.mesh",
        "url": "https://mesh.example.com",
    }

    @override_config({"matrix_rtc": {"transports": [other]}})
    def test_entries_with_one_of_another_type_are_added_behind_it(self) -> None:
        assert self.ask(STABLE).json_body["transports"] == [self.other, SERVICE]


class NotServedTests(DiscoveryTestCase):
    """Without MSC4195's endpoints nothing may name `url`, and the list must not be empty."""

    @parameterized.expand(["both", "msc4195"])
    def test_module_without_msc4195_endpoints_announces_the_service(self, advertise: str) -> None:
        config = {**super().default_config(), "server_name": "second"}
        config["modules"][0]["config"]["advertise"] = advertise
        with (
            patch("synapse_lk_jwt.module._serve_homeserver_endpoints", return_value="no reason"),
            self.assertLogs("synapse_lk_jwt", logging.ERROR) as logs,
        ):
            second = self.setup_test_homeserver(server_name="second", config=config)
        assert second.config.matrix_rtc.transports == [SERVICE]
        assert second.config.server.extra_well_known_client_content[FOCI] == [SERVICE]
        (line,) = (line for line in logs.output if "advertise" in line)
        assert f"advertise: {advertise} has no effect" in line

    def test_synapse_without_registry_announces_at_its_own_path(self) -> None:
        config = {**super().default_config(), "server_name": "second"}
        registry = client_servlets.SERVLET_GROUPS
        with self.assertLogs("synapse_lk_jwt", logging.ERROR) as logs:
            del client_servlets.SERVLET_GROUPS
            try:
                second = self.setup_test_homeserver(server_name="second", config=config)
            finally:
                client_servlets.SERVLET_GROUPS = registry
        assert second.config.matrix_rtc.transports == [SERVICE]
        assert any("stable path of rtc/transports" in line for line in logs.output)


class SynapseThatServesTheStablePathTests(DiscoveryTestCase):
    def test_rtc_transports_with_synapses_own_servlet_is_answered_by_it(self) -> None:
        groups = list(client_servlets.SERVLET_GROUPS)
        assert groups.index("client") < groups.index("_synapse_lk_jwt_discovery")


class VersionsOfAnOldSynapseTests(DiscoveryTestCase):
    """Synapse before 1.156 does not name MSC4143."""

    def prepare(self, reactor: Any, clock: Any, hs: Any) -> None:
        super().prepare(reactor, clock, hs)
        self.hs.config.experimental.msc4143_enabled = False

    def create_resource_dict(self) -> Any:
        with patch.object(discovery_module, "synapse_version", return_value=(1, 155)):
            return super().create_resource_dict()

    def test_versions_keeps_synapses_features_and_names_msc4143(self) -> None:
        features = self.features()
        assert features["org.matrix.msc4143"] is True
        assert features["org.matrix.label_based_filtering"] is True
