# SPDX-License-Identifier: Apache-2.0
"""Downloads Synapse's own test harness, which only Synapse's source distribution contains.

The harness is a package named `tests`, as are this project's tests. Both are importable by that
name, because no module of one has the name of a module of the other.
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from testbed.process import MissingTool


def make_importable() -> None:
    """Downloads the harness of the installed Synapse once, and makes `import tests.unittest` work.

    Raises:
        MissingTool: if it cannot be fetched.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = caches / "synapse-lk-jwt" / f"synapse-{version('matrix-synapse')}"
    if not home.exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent) as directory:
            _fetch(Path(directory))
            (Path(directory) / "unpacked").rename(home)
    own = Path(__file__).resolve().parent.parent / "tests"
    # Python imports the first regular package named `tests`. This project's has no __init__.py.
    sys.modules.pop("tests", None)
    sys.path.append(str(home))
    importlib.invalidate_caches()
    importlib.import_module("tests").__path__.append(str(own))


def _fetch(directory: Path) -> None:
    requirement = f"matrix-synapse=={version('matrix-synapse')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", "matrix-synapse", "--dest", str(directory), requirement]
    fetched = subprocess.run(command, capture_output=True, text=True, check=False)
    if fetched.returncode != 0:
        last_line = fetched.stderr.strip().rpartition("\n")[2]
        raise MissingTool(f"Synapse's test harness is missing and cannot be fetched: {last_line}")
    (archive,) = directory.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        for member in source.getmembers():
            _, _, name = member.name.partition("/")
            if name.startswith("tests/") and member.isfile():
                member.name = name
                source.extract(member, directory / "unpacked", filter="data")
