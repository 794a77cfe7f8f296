# SPDX-License-Identifier: Apache-2.0
"""A cache outside of the checkout for programs that are downloaded or built once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from testbed.process import MissingTool


def cache_directory() -> Path:
    """The directory of the cache, which may not exist yet."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "synapse-lk-jwt"


def npm_packages(project: Path) -> Path:
    """The `node_modules` of an npm project, which npm fetches into the cache once for each lock
    file.

    Args:
        project: a directory with `package.json` and `package-lock.json`. npm checks the versions
        and
            hashes in the lock file.

    Raises:
        MissingTool
    """
    place = _place(project)
    if not place.exists():
        _fetch(project, place)
    return place / "node_modules"


def has_npm_packages(project: Path) -> bool:
    """Whether the cache has the packages of an npm project."""
    return _place(project).exists()


def _place(project: Path) -> Path:
    lock = (project / "package-lock.json").read_bytes()
    return cache_directory() / f"{project.name}-{hashlib.sha256(lock).hexdigest()[:12]}"


def _fetch(project: Path, place: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise MissingTool(f"npm is missing: install it, with Node.js, to fetch {project.name}")
    print(f"fetching {project.name} with npm, once", flush=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    # Created in a temporary directory and then renamed, so that an interrupted download leaves
    # nothing.
    with tempfile.TemporaryDirectory(dir=place.parent) as directory:
        fresh = Path(directory) / "fresh"
        fresh.mkdir()
        for name in ("package.json", "package-lock.json"):
            shutil.copy(project / name, fresh)
        # npm runs no script of a package. The hashes in the lock file make any source safe.
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
