# SPDX-License-Identifier: Apache-2.0
"""Runs `synapse-lk-jwt check` on a real homeserver, and reads its report."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from synapse_lk_jwt.check.command import main
from testbed.synapse import Synapse

# The beginning of a JWT, and of an access token of Synapse.
_TOKEN = re.compile(r"eyJ[\w-]{8}|syt_")


@dataclass(frozen=True)
class Finding:
    """A line of the report, with the attributes of `report.Finding`."""

    verdict: str
    check: str
    text: str
    file: str | None
    lines: Sequence[str]

    @property
    def pasted(self) -> dict[str, Any]:
        """The lines as a mapping of YAML."""
        content = yaml.safe_load("\n".join(self.lines))
        assert isinstance(content, dict), self
        return content


@dataclass(frozen=True)
class Report:
    """The result of a run of the command."""

    status: int
    findings: Sequence[Finding]
    errors: str

    def the(self, verdict: str, check: str) -> Finding:
        """The one finding of a verdict and check."""
        found = self.all(verdict, check)
        assert len(found) == 1, str(self)
        return found[0]

    def all(self, verdict: str, check: str) -> list[Finding]:
        """All findings of a verdict and check."""
        return [f for f in self.findings if (f.verdict, f.check) == (verdict, check)]

    def __str__(self) -> str:
        return "\n".join([f"exit status {self.status}", *map(str, self.findings), self.errors])

    @property
    def bad(self) -> dict[str, str]:
        """The worst verdict of each check that found something.

        Tests change the files of a homeserver that keeps running with other settings. So
        `settings` is left out.
        """
        found = [f for f in self.findings if f.verdict in ("warning", "wrong")]
        found.sort(key=lambda finding: finding.verdict == "wrong")
        return {f.check: f.verdict for f in found if f.check != "settings"}

    @property
    def skipped(self) -> set[str]:
        """The checks that were skipped."""
        return {f.check for f in self.findings if f.verdict == "skipped"}


class Checker:
    """Runs the command, and fails if its output holds a secret."""

    def __init__(
        self, synapse: Synapse, options: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> None:
        """
        Args:
            synapse: the homeserver whose configuration is checked; it need not run.
            options: command line options of each run.
            env: further environment variables of each run.
        """
        self.directory = synapse.directory
        self._options = list(options)
        self._env = dict(env or {})

    def write(
        self,
        config: Mapping[str, Any] | None = None,
        module: Mapping[str, Any] | None = None,
        name: str = "changed.json",
    ) -> str:
        """Write a changed copy of `homeserver.json` into its directory, and return its name.

        Args:
            config: top-level options; None removes one.
            module: options of the module's block; None removes one.
            name: the name of the copy.
        """
        content = json.loads((self.directory / "homeserver.json").read_text())
        if module:
            _change(content["modules"][0]["config"], module)
        _change(content, config or {})
        (self.directory / name).write_text(json.dumps(content, indent=2))
        return name

    def run(
        self,
        *options: str,
        config: Mapping[str, Any] | None = None,
        module: Mapping[str, Any] | None = None,
    ) -> Report:
        """Run it in this process, on the homeserver's own files or on a changed copy.

        Args:
            options: further command line options.
            config: as that of `write`.
            module: as that of `write`.
        """
        name = self.write(config, module) if config or module else "homeserver.json"
        return self.run_on([name], *options)

    def run_on(self, names: Sequence[str], *options: str) -> Report:
        """As `run`, on these files or directories."""
        arguments = self._arguments(names, "--json", *options)
        out, errors = io.StringIO(), io.StringIO()
        with (
            self._environment(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
        ):
            try:
                status = main(arguments)
            except SystemExit as e:
                status = int(e.code or 0)
            finally:
                logging.disable(logging.NOTSET)
        return self._report(status, out.getvalue(), errors.getvalue())

    def start(
        self,
        names: Sequence[str] = ("homeserver.json",),
        *options: str,
        wrapper: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> Report:
        """As `run_on`, in a process of its own.

        Args:
            names: files or directories.
            options: further command line options.
            wrapper: a program, with its arguments, that starts it.
            env: further environment variables.
        """
        done = subprocess.run(
            [*wrapper, *self.command(names, "--json", *options)],
            cwd=self.directory,
            env=self.environment(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return self._report(done.returncode, done.stdout, done.stderr)

    def environment(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of a run in a process of its own, with further variables."""
        return {**os.environ, **self._env, **(env or {})}

    def command(self, names: Sequence[str] = ("homeserver.json",), *options: str) -> list[str]:
        """The command line."""
        return [sys.executable, "-m", "synapse_lk_jwt", *self._arguments(names, *options)]

    def assert_no_secret(self, text: str) -> None:
        """Fail if a text holds a token, or a secret of any of the configurations."""
        assert not _TOKEN.search(text), text
        for file in self.directory.glob("*.json"):
            for secret in _secrets(json.loads(file.read_text())):
                assert secret not in text, text

    def _arguments(self, names: Sequence[str], *options: str) -> list[str]:
        files = [part for name in names for part in ("-c", name)]
        return ["check", *files, *self._options, *options]

    def _report(self, status: int, out: str, errors: str) -> Report:
        self.assert_no_secret(out + errors)
        assert "Traceback" not in errors, errors
        findings = [Finding(**finding) for finding in json.loads(out)] if out else []
        return Report(status, findings, errors)

    @contextlib.contextmanager
    def _environment(self) -> Iterator[None]:
        directory, before = Path.cwd(), dict(os.environ)
        os.chdir(self.directory)
        os.environ.update(self._env)
        try:
            yield
        finally:
            os.chdir(directory)
            os.environ.clear()
            os.environ.update(before)


def _change(mapping: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if value is None:
            mapping.pop(key, None)
        else:
            mapping[key] = value


def _secrets(content: Any, is_secret: bool = False) -> Iterator[str]:
    """The values of options that are named after secrets, at any depth."""
    if isinstance(content, dict):
        for key, value in content.items():
            is_named = "secret" in key and not key.endswith("_path")
            yield from _secrets(value, is_secret or is_named)
    elif isinstance(content, list):
        for value in content:
            yield from _secrets(value, is_secret)
    elif is_secret and isinstance(content, str):
        yield content
