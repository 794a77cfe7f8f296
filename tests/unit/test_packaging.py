# SPDX-License-Identifier: Apache-2.0
"""What the wheel requires: the packages that it imports, and nothing that changes Synapse."""

import ast
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from synapse.module_api.errors import ConfigError

from synapse_lk_jwt import __main__ as command_line
from synapse_lk_jwt.compat import synapse_version
from synapse_lk_jwt.compat.synapse_version import UnsupportedSynapse, unsupported_synapse

ROOT = Path(__file__).resolve().parents[2]


def imported_modules() -> set[str]:
    """The modules of other packages that the package imports, with their parents."""
    modules: set[str] = set()
    for file in (ROOT / "synapse_lk_jwt").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module)
            elif isinstance(node, ast.Import):
                modules.update(name.name for name in node.names)
    own = {*sys.stdlib_module_names, "synapse_lk_jwt"}
    return {module for module in modules if module.partition(".")[0] not in own}


def declared() -> dict[str, Requirement]:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = parser["options"]["install_requires"].strip().splitlines()
    requirements = map(Requirement, lines)
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def install_synapse(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(synapse_version, "version", lambda name: version)


@pytest.mark.skipif(
    sys.version_info < (3, 11),
    reason="needs Python 3.11: older ones do not know which distribution has the package synapse",
)
def test_package_imports_are_declared() -> None:
    distributions = metadata.packages_distributions()
    undeclared = set()
    for module in imported_modules():
        # Namespace packages belong to several distributions.
        providers = {canonicalize_name(name) for name in distributions[module.partition(".")[0]]}
        if not providers & declared().keys():
            undeclared.add(module)
    assert undeclared == set()


def test_requirements_of_other_packages_have_a_lower_bound() -> None:
    without = [name for name, required in declared().items() if not required.specifier]
    assert without == ["matrix-synapse"]


@pytest.mark.parametrize("name", ["livekit-api", "livekit-protocol"])
def test_requirement_of_livekit_package_has_an_upper_bound(name: str) -> None:
    assert "2.0.0" not in declared()[name].specifier


def test_requirement_of_synapse_has_no_version_so_that_installing_keeps_synapse() -> None:
    assert str(declared()["matrix-synapse"]) == "matrix-synapse"


@pytest.mark.parametrize("version", ["1.140.0rc1", "1.140.0", "1.163.2", "2.0"])
def test_synapse_version_that_is_new_enough_is_supported(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    install_synapse(monkeypatch, version)
    assert unsupported_synapse() is None


@pytest.mark.parametrize("version", ["1.99.0", "1.139.2", "1.20.0+local"])
def test_module_on_older_synapse_stops_the_start_with_the_version_needed(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    install_synapse(monkeypatch, version)
    with pytest.raises(ConfigError, match=r"needs Synapse 1\.140 or newer") as raised:
        UnsupportedSynapse.parse_config({})
    assert version in raised.value.msg


def test_command_on_older_synapse_exits_with_the_version_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_synapse(monkeypatch, "1.139.2")
    assert command_line.main() == 2
    assert "needs Synapse 1.140 or newer" in capsys.readouterr().err


def test_command_without_synapse_exits_with_the_name_of_its_python(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(synapse_version, "version", version)
    monkeypatch.setattr(synapse_version, "find_spec", lambda name: None)
    assert command_line.main() == 2
    assert sys.executable in capsys.readouterr().err
