# SPDX-License-Identifier: Apache-2.0
"""The findings of the checks, as text for a terminal and as JSON."""

import json
from collections.abc import Iterable, Sequence
from enum import Enum

import attr

LIVEKIT_YAML = "LiveKit's configuration (livekit.yaml); then restart LiveKit"
COMMAND_LINE = "the command line"


class Verdict(Enum):
    """How serious a finding is."""

    OK = "ok"
    WARNING = "warning"
    """Calls work, but this deserves attention."""
    WRONG = "wrong"
    """Calls, or a part of them, do not work until this is fixed."""
    SKIPPED = "skipped"
    """Not checked, because another finding decides it."""


_SIGNS = {Verdict.OK: "✔", Verdict.WARNING: "!", Verdict.WRONG: "✘", Verdict.SKIPPED: "-"}
_COLOURS = {Verdict.OK: 32, Verdict.WARNING: 33, Verdict.WRONG: 31, Verdict.SKIPPED: 90}


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        verdict: how serious it is.
        check: the name of the check, one or two words.
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
    """No problem."""
    return Finding(Verdict.OK, check, text)


def warning(check: str, text: str, file: str | None = None, *lines: str) -> Finding:
    """Something that deserves attention."""
    return Finding(Verdict.WARNING, check, text, file, lines)


def wrong(check: str, text: str, file: str | None = None, *lines: str) -> Finding:
    """A problem, with what to write where."""
    return Finding(Verdict.WRONG, check, text, file, lines)


def skipped(checks: Iterable[str], cause: str) -> list[Finding]:
    """One finding for each check that cannot be done.

    Args:
        checks: their names.
        cause: why, without a full stop.
    """
    return [Finding(Verdict.SKIPPED, check, f"skipped: {cause}") for check in checks]


def is_all_well(findings: Iterable[Finding]) -> bool:
    """Whether no finding is a problem."""
    return all(finding.verdict is not Verdict.WRONG for finding in findings)


def has_problem(findings: Iterable[Finding], *checks: str) -> bool:
    """Whether one of these checks found a problem."""
    return not is_all_well(finding for finding in findings if finding.check in checks)


def summary(findings: Sequence[Finding]) -> str:
    """The number of findings of each verdict, in one line."""
    count = {verdict: sum(f.verdict is verdict for f in findings) for verdict in Verdict}
    parts = [
        f"{count[Verdict.OK]} ok",
        _plural(count[Verdict.WARNING], "warning"),
        _plural(count[Verdict.WRONG], "problem"),
    ]
    if count[Verdict.SKIPPED]:
        parts.append(f"{count[Verdict.SKIPPED]} skipped")
    return ", ".join(parts)


def as_text(findings: Sequence[Finding], *, coloured: bool, quiet: bool = False) -> str:
    """The report for a terminal.

    Args:
        findings: all of them; the summary counts them all.
        coloured: whether to colour the signs.
        quiet: whether to print only warnings and problems, without the lines to write.
    """
    shown = findings
    if quiet:
        shown = [f for f in findings if f.verdict in (Verdict.WARNING, Verdict.WRONG)]
    width = max((len(finding.check) for finding in shown), default=0)
    lines = []
    for finding in shown:
        sign = _SIGNS[finding.verdict]
        if coloured:
            sign = f"\033[{_COLOURS[finding.verdict]}m{sign}\033[0m"
        lines.append(f"{sign} {finding.check:{width}}  {_printable(finding.text)}")
        if quiet:
            continue
        if finding.file is not None:
            preposition = "on" if finding.file.startswith(COMMAND_LINE) else "in"
            lines.append(f"    {preposition} {finding.file}{':' if finding.lines else ''}")
        lines += [f"        {_printable(line)}" for line in finding.lines]
    return "\n".join([*lines, summary(findings)])


def as_json(findings: Sequence[Finding]) -> str:
    """The report as JSON: a list of objects with the attributes of `Finding`."""
    return json.dumps(
        [{**attr.asdict(finding), "verdict": finding.verdict.value} for finding in findings],
        indent=2,
    )


def _printable(text: str) -> str:
    """A text without characters that control a terminal. Other servers send some of the text."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
