# SPDX-License-Identifier: Apache-2.0
"""What is fetched or built once and kept, outside of the checkout."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from testbed.process import MissingTool


def cache_directory() -> Path:
    """Where big things are kept; it need not be there yet."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "synapse-lk-jwt"


def npm_packages(project: Path) -> Path:
    """The `node_modules` for an npm project, in the cache: npm is asked once for each lock file.

    Args:
        project: a directory with `package.json` and `package-lock.json`, of which npm checks the
            versions and hashes.

    Raises:
        MissingTool
    """
    lock = (project / "package-lock.json").read_bytes()
    place = cache_directory() / f"{project.name}-{hashlib.sha256(lock).hexdigest()[:12]}"
    if not place.exists():
        _fetch(project, place)
    return place / "node_modules"


def _fetch(project: Path, place: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise MissingTool(f"npm is missing: install it, with Node.js, to fetch {project.name}")
    print(f"fetching {project.name} with npm, once", flush=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and moved there when done, as one that was cut short is of no use.
    with tempfile.TemporaryDirectory(dir=place.parent) as directory:
        fresh = Path(directory) / "fresh"
        fresh.mkdir()
        for name in ("package.json", "package-lock.json"):
            shutil.copy(project / name, fresh)
        # No script of a package is run. With the hash in the lock file it does not matter from
        # where a package comes.
        fetched = subprocess.run(
            [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
            cwd=fresh,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if fetched.returncode != 0:
            lines = fetched.stdout.decode("utf-8", "replace").strip().splitlines()
            raise MissingTool(f"npm could not fetch {project.name}: {' '.join(lines[:2])}")
        os.replace(fresh, place)
