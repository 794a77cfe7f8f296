# SPDX-License-Identifier: Apache-2.0
"""What the package imports is what it declares."""

import ast
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def test_imported_packages_are_declared() -> None:
    distributions = packages_distributions()
    undeclared = set()
    for module in imported_modules():
        # Namespace packages belong to several distributions.
        providers = {canonicalize_name(name) for name in distributions[module.partition(".")[0]]}
        if not providers & declared().keys():
            undeclared.add(module)
    assert undeclared == set()


def test_declared_packages_have_a_lower_bound() -> None:
    assert [name for name, required in declared().items() if not required.specifier] == []


def test_livekit_packages_have_an_upper_bound() -> None:
    for name in ("livekit-api", "livekit-protocol"):
        assert "2.0.0" not in declared()[name].specifier
