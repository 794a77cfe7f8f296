# SPDX-License-Identifier: Apache-2.0
"""Reads the module's metrics, from a process over HTTP or from this process."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from synapse_lk_jwt import metrics
from testbed.http import http

PREFIX = "synapse_lk_jwt_"
METRICS: tuple[Counter | Gauge | Histogram, ...] = tuple(
    metric for metric in vars(metrics).values() if isinstance(metric, (Counter, Gauge, Histogram))
)


def scrape(client_url: str) -> dict[str, float]:
    """The module's samples from the metrics listener of a Synapse process. See `samples`."""
    answer = http("GET", f"{client_url}/_synapse/metrics")
    assert answer.status == 200, answer
    return samples(text_string_to_metric_families(answer.body.decode("utf-8")))


def own_samples() -> dict[str, float]:
    """The module's samples in this process. See `samples`."""
    return samples(family for metric in METRICS for family in metric.collect())


def samples(families: Iterable[Metric]) -> dict[str, float]:
    """The module's samples by `name{label="value",…}`, without the prefix of the name."""
    found = {}
    for family in families:
        for sample in family.samples:
            # Older versions of the client also export when each series began.
            if sample.name.startswith(PREFIX) and not sample.name.endswith("_created"):
                labels = ",".join(
                    f'{name}="{sample.labels[name]}"' for name in sorted(sample.labels)
                )
                name = sample.name[len(PREFIX) :]
                found[f"{name}{{{labels}}}" if labels else name] = sample.value
    return found
