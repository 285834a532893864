"""checkov finds nothing in the chart but what is meant to be so, and each of that has its reason here."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.chart import OVERLAYS, rendered

PACKAGES = Path(sys.executable).parents[1] / "checkov"
NAMESPACE = "inferflux"
EVERYWHERE = ""
# Check -> what it may find fault with (the end of a workload's name), and why that stays.
ACCEPTED = {
    "CKV_K8S_11": (
        EVERYWHERE,
        "a CPU limit stops an event loop or an engine for the rest of each period; requests share the CPU",
    ),
    "CKV_K8S_15": (
        EVERYWHERE,
        "tags are versions, which do not move; asking the registry at each start would make it a part of recovery",
    ),
    "CKV_K8S_43": (
        EVERYWHERE,
        "digests belong to the registry that images were pushed to: images.*.digest and redis.bundled.image take them",
    ),
    "CKV_K8S_8": ("-test", "the pod of helm test ends by itself, and has a deadline"),
    "CKV_K8S_9": ("-test", "nobody connects to the pod of helm test"),
    "CKV_K8S_25": (
        "-main-prefill -main-decode",
        "rdma.enabled only: registering memory with the network card takes IPC_LOCK",
    ),
    "CKV_K8S_38": ("-registry", "planner.mode kubernetes only: the planner scales pools, with a role for just that"),
}


def installed(value: dict[str, Any]) -> dict[str, Any]:
    """The object as Helm creates it: in the namespace of the release."""
    value = copy.deepcopy(value)
    value["metadata"]["namespace"] = NAMESPACE
    return value


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All failed checks of all overlays. It looks at files only, and asks nobody."""
    assert (PACKAGES / ".ready").exists(), "make helm-tools installs checkov"
    directory = tmp_path_factory.mktemp("manifests")
    for overlay in OVERLAYS:
        objects = [installed(value) for value in rendered(overlay)]
        (directory / f"{overlay}.yaml").write_text(yaml.safe_dump_all(objects))
    options = ["--framework", "kubernetes", "--skip-download", "--compact", "--quiet", "--output", "json"]
    done = subprocess.run(
        [sys.executable, "-m", "checkov.main", "--directory", str(directory), *options],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env={**os.environ, "PYTHONPATH": str(PACKAGES)},
    )
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 1000
    return list(report["results"]["failed_checks"])


def is_accepted(finding: dict[str, Any]) -> bool:
    names = ACCEPTED.get(finding["check_id"], ("-none",))[0]
    return finding["resource"].endswith(tuple(names.split(" ")))


@pytest.mark.timeout(120)
def test_nothing_is_found_but_what_is_meant(findings: list[dict[str, Any]]) -> None:
    """In any overlay."""
    others = [finding for finding in findings if not is_accepted(finding)]

    assert [(f["check_id"], f["check_name"], f["file_path"], f["resource"]) for f in others] == []


@pytest.mark.timeout(120)
def test_nothing_is_accepted_that_is_not_found(findings: list[dict[str, Any]]) -> None:
    """A reason goes when what it excuses is gone."""
    assert {finding["check_id"] for finding in findings} == ACCEPTED.keys()
