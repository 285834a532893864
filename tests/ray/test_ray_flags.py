"""The chart's Ray commands are such that Ray takes them."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from tests.support.chart import of_kind

pytestmark = pytest.mark.timeout(120)

PARSE = "import sys; from ray.scripts.scripts import start; print(start.make_context('start', sys.argv[1:]).params)"


def test_ray_knows_each_flag_of_the_chart() -> None:
    """Of heads and of the other nodes; parsed by Ray's own command, not run."""
    spec = of_kind("ray", "RayCluster")[0]["spec"]
    for template in (spec["headGroupSpec"]["template"], spec["workerGroupSpecs"][0]["template"]):
        command = template["spec"]["containers"][0]["args"][0].partition(" && ")[0].removeprefix("exec ")
        ray, start, *flags = shlex.split(command)
        assert (ray, start) == ("ray", "start")
        done = subprocess.run(
            [sys.executable, "-c", PARSE, *flags], capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "'num_gpus': 8" in done.stdout
