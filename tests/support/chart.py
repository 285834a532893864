"""Renders the chart as an operator would, without a cluster."""

from __future__ import annotations

import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.support.kube_tools import tool

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "inferflux"
SIM = "ci/sim-values.yaml"
OVERLAYS = {
    "laptop": ("values-laptop.yaml", SIM),
    "guardrails": ("values-laptop.yaml", SIM, "ci/guardrails-values.yaml"),
    "gpu": ("values-gpu.yaml",),
    "rdma": ("values-gpu.yaml", "values-rdma.yaml"),
    "ha": ("values-gpu.yaml", "values-ha.yaml"),
}
TIMEOUT_S = 60


def template(values: tuple[str, ...], extra: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `helm template` with value files of the chart and more values."""
    command = [str(tool("helm")), "template", "t", str(CHART), "--namespace", "ns"]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(extra or {}, file)
        file.flush()
        for name in [*(CHART / value for value in values), file.name]:
            command += ["--values", str(name)]
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@cache
def rendered(overlay: str) -> tuple[dict[str, Any], ...]:
    """All objects of the chart with an overlay. Shared: don't change them."""
    done = template(OVERLAYS[overlay])
    assert done.returncode == 0, done.stderr
    return tuple(value for value in yaml.safe_load_all(done.stdout) if value)


def of_kind(overlay: str, *kinds: str) -> list[dict[str, Any]]:
    return [value for value in rendered(overlay) if value["kind"] in kinds]


def pods(overlay: str) -> dict[str, dict[str, Any]]:
    """The pod templates of all workloads and tests, by name."""
    templates = {v["metadata"]["name"]: v["spec"]["template"] for v in of_kind(overlay, "Deployment", "StatefulSet")}
    return templates | {value["metadata"]["name"]: value for value in of_kind(overlay, "Pod")}


def pool() -> dict[str, Any]:
    """The pool that simulates."""
    pools: list[dict[str, Any]] = yaml.safe_load((CHART / SIM).read_text())["pools"]
    return pools[0]
