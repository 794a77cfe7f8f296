# SPDX-License-Identifier: Apache-2.0
"""LiveKit's own configuration file: whether it has the lines of a finding already."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import attr
import yaml

from synapse_lk_jwt.check.report import COMMAND_LINE, LIVEKIT_YAML, Finding

# Where LiveKit's file usually is.
USUAL_PATHS = ("/etc/livekit.yaml", "/etc/livekit/livekit.yaml", "/etc/livekit/config.yaml")

# In a line to write, this replaces a value that the admin knows.
UNKNOWN = "…"

RESTART = "systemctl restart livekit    # or however you restart LiveKit"


class Unreadable(Exception):
    """The file cannot be read. The text names the cause."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class LiveKitFile:
    """LiveKit's configuration file.

    Attributes:
        name: its name.
        content: its content, of which secrets are never shown.
    """

    name: str
    content: Mapping[str, Any] = attr.ib(repr=False)

    def advise(self, findings: Iterable[Finding]) -> list[Finding]:
        """The findings, with a restart instead of lines that the file already has."""
        return [f if f.file != LIVEKIT_YAML else self._advise(f) for f in findings]

    def _advise(self, finding: Finding) -> Finding:
        if not _contains(self.content, yaml.safe_load("\n".join(finding.lines))):
            return attr.evolve(finding, file=f"{self.name}; then restart LiveKit")
        text = f"{finding.text}. {self.name} already has the lines for this. Restart LiveKit"
        return attr.evolve(finding, text=text, file=COMMAND_LINE, lines=(RESTART,))


def read(path: str) -> LiveKitFile:
    """Reads LiveKit's file.

    Raises:
        Unreadable: if the file does not exist, or is no mapping in YAML.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as e:
        raise Unreadable(f"{path!r} cannot be read ({e.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        # The error quotes a line, which may contain a secret.
        raise Unreadable(f"{path!r} is not YAML") from None
    if not isinstance(content, dict):
        raise Unreadable(f"{path!r} is not a configuration of LiveKit")
    return LiveKitFile(path, content)


def find() -> LiveKitFile | None:
    """LiveKit's file at a usual place; None if this user can read none."""
    for path in USUAL_PATHS:
        if os.access(path, os.R_OK):
            try:
                return read(path)
            except Unreadable:
                continue
    return None


def _contains(content: Any, wanted: Any) -> bool:
    """Whether a configuration contains all of a part."""
    if isinstance(wanted, dict):
        return isinstance(content, dict) and all(
            key in content and _contains(content[key], value) for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        return isinstance(content, list) and all(value in content for value in wanted)
    return wanted == UNKNOWN or bool(content == wanted)
