# SPDX-License-Identifier: Apache-2.0
"""What the checks have found, for people and for machines."""

import json
from collections.abc import Iterable, Sequence
from enum import Enum

import attr

LIVEKIT_YAML = "LiveKit's configuration (livekit.yaml)"


class Verdict(Enum):
    """What is thought of a finding."""

    OK = "ok"
    WARNING = "warning"
    """Worth a look; calls work, or nobody can tell from here."""
    WRONG = "wrong"
    """Calls, or a part of them, do not work until it is mended."""


_SIGNS = {Verdict.OK: "✔", Verdict.WARNING: "!", Verdict.WRONG: "✘"}
_COLOURS = {Verdict.OK: 32, Verdict.WARNING: 33, Verdict.WRONG: 31}


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        verdict: what is thought of it.
        check: what was looked at, in a word or two.
        text: what was found, a sentence without a full stop.
        file: which file to change.
        lines: what to write into it.
    """

    verdict: Verdict
    check: str
    text: str
    file: str | None = None
    lines: tuple[str, ...] = ()


def ok(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(Verdict.OK, check, text)


def warning(check: str, text: str, file: str | None = None, *lines: str) -> Finding:
    """Worth a look."""
    return Finding(Verdict.WARNING, check, text, file, lines)


def wrong(check: str, text: str, file: str | None = None, *lines: str) -> Finding:
    """To be mended, with what to write where."""
    return Finding(Verdict.WRONG, check, text, file, lines)


def is_all_well(findings: Iterable[Finding]) -> bool:
    """Whether nothing must be mended."""
    return all(finding.verdict is not Verdict.WRONG for finding in findings)


def as_text(findings: Sequence[Finding], *, coloured: bool) -> str:
    """The report for a terminal."""
    width = max((len(finding.check) for finding in findings), default=0)
    lines = []
    for finding in findings:
        sign = _SIGNS[finding.verdict]
        if coloured:
            sign = f"\033[{_COLOURS[finding.verdict]}m{sign}\033[0m"
        lines.append(f"{sign} {finding.check:{width}}  {finding.text}")
        if finding.file is not None:
            lines.append(f"    in {finding.file}{':' if finding.lines else ''}")
        lines += [f"        {line}" for line in finding.lines]
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    """The report for a machine: a list of objects with the attributes of `Finding`."""
    return json.dumps(
        [{**attr.asdict(finding), "verdict": finding.verdict.value} for finding in findings],
        indent=2,
    )
