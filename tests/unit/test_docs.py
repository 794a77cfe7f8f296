# SPDX-License-Identifier: Apache-2.0
"""The documentation agrees with the repository: links, options, and quoted log lines and errors."""

import ast
import difflib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from synapse_lk_jwt.config import OPTIONS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("contrib/**/*.md")])
CONFIGURATION = (ROOT / "docs/configuration.md").read_text()
TROUBLESHOOTING = (ROOT / "docs/troubleshooting.md").read_text()

# Names of other projects and of examples that resemble an option.
OTHER_NAMES = {"livekit_service_url", "my_livekit_secret"}
# A shorter fragment, such as "at", is in every file.
LONGEST_FRAGMENT_AT_LEAST = 8


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+?) *$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_of(text: str) -> str:
    """The code blocks and code spans of a page."""
    blocks = re.findall(r"^ *```.*?^ *```", text, re.MULTILINE | re.DOTALL)
    return "\n".join(blocks + re.findall(r"`([^`\n]+)`", text))


def rows(heading: str) -> list[str]:
    """The first cells of all tables below a heading of docs/troubleshooting.md."""
    _, _, section = TROUBLESHOOTING.partition(f"\n## {heading}\n")
    lines = section.partition("\n## ")[0].splitlines()
    tables = [line for line in lines if line.startswith("| ")]
    return [
        row.split(" | ")[0][2:]
        for row, following in zip(tables, [*tables[1:], ""], strict=True)
        if not row.startswith("| ---") and not following.startswith("| ---")
    ]


def quoted_log_lines() -> list[str]:
    return [line for cell in rows("By log line") for line in re.findall(r"`([^`]+)`", cell)]


def quoted_answers() -> list[str]:
    return [text for cell in rows("By answer") for text in re.findall(r"'([^']+)'", cell)]


def literals() -> Iterator[str]:
    """All string literals of the package, with placeholders as `…`."""
    for file in (ROOT / "synapse_lk_jwt").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[srdg]|%\.\d+f", "…", node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                yield "".join(map(str, parts))


LITERALS = list(literals())


def missing_fragments(quoted: str) -> list[str]:
    """The parts of a quoted line, between its placeholders, that no literal has."""
    fragments = [part.strip() for part in quoted.split("…") if part.strip(" .:'()")]
    assert max(map(len, fragments)) >= LONGEST_FRAGMENT_AT_LEAST, quoted
    return [part for part in fragments if not any(part in literal for literal in LITERALS)]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_page_relative_links_resolve(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_page_yaml_blocks_are_valid_and_name_existing_options(page: Path) -> None:
    for block in re.findall(r"^ *```yaml\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL):
        settings = yaml.safe_load(block)
        for module in settings.get("modules", []):
            if module["module"].startswith("synapse_lk_jwt"):
                assert set(module["config"]) <= set(OPTIONS)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_page_names_no_misspelt_option(page: Path) -> None:
    names = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", code_of(page.read_text())))
    misspelt = [
        name
        for name in names - set(OPTIONS) - OTHER_NAMES
        if difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.85)
    ]
    assert misspelt == []


def test_configuration_page_lists_every_option() -> None:
    _, _, section = CONFIGURATION.partition("\n## All options\n")
    names = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (\[.*?\]\(.*?\)) \|", section, re.M)))
    assert sorted(names) == sorted(OPTIONS)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"LIVEKIT_[A-Z_]+", CONFIGURATION))))
def test_configuration_page_environment_variable_is_read(name: str) -> None:
    source = (ROOT / "synapse_lk_jwt/config.py").read_text()
    # The names of file variables are put together.
    assert name.removesuffix("_FROM_FILE") in source


@pytest.mark.parametrize("quoted", quoted_log_lines())
def test_troubleshooting_quoted_log_line_is_in_the_source(quoted: str) -> None:
    assert missing_fragments(quoted) == []


@pytest.mark.parametrize("quoted", quoted_answers())
def test_troubleshooting_quoted_answer_is_in_the_source(quoted: str) -> None:
    assert missing_fragments(quoted) == []


def test_troubleshooting_quoted_line_that_is_in_no_source_is_found() -> None:
    assert missing_fragments("LiveKit at … sings") == ["sings"]
