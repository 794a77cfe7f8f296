# SPDX-License-Identifier: Apache-2.0
"""The private names of Synapse that the module uses, and Synapses that lack some of them."""

import ast
import logging
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import TestCase
from unittest.mock import patch

from parameterized import parameterized
from synapse.api.errors import Codes
from synapse.rest import ClientRestResource
from synapse.rest.client import login, room

from synapse_lk_jwt import LiveKitJwtModule, compat
from synapse_lk_jwt.api.client_server import GetTokenRestServlet
from synapse_lk_jwt.api.federation import GetTokenFederationServlet
from synapse_lk_jwt.compat import self_test
from synapse_lk_jwt.compat.self_test import HOOKS, Feature, missing_hooks
from tests.harness.base import ModuleTestCase, P

ALL_HOOKS = [(feature, hook) for feature, hooks in HOOKS.items() for hook in hooks]
ROOTS = ("hs", "store", "config", "client.agent")
NOT_TOKENS = [(feature,) for feature in Feature if feature is not Feature.TOKENS]


# What Synapse calls of the servlets that the module registers.
NO_HOOKS = {"__call__", "register"}


def compat_files() -> dict[str, ast.Module]:
    """The files of `compat/` that read Synapse's attributes, parsed."""
    (folder,) = compat.__path__
    return {
        file.name: ast.parse(file.read_text())
        for file in Path(folder).glob("*.py")
        # http.py reads Twisted's responses only. The module works without the checks that need
        # config.py.
        if file.name not in ("config.py", "http.py", "self_test.py")
    }


def hook_parts() -> set[str]:
    """All names in the paths of hooks."""
    return {
        name.removesuffix("()")
        for _, hook in ALL_HOOKS
        for part in hook.split(" or ")
        for name in part.partition(":")[2].split(".")
    }


def protocol_members() -> set[str]:
    """The attributes of Synapse that Protocols in `compat/` declare."""
    members = set()
    for tree in compat_files().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases):
                for statement in node.body:
                    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                        members.add(statement.name)
                    elif isinstance(statement, ast.AnnAssign):
                        members.add(ast.unparse(statement.target))
    return members


def read_attributes() -> set[str]:
    """The attributes that `compat/` reads of the homeserver, its store and its configuration."""
    roots = {f"{start}{name}" for start in ("", "self.", "self._") for name in ROOTS}
    read = set()
    for tree in compat_files().values():
        for node in ast.walk(tree):
            chain: list[str] = []
            while isinstance(node, ast.Attribute):
                chain.append(node.attr)
                node = node.value
                if ast.unparse(node) in roots:
                    read.update(chain)
    return read


class Without:
    """An object that hides some attributes, each given as a path of names."""

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
    """A function like `import_module`, whose modules lack the hooks."""

    def import_without(name: str) -> Any:
        parts = [hook.partition(":") for hook in hooks]
        return Without(import_module(name), *[p.split(".") for root, _, p in parts if root == name])

    return import_without


class MissingHooksTests(ModuleTestCase):
    def prepare(self, reactor: Any, clock: Any, hs: Any) -> None:
        client = hs.get_federation_http_client()
        agent = client.agent
        super().prepare(reactor, clock, hs)
        # The agent of the harness lacks the attributes that the hooks name.
        client.agent = agent

    def test_missing_hooks_with_this_synapse_is_empty(self) -> None:
        assert missing_hooks(self.hs.get_module_api()) == {}

    def test_missing_in_installed_synapse_is_empty(self) -> None:
        assert self_test.missing_in_installed_synapse() == {}

    def test_missing_hooks_names_each_hook_and_its_feature(self) -> None:
        for feature, hook in ALL_HOOKS:
            with (
                self.subTest(hook=hook),
                patch.object(self_test, "import_module", module_without(hook)),
            ):
                api: Any = SimpleNamespace(_hs=Without(self.hs, *paths(hook)))
                found = missing_hooks(api)
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


class TableTests(TestCase):
    """The table of hooks and the code of `compat/` name the same attributes of Synapse."""

    def test_protocols_of_compat_declare_only_hooks(self) -> None:
        assert protocol_members() - hook_parts() == NO_HOOKS

    def test_files_of_compat_read_only_hooks_of_the_homeserver(self) -> None:
        # Methods of a dict, and of Twisted's agents.
        assert read_attributes() - hook_parts() == {"get", "request"}

    def test_hooks_of_the_homeserver_are_all_used(self) -> None:
        parts = {
            part.removesuffix("()")
            for _, hook in ALL_HOOKS
            for root, _, path in (part.partition(":") for part in hook.split(" or "))
            if root in ("hs", "store", "config")
            for part in path.split(".")
        }
        used = {
            node.attr if isinstance(node, ast.Attribute) else node.value
            for tree in compat_files().values()
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            or (isinstance(node, ast.Constant) and isinstance(node.value, str))
        }
        # `compat/` has its own federation client, and gets the other one from the module API.
        assert parts - used == {"get_federation_http_client", "get_simple_http_client"}


class WithoutFeatureTests(ModuleTestCase):
    """The module in a Synapse that lacks all hooks of one feature."""

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
            # The checks at start log that delayed events are off, if this Synapse has another name
            # for that option.
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
        # The first poll ends.
        self.reactor.advance(2)
        bob = self.register_user("bob", "password")
        token = self.login("bob", "password")
        self.helper.join(self.room_id, bob, tok=token)
        body = self.sfu_get_body(openid_token=self.openid_token(bob, token))
        participant = self.sfu.join(self.post("/sfu/get", body).json_body["jwt"])
        (present,) = self.sfu.participants.values()
        assert participant.identity in present
        self.helper.leave(self.room_id, bob, tok=token)
        self.reactor.advance(5)
        assert (participant.identity in present) == (feature is Feature.STATE_CHANGES)
        for _ in range(3):
            self.reactor.advance(31)
        assert participant.identity not in present
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
            self.assertLogs("synapse_lk_jwt.compat.servlets", "ERROR") as logs,
        ):
            ClientRestResource(self.hs)
        assert len(logs.output) == 1

    @parameterized.expand(["__init__", "register"])
    def test_federation_servlet_that_cannot_be_made_does_not_stop_a_listener(
        self, method: str
    ) -> None:
        with (
            patch.object(GetTokenFederationServlet, method, side_effect=TypeError("other")),
            self.assertLogs("synapse_lk_jwt.compat.servlets", "ERROR") as logs,
        ):
            self.create_resource_dict()
        assert len(logs.output) == 1
