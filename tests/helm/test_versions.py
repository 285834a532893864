"""The chart's objects are those of every Kubernetes that it says it runs on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.chart import CHART, OVERLAYS, rendered

VERSIONS = [f"1.{minor}.0" for minor in range(30, 38)]
CUSTOM = {"Certificate", "PodMonitor", "PrometheusRule", "ServiceMonitor"}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("version", VERSIONS)
def test_objects_fit_the_schemas_of_each_version(version: str, tmp_path: Path) -> None:
    """Strictly: no field is unknown, in any overlay."""
    known = [value for overlay in OVERLAYS for value in rendered(overlay) if value["kind"] not in CUSTOM]
    # One of each kind and component is enough: overlays repeat the rest.
    unique = {yaml.safe_dump({**value, "metadata": {"name": value["metadata"]["name"]}}): value for value in known}
    file = tmp_path / "objects.yaml"
    file.write_text(yaml.safe_dump_all(unique.values()))
    command = [str(Path(sys.executable).parent / "kubernetes-validate"), "--strict", "--kubernetes-version", version]
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, timeout=110, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARN" not in done.stdout + done.stderr
    assert f"against version {version.rpartition('.')[0]}" in done.stdout


def test_the_chart_says_which_versions(tmp_path: Path) -> None:
    """The oldest that is tested is the oldest that it takes."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())

    assert chart["kubeVersion"] == f">={VERSIONS[0]}-0"
