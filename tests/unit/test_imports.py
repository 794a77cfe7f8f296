# SPDX-License-Identifier: Apache-2.0
"""The directions of imports, and which modules of Synapse may be imported where.

The layers of the package, from bottom to top. A module imports modules of its own layer and of
lower layers, and there is no circle of modules.

| layer       | what it holds                                                         |
| ----------- | --------------------------------------------------------------------- |
| plain       | values and rules that need neither a homeserver nor a network         |
| compat      | the parts of Synapse that are private, and the metrics                |
| services    | configuration, and work that needs a homeserver only                  |
| auth        | who is asking and what they may do; requests to LiveKit               |
| issuing     | tokens, and the tables that several features use                      |
| features    | delegation of delayed leaves; enforcement of membership in Matrix     |
| monitor     | the poll of LiveKit, and its webhooks                                 |
| api         | the endpoints                                                         |
| module      | constructs and starts all of it                                       |

The commands are not in these layers. They import `issuing` and below. Only `module` and
`__main__` import them.
"""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "synapse_lk_jwt"
FOLDERS = (PACKAGE, "testbed", "tests", "demo", "benchmarks")

# The modules and folders of each layer. The longest name that fits decides.
LAYERS = {
    "plain": (
        "auth.access",
        "call_member",
        "check.signature",
        "delegation.state_machine",
        "discovery",
        "identifiers",
        "livekit.naming",
        "livekit.proxies",
        "msc4195",
        "untrusted",
    ),
    "compat": ("compat", "metrics"),
    "services": ("config", "work"),
    "auth": ("auth", "livekit", "remote_tokens"),
    "issuing": ("enforcement.owners", "issuer", "process_registry"),
    "features": ("delegation", "enforcement"),
    "monitor": ("lost_rooms", "monitor", "poll_schedule", "webhooks"),
    "api": ("api",),
    "module": ("module", "", "__main__"),
}
COMMANDS = ("check", "commands")
COMMANDS_STAND_ON = "issuing"

# What the core imports, directly or through other modules of the package, is free of these.
CORE = ("auth.access", "delegation.state_machine", "livekit.naming", "policy")
NOT_IN_CORE = ("twisted", "synapse.http", "synapse.module_api")

# The modules of Synapse that other files than those in `compat/` may import.
PUBLIC = {
    "synapse.api.constants": "event types and memberships; most modules import it",
    "synapse.api.errors": "SynapseError and the error codes; most modules import it",
    "synapse.http.server": "DirectServeJsonResource and its helpers, which the module API exports",
    "synapse.http.servlet": "RestServlet, the base class of endpoints; other modules import it",
    "synapse.http.site": "SynapseRequest, the argument of each endpoint; other modules import it",
    "synapse.module_api": "the module API",
    "synapse.module_api.errors": "the module API",
    "synapse.types": "user IDs and JSON; most modules import it",
    "synapse.util.async_helpers": "concurrency on Synapse's reactor; asyncio does not run there",
    "synapse.util.caches.ttlcache": "a bounded cache with Synapse's metrics",
    "synapse.util.iterutils": "batch_iter",
    "synapse.util.stringutils": "the grammar of server names",
}


@cache
def modules() -> dict[str, Path]:
    """The files of the repository, by the name of their module."""
    found = {}
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """The modules that a module imports: at its top, in functions, and for type checkers."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{module} has a relative import"
            for name in node.names:
                submodule = f"{node.module}.{name.name}"
                found.add(submodule if submodule in modules() else node.module)
    return frozenset(found)


def own_imports(module: str) -> set[str]:
    """As `imports`, without modules of other distributions."""
    return {name for name in imports(module) if name in modules()}


def name_in_package(module: str) -> str:
    return module.removeprefix(PACKAGE).removeprefix(".")


def is_below(module: str, folder: str) -> bool:
    return module == folder or (bool(folder) and module.startswith(f"{folder}."))


def is_command(module: str) -> bool:
    name = name_in_package(module)
    return name not in LAYERS["plain"] and any(is_below(name, folder) for folder in COMMANDS)


def layer(module: str) -> int:
    """The number of a module's layer, the lowest first."""
    name = name_in_package(module)
    if is_command(module):
        return list(LAYERS).index(COMMANDS_STAND_ON)
    fitting = [
        (len(folder), number)
        for number, folders in enumerate(LAYERS.values())
        for folder in folders
        if is_below(name, folder)
    ]
    assert fitting, f"{module} has no layer: add it to LAYERS"
    return max(fitting)[1]


def own_modules() -> list[str]:
    return [
        module
        for module, file in modules().items()
        if is_below(module, PACKAGE)
        # Folders hold no code of their own.
        and (module == PACKAGE or file.name != "__init__.py")
    ]


@pytest.mark.parametrize("module", own_modules())
def test_module_imports_no_higher_layer(module: str) -> None:
    own = layer(module)
    imported = {name for name in own_imports(module) if not is_command(name)}
    assert {name for name in imported if layer(name) > own} == set()


def test_metrics_import_nothing_of_the_package() -> None:
    assert own_imports(f"{PACKAGE}.metrics") == set()


def test_commands_are_imported_by_module_and_main_only() -> None:
    importers = {
        name_in_package(module)
        for module in own_modules()
        if not is_command(module) and any(map(is_command, own_imports(module)))
    }
    assert importers <= {"module", "__main__"}


def test_no_circle_of_imports() -> None:
    graph = {module: own_imports(module) for module in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(f"circle of imports: {' <- '.join(e.args[1])}")


def test_package_imports_no_tests_or_tools() -> None:
    tops = {name.partition(".")[0] for module in own_modules() for name in own_imports(module)}
    assert tops == {PACKAGE}


def test_testbed_imports_no_tests() -> None:
    tops = {
        name.partition(".")[0]
        for module in modules()
        if is_below(module, "testbed")
        for name in own_imports(module)
    }
    assert tops <= {PACKAGE, "testbed"}


def core_modules() -> set[str]:
    """The core, and all modules of the package that it imports."""
    found: set[str] = set()
    waiting = {m for m in own_modules() for name in CORE if is_below(name_in_package(m), name)}
    while waiting:
        found |= waiting
        waiting = {name for module in waiting for name in own_imports(module)} - found
    return found


@pytest.mark.parametrize("module", sorted(core_modules()))
def test_core_imports_neither_twisted_nor_synapses_http(module: str) -> None:
    assert {n for n in imports(module) if any(is_below(n, top) for top in NOT_IN_CORE)} == set()


def outside_of_compat() -> list[str]:
    return [m for m in own_modules() if not is_below(name_in_package(m), "compat")]


@pytest.mark.parametrize("module", outside_of_compat())
def test_module_outside_of_compat_imports_public_modules_of_synapse(module: str) -> None:
    private = {name for name in imports(module) if is_below(name, "synapse")} - PUBLIC.keys()
    assert private == set()


@pytest.mark.parametrize("module", outside_of_compat())
def test_module_outside_of_compat_reads_no_private_attributes_of_synapse(module: str) -> None:
    tree = ast.parse(modules()[module].read_text())
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert read & {"_hs", "get_datastores", "db_pool"} == set()


def test_public_modules_of_synapse_are_all_imported() -> None:
    imported = {name for module in outside_of_compat() for name in imports(module)}
    assert PUBLIC.keys() - imported == set()
