"""Alerts and dashboards ask for metrics that exist, by labels that these have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

import promql_parser as promql
import pytest
import yaml

from inferflux.telemetry import metrics
from tests.support.chart import CHART, of_kind

SUFFIXES = ("_total", "_bucket", "_sum", "_count")
TARGET_LABELS = {"namespace", "pod"}
"""What Prometheus adds to each series by itself."""


def known() -> dict[str, set[str]]:
    """The labels of each metric, by the name of its family."""
    collectors = [value for value in vars(metrics).values() if hasattr(value, "_labelnames")]
    return {collector._name: set(collector._labelnames) for collector in collectors}


def family(series: str, families: dict[str, set[str]]) -> str | None:
    return next((name for suffix in ("", *SUFFIXES) if (name := series.removesuffix(suffix)) in families), None)


def nodes(expression: str) -> list[Any]:
    """Parse PromQL; all its nodes. Raises ValueError for what Prometheus would not take."""
    found: list[Any] = []
    promql.walk(promql.parse(expression), found.append)
    return found


def complaints(expression: str) -> Iterator[str]:
    """What an expression asks for and nobody gives."""
    families = known()
    all_nodes = nodes(expression)
    selectors = [node for node in all_nodes if isinstance(node, promql.VectorSelector)]
    available = set(TARGET_LABELS)
    for selector in selectors:
        name = family(selector.name, families)
        own = TARGET_LABELS | (families[name] | {"le"} if name else set())
        available |= own
        if name is None:
            yield f"no metric {selector.name}"
        yield from (f"{selector.name} has no {m.name}" for m in selector.matchers.matchers if m.name not in own)
    if not selectors:
        yield "no metric at all"
    grouped = chain.from_iterable(
        n.modifier.labels for n in all_nodes if isinstance(n, promql.AggregateExpr) and n.modifier
    )
    yield from (f"no label {label}" for label in grouped if label not in available)


def dashboards() -> dict[str, dict[str, Any]]:
    """The documents that Grafana gets, by file."""
    maps = [value["data"] for value in of_kind("ha", "ConfigMap")]
    files = {name: text for data in maps for name, text in data.items() if name.startswith("inferflux-")}
    return {name: json.loads(text) for name, text in files.items()}


def queries(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in dashboard["panels"]:
        yield from panel["targets"]


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("rate(inferflux_request_total[5m])", "no metric inferflux_request_total"),
        ('rate(inferflux_requests_total{status="500"}[5m])', "inferflux_requests_total has no status"),
        ("sum by (model) (inferflux_inflight)", "no label model"),
        ("vector(1)", "no metric at all"),
    ],
)
def test_what_nobody_gives_is_found(expression: str, complaint: str) -> None:
    """The check of the other tests here finds what it is for."""
    assert complaint in list(complaints(expression))


def test_alerts_ask_for_what_there_is() -> None:
    """Each also says what happened and how bad it is."""
    rules = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())["groups"][0]["rules"]
    for rule in rules:
        assert list(complaints(rule["expr"])) == [], rule["alert"]
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"].keys() == {"summary", "description"}


def test_dashboards_ask_for_what_there_is() -> None:
    """One namespace each, by labels that their legends may name."""
    for name, dashboard in dashboards().items():
        for query in queries(dashboard):
            expression = query["expr"].replace("$__rate_interval", "5m")
            assert list(complaints(expression)) == [], (name, expression)
            selectors = [node for node in nodes(expression) if isinstance(node, promql.VectorSelector)]
            assert all("$namespace" in {m.value for m in s.matchers.matchers} for s in selectors), expression
            kept = {label for n in nodes(expression) if isinstance(n, promql.AggregateExpr) for label in labels(n)}
            assert set(re.findall(r"{{(\w+)}}", query["legendFormat"])) <= kept, query


def labels(aggregate: Any) -> list[str]:
    return aggregate.modifier.labels if aggregate.modifier else []


def test_dashboards_are_what_grafana_takes() -> None:
    """Apart from each other, with panels that do not overlap, found by the label that its sidecar looks for."""
    found = dashboards()
    assert len({dashboard["uid"] for dashboard in found.values()}) == len(found) == 3
    for name, dashboard in found.items():
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
        assert len(set(places)) == len(places)
        assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)
        variables = {variable["name"] for variable in dashboard["templating"]["list"]}
        assert set(re.findall(r"\$\{?([a-z]+)", json.dumps(dashboard))) == variables
        owner = next(value for value in of_kind("ha", "ConfigMap") if name in value["data"])
        assert owner["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_each_process_is_asked_by_one_monitor() -> None:
    """Workers by the pods', the rest by the services'; both at a port that pods have, with the token."""
    components: list[str] = []
    for kind, endpoints, port in (
        ("PodMonitor", "podMetricsEndpoints", "port"),
        ("ServiceMonitor", "endpoints", "targetPort"),
    ):
        (monitor,) = of_kind("ha", kind)
        (expression,) = monitor["spec"]["selector"]["matchExpressions"]
        components += expression["values"]
        (endpoint,) = monitor["spec"][endpoints]
        assert endpoint[port] == "ops"
        assert endpoint["authorization"]["credentials"]["key"] == "ops.token"

    assert sorted(components) == ["decode", "gateway", "policy", "prefill", "registry"]
    services = {value["metadata"]["labels"]["app.kubernetes.io/component"] for value in of_kind("ha", "Service")}
    assert services == {"gateway", "policy", "registry"}
