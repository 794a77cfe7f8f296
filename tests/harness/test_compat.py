# SPDX-License-Identifier: Apache-2.0
"""A Synapse without some of the internals that the module uses."""

import ast
import inspect
import logging
from importlib import import_module
from typing import Any
from unittest.mock import patch

from parameterized import parameterized
from synapse.api.errors import Codes
from synapse.rest import ClientRestResource
from synapse.rest.client import login, room

from synapse_lk_jwt import LiveKitJwtModule
from synapse_lk_jwt.api.client_server import GetTokenRestServlet
from synapse_lk_jwt.api.federation import GetTokenFederationServlet
from synapse_lk_jwt.compat import homeserver, self_test
from synapse_lk_jwt.compat.self_test import HOOKS, Feature, missing_hooks
from tests.harness.base import ModuleTestCase, P

ALL_HOOKS = [(feature, hook) for feature, hooks in HOOKS.items() for hook in hooks]
NOT_TOKENS = [(feature,) for feature in Feature if feature is not Feature.TOKENS]


class Without:
    """An object that lacks some attributes, each given as a path of names."""

    def __init__(self, target: Any, *paths: list[str]) -> None:
        vars(self).update(_target=target, _paths=[path for path in paths if path])

    def __getattr__(self, name: str) -> Any:
        hidden = [path for path in self._paths if path[0].removesuffix("()") == name]
        if any(len(path) == 1 for path in hidden):
            raise AttributeError(name)
        found = getattr(self._target, name)
        if not hidden:
            return found
        rest = [path[1:] for path in hidden]
        if hidden[0][0].endswith("()"):
            return lambda: Without(found(), *rest)
        return Without(found, *rest)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._target, name, value)


def paths(*hooks: str) -> list[list[str]]:
    """The paths of hooks from a homeserver, without those of modules."""
    starts = {"hs": [], "config": ["config"], "store": ["get_datastores()", "main"]}
    parts = [part.partition(":") for hook in hooks for part in hook.split(" or ")]
    return [[*starts[root], *path.split(".")] for root, _, path in parts if root in starts]


def module_without(*hooks: str) -> Any:
    """What `import_module` returns, without the hooks that belong to modules."""

    def import_without(name: str) -> Any:
        parts = [hook.partition(":") for hook in hooks]
        return Without(import_module(name), *[p.split(".") for root, _, p in parts if root == name])

    return import_without


class MissingHooksTests(ModuleTestCase):
    def prepare(self, reactor: Any, clock: Any, hs: Any) -> None:
        client = hs.get_federation_http_client()
        agent = client.agent
        super().prepare(reactor, clock, hs)
        # The one of the harness has no inside.
        client.agent = agent

    def test_missing_hooks_with_this_synapse_is_empty(self) -> None:
        assert missing_hooks(self.hs) == {}

    def test_missing_in_installed_synapse_is_empty(self) -> None:
        assert self_test.missing_in_installed_synapse() == {}

    def test_missing_hooks_names_each_hook_and_its_feature(self) -> None:
        for feature, hook in ALL_HOOKS:
            with (
                self.subTest(hook=hook),
                patch.object(self_test, "import_module", module_without(hook)),
            ):
                found = missing_hooks(Without(self.hs, *paths(hook)))
                assert hook in found[feature]
                # Other hooks are attributes of these.
                if hook not in ("hs:config", "hs:get_datastores"):
                    assert found == {feature: [hook]}

    def test_missing_in_installed_synapse_names_methods_of_classes(self) -> None:
        class Store:
            pass

        with patch.object(self_test, "DataStore", Store):
            found = self_test.missing_in_installed_synapse()
        assert found[Feature.BLOCKED_ROOMS] == ["store:is_room_blocked"]
        # Only an object has these.
        assert "store:db_pool.runWithConnection" not in found[Feature.TOKENS]

    def test_homeserver_uses_no_hook_that_is_not_in_the_table(self) -> None:
        used = set()
        roots = {"self._store": "store", "self._hs": "hs", "hs": "hs", "api._hs": "hs"}
        roots.update({"self.config": "config", "self._hs.config": "config", "hs.config": "config"})
        for node in ast.walk(ast.parse(inspect.getsource(homeserver))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in roots:
                used.add(f"{roots[ast.unparse(node.value)]}:{node.attr}")
        listed = {
            f"{root}:{path.partition('.')[0].removesuffix('()')}"
            for _, hook in ALL_HOOKS
            for root, _, path in (part.partition(":") for part in hook.split(" or "))
            if root in ("hs", "store", "config")
        }
        # The module's own functions read `config.server` and `config.matrix_rtc` as well, and make
        # a federation client instead of using Synapse's. The module API has the other client.
        assert used <= listed
        assert listed - used <= {
            "config:server", "config:matrix_rtc", "config:experimental",
            "hs:get_federation_http_client", "hs:get_simple_http_client",
        }  # fmt: skip

    def test_no_other_file_uses_private_attributes_of_synapse(self) -> None:
        for name in (
            "store",
            "enforcement.room_changes",
            "monitor",
            "delegation.service",
            "issuer",
            "auth.openid",
            "remote_tokens",
        ):
            source = inspect.getsource(import_module(f"synapse_lk_jwt.{name}"))
            assert "._hs" not in source, name
            assert "get_datastores" not in source, name


class WithoutFeatureTests(ModuleTestCase):
    """The module in a Synapse that lacks all that one feature needs."""

    servlets = (*ModuleTestCase.servlets, login.register_servlets, room.register_servlets)

    def default_config(self) -> dict[str, Any]:
        return {**super().default_config(), "max_event_delay_duration": "24h"}

    def setUp(self) -> None:
        # Each test sets up its homeserver itself.
        pass

    def start_without(self, feature: Feature) -> None:
        self.errors: list[logging.LogRecord] = []
        handler = logging.Handler(logging.ERROR)
        handler.emit = self.errors.append  # type: ignore[assignment, method-assign]
        logging.getLogger().addHandler(handler)
        self.addCleanup(logging.getLogger().removeHandler, handler)

        hooks = HOOKS[feature]
        construct = LiveKitJwtModule.__init__

        def construct_without(module: LiveKitJwtModule, config: Any, api: Any) -> None:
            hidden = [["_hs", *path] for path in paths(*hooks)]
            with patch.object(self_test, "import_module", module_without(*hooks)):
                construct(module, config, Without(api, *hidden))  # type: ignore[arg-type]

        with patch.object(LiveKitJwtModule, "__init__", construct_without):
            super().setUp()
        self.feature = feature

    def assert_one_line(self) -> None:
        lines = [
            record.getMessage()
            for record in self.errors
            # The checks at start find delayed events off, where Synapse names that in another way.
            if record.name != "synapse_lk_jwt.check.start"
        ]
        assert len(lines) == 1, lines
        (line,) = lines
        assert self.feature.value in line
        for hook in HOOKS[self.feature]:
            assert hook.replace(":", ".") in line

    @parameterized.expand(NOT_TOKENS)
    def test_synapse_without_a_feature_serves_tokens_and_logs_one_line(
        self, feature: Feature
    ) -> None:
        self.start_without(feature)
        self.assert_token(self.post("/sfu/get", self.sfu_get_body()))
        self.assert_token(self.post("/get_token", self.get_token_body()))
        self.join_remotely(self.rita)
        body = self.get_token_body(self.rita, openid_token=self.remote_token(self.rita))
        assert self.post("/get_token", body).code == (
            401 if feature is Feature.OTHER_SERVERS else 200
        )
        codes = {404} if feature is Feature.HOMESERVER_ENDPOINTS else {200}
        assert {self.post_homeserver(self.homeserver_body()).code} == codes
        federation_body = self.homeserver_body(user_id=self.rita)
        assert {self.post_federation(federation_body).code} == codes
        self.assert_one_line()

    @parameterized.expand(NOT_TOKENS)
    def test_synapse_without_a_feature_removes_participants_who_leave(
        self, feature: Feature
    ) -> None:
        self.start_without(feature)
        # Until the first poll is over.
        self.reactor.advance(2)
        bob = self.register_user("bob", "password")
        token = self.login("bob", "password")
        self.helper.join(self.room_id, bob, tok=token)
        body = self.sfu_get_body(openid_token=self.openid_token(bob, token))
        participant = self.sfu.join(self.post("/sfu/get", body).json_body["jwt"])
        (people,) = self.sfu.people.values()
        assert participant.identity in people
        self.helper.leave(self.room_id, bob, tok=token)
        self.reactor.advance(5)
        assert (participant.identity in people) == (feature is Feature.STATE_CHANGES)
        for _ in range(3):
            self.reactor.advance(31)
        assert participant.identity not in people
        self.assert_one_line()

    def test_synapse_without_delegation_answers_404_to_delegations(self) -> None:
        self.start_without(Feature.DELEGATION)
        body = self.get_token_body(delay_id="x", delay_timeout=1000)
        self.assert_error(self.post("/delegate_delayed_leave", body), 404, Codes.UNRECOGNIZED)
        self.assert_token(self.post("/get_token", body))
        path = "/_matrix/client/v1/rtc/livekit/delegate_delayed_leave"
        channel = self.make_request("POST", path, {}, access_token=self.alices_token)
        self.assert_error(channel, 404, Codes.UNRECOGNIZED)
        self.assert_one_line()

    def test_synapse_without_what_tokens_need_starts_without_the_module(self) -> None:
        self.start_without(Feature.TOKENS)
        assert P not in self.hs._module_web_resources
        assert self.hs.config.server.extra_well_known_client_content == {}
        self.assert_one_line()


class ListenerTests(ModuleTestCase):
    """Synapse builds its listeners from registries that hold servlets of the module."""

    def test_client_servlet_that_cannot_be_registered_does_not_stop_a_listener(self) -> None:
        with (
            patch.object(GetTokenRestServlet, "register", side_effect=TypeError("other")),
            self.assertLogs("synapse_lk_jwt.compat.homeserver", "ERROR") as logs,
        ):
            ClientRestResource(self.hs)
        assert len(logs.output) == 1

    @parameterized.expand(["__init__", "register"])
    def test_federation_servlet_that_cannot_be_made_does_not_stop_a_listener(
        self, method: str
    ) -> None:
        with (
            patch.object(GetTokenFederationServlet, method, side_effect=TypeError("other")),
            self.assertLogs("synapse_lk_jwt.compat.homeserver", "ERROR") as logs,
        ):
            self.create_resource_dict()
        assert len(logs.output) == 1
