# SPDX-License-Identifier: Apache-2.0
"""The metrics' names and labels, and that dashboard, alerts and documentation know them."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from prometheus_client import REGISTRY

from synapse_lk_jwt import metrics
from synapse_lk_jwt.delegation.state_machine import Phase, Trigger
from synapse_lk_jwt.enforcement.participants import RemovalCause
from testbed.metrics import METRICS, PREFIX, own_samples, samples
from testbed.skips import missing_tool

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "contrib/grafana/synapse-lk-jwt.json"
RULES = ROOT / "contrib/prometheus/synapse-lk-jwt.rules.yml"
DOCS = ROOT / "docs/monitoring.md"
# What Prometheus adds by itself.
TARGET_LABELS = {"instance", "job", "index"}

LABELS = {
    "tokens": {"endpoint", "user", "access"},
    "remote_tokens": set(),
    "refusals": {"endpoint", "cause"},
    "openid_lookup_seconds": {"where"},
    "openid_failures": {"where", "cause"},
    "sfu_request_seconds": {"method"},
    "sfu_failures": {"method", "cause"},
    "rooms_ensured": set(),
    "webhooks": {"event"},
    "webhooks_rejected": {"cause"},
    "delegations_accepted": set(),
    "delegations": {"phase"},
    "leaves": {"trigger"},
    "leave_seconds": set(),
    "leave_failures": {"cause"},
    "removal_seconds": {"cause"},
    "participants": set(),
    "rooms": set(),
    "last_poll_timestamp_seconds": set(),
}


def values_of_labels() -> dict[str, dict[str, set[str]]]:
    """The labels of every sample that Prometheus can get, with their values."""
    found: dict[str, dict[str, set[str]]] = {}
    for series in [*own_samples(), *(f'delegations{{phase="{phase.value}"}}' for phase in Phase)]:
        name, _, labels = series.partition("{")
        values = found.setdefault(PREFIX + name, {})
        for label, value in re.findall(r'(\w+)="([^"]*)"', labels):
            values.setdefault(label, set()).add(value)
    return found


SAMPLES = values_of_labels()


def expressions(where: Any) -> Iterator[str]:
    """All PromQL in a dashboard or a file of rules."""
    if isinstance(where, dict):
        for key, value in where.items():
            if key in ("expr", "query") and isinstance(value, str):
                yield value
            else:
                yield from expressions(value)
    elif isinstance(where, list):
        for value in where:
            yield from expressions(value)


PANELS = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
DASHBOARD_EXPRESSIONS = list(expressions(json.loads(DASHBOARD.read_text())))
RULE_EXPRESSIONS = list(expressions(yaml.safe_load(RULES.read_text())))


def problems(expression: str) -> list[str]:
    """The names in an expression that no metric has."""
    found = []
    for name, selector in re.findall(r"(synapse_lk_jwt_\w+)(?:\{([^}]*)\})?", expression):
        if name not in SAMPLES:
            found.append(f"there is no {name}")
            continue
        for label, operator, value in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', selector):
            if label in TARGET_LABELS:
                continue
            known = SAMPLES[name].get(label, set())
            values = value.split("|") if "~" in operator else [value]
            found += [f"{name} has no {label}={v}" for v in values if v not in known]
    labels = {label for name in SAMPLES if name in expression for label in SAMPLES[name]}
    for group in re.findall(r"\bby \(([^)]*)\)", expression):
        for label in filter(None, re.split(r"[, ]+", group)):
            if label not in labels | TARGET_LABELS:
                found.append(f"nothing in it has a label {label}")
    return found


def test_metrics_have_the_documented_labels() -> None:
    assert {metric._name[len(PREFIX) :]: set(metric._labelnames) for metric in METRICS} == LABELS


def test_metrics_label_values_are_those_that_the_code_counts() -> None:
    assert set(metrics.LEAVE_TRIGGERS) == {trigger.value for trigger in Trigger}
    assert get_args(RemovalCause) == metrics.REMOVAL_CAUSES


def test_metrics_are_in_the_registry_that_synapse_serves() -> None:
    names = [family.name for metric in METRICS for family in metric.collect()]
    registered = REGISTRY.restricted_registry([*SAMPLES]).collect()
    assert samples(registered).keys() == own_samples().keys()
    assert all(name.startswith(PREFIX) for name in names)


def test_metrics_have_a_bounded_number_of_series() -> None:
    # Buckets multiply. A process has some 2,300 series of Synapse's own.
    assert len(own_samples()) < 400


@pytest.mark.parametrize("expression", sorted({*DASHBOARD_EXPRESSIONS, *RULE_EXPRESSIONS}))
def test_expression_of_dashboard_or_alert_names_existing_series(expression: str) -> None:
    assert problems(expression) == []


@pytest.mark.parametrize(
    "wrong",
    [
        "synapse_lk_jwt_token_total",
        "synapse_lk_jwt_tokens_total_bucket",
        "synapse_lk_jwt_leave_seconds",
        'synapse_lk_jwt_refusals_total{cause="rate_limit"}',
        'synapse_lk_jwt_refusals_total{cause=~"sfu|nothing"}',
        'synapse_lk_jwt_refusals_total{reason="sfu"}',
        "sum by (instance, event) (rate(synapse_lk_jwt_tokens_total[5m]))",
    ],
)
def test_expression_with_unknown_name_is_found(wrong: str) -> None:
    assert problems(wrong) != []


@pytest.mark.parametrize("name", LABELS)
def test_metric_is_in_dashboard_and_documentation(name: str) -> None:
    assert any(f"{PREFIX}{name}" in expression for expression in DASHBOARD_EXPRESSIONS)
    assert re.search(rf"^\| `{name}(_total)?` \|", DOCS.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", SAMPLES)
def test_metric_label_values_are_in_the_documentation(name: str) -> None:
    values = {value for label, known in SAMPLES[name].items() if label != "le" for value in known}
    # These are LiveKit's own names.
    if "sfu_request" in name or "sfu_failures" in name or "webhooks_total" in name:
        values -= SAMPLES[name].get("method", set()) | SAMPLES[name].get("event", set())
    assert {value for value in values if f"`{value}`" not in DOCS.read_text()} == set()


def test_dashboard_has_two_variables_and_unique_panel_ids() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert [v["name"] for v in dashboard["templating"]["list"]] == ["datasource", "instance"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panel_has_description_unit_and_instance(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"]["uid"] == "${datasource}"
    for target in panel["targets"]:
        assert 'instance=~"$instance"' in target["expr"]
        grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"]))))
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= grouped


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_alert_has_description_and_documentation(alert: dict[str, Any]) -> None:
    assert f"| `{alert['alert']}` | {alert['labels']['severity']} |" in DOCS.read_text()
    assert alert["annotations"]["summary"]
    description = alert["annotations"]["description"]
    assert len(description) > 100
    for page, anchor in re.findall(r"docs/([\w-]+\.md)(?:#([\w-]+))?", description):
        headings = re.findall(r"^#+ (.*)$", (ROOT / "docs" / page).read_text(), re.MULTILINE)
        assert not anchor or anchor in {h.lower().replace(" ", "-") for h in headings}


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        missing_tool("promtool is missing: install Prometheus (Debian: apt install prometheus)")
    return found


@pytest.mark.parametrize(
    "command",
    [["check", "rules", RULES], ["test", "rules", Path(__file__).with_name("alerts.yml")]],
)
def test_alert_rules_pass_promtool(promtool: str, command: list[str | Path]) -> None:
    done = subprocess.run([promtool, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
