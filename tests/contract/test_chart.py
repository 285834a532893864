"""The Helm chart, rendered: what it promises can be read off its objects, and what it can't do it refuses by name."""

from __future__ import annotations

import base64
import copy
import json
import subprocess
from typing import Any

import pytest
import yaml

from inferflux import pki
from inferflux.config import FILE_SUFFIX, env_name
from inferflux.policy.signature import KEY_FILE, PUBLIC_FILE, public_key
from inferflux.rpc.mtls import ROLES
from inferflux.worker.settings import WorkerSettings
from services.gateway.settings import Settings as GatewaySettings
from services.guardrails.__main__ import Settings as GuardrailSettings
from services.policy.__main__ import Settings as PolicySettings
from services.registry.__main__ import Settings as RegistrySettings
from services.registry.planner.spec import PoolSpec
from tests.support.chart import CHART, OVERLAYS, SIM, of_kind, pods, pool, rendered, template
from tests.support.fake_kube import pod_security, schema, semantics
from tests.support.kube_tools import tool
from tests.support.network_policy import allows, allows_outside

SETTINGS = {
    "gateway": GatewaySettings,
    "policy": PolicySettings,
    "registry": RegistrySettings,
    "guardrails": GuardrailSettings,
    "prefill": WorkerSettings,
    "decode": WorkerSettings,
}
GRPC, OPS, HTTP, REDIS = 50051, 9090, 8080, 6379
WIRES = {
    ("gateway", "policy", GRPC),
    ("gateway", "registry", GRPC),
    ("gateway", "guardrails", GRPC),
    ("gateway", "prefill", GRPC),
    ("gateway", "decode", GRPC),
    ("prefill", "registry", GRPC),
    ("decode", "registry", GRPC),
    ("decode", "prefill", GRPC),
    ("policy", "redis", REDIS),
    ("registry", "redis", REDIS),
    ("test", "gateway", HTTP),
}


def component(value: dict[str, Any]) -> str:
    return str(value["metadata"]["labels"]["app.kubernetes.io/component"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_overlay_renders_to_objects_that_kubernetes_takes(overlay: str) -> None:
    """By the published schema, strictly, and by what an API server checks beyond it."""
    for value in rendered(overlay):
        schema.check(copy.deepcopy(value), is_strict=True)
        semantics.check(copy.deepcopy(value), None)


def test_lint_is_strict_and_silent() -> None:
    """Helm finds nothing to warn of."""
    command = [str(tool("helm")), "lint", "--strict", "--quiet", str(CHART), "--values", str(CHART / SIM)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("overlay", ["laptop", "guardrails", "gpu", "ha"])
def test_pods_meet_the_restricted_standard(overlay: str) -> None:
    """All of them, with a read-only root, and only a planner that acts has a token of the API."""
    for name, pod in pods(overlay).items():
        hostless = copy.deepcopy(pod["spec"])
        assert list(pod_security.violations(hostless, "restricted")) == [], name
        is_planner = overlay == "ha" and component(pod) == "registry"
        assert pod["spec"]["automountServiceAccountToken"] is is_planner
        assert all(c["securityContext"]["readOnlyRootFilesystem"] for c in pod["spec"]["containers"]), name


def test_rdma_is_the_only_exception() -> None:
    """It takes IPC_LOCK for workers, and nothing else."""
    for name, pod in pods("rdma").items():
        violations = list(pod_security.violations(pod["spec"], "restricted"))
        role = component(pod)
        assert violations == ([f"unrestricted capabilities in container '{role}'"] * (role in {"prefill", "decode"})), (
            name
        )


@pytest.mark.parametrize("overlay", ["laptop", "guardrails", "gpu"])
def test_nobody_may_connect_but_who_must(overlay: str) -> None:
    """The wires of the cluster are allowed, all others denied; workers reach nothing outside."""
    policies = of_kind(overlay, "NetworkPolicy")
    labels = {component(pod): pod["metadata"]["labels"] for pod in pods(overlay).values()}
    workers = {"prefill", "decode"}
    for source, own in labels.items():
        for target, other in labels.items():
            for port in (GRPC, HTTP, REDIS):
                is_nixl = overlay == "gpu" and {source, target} == workers
                # Clients come from anywhere, so from our pods too, if their own egress lets them.
                expected = (source, target, port) in WIRES or is_nixl
                assert allows(policies, own, other, port) == expected, (source, target, port)
            assert not allows(policies, own, other, OPS) or {source, target} == workers
        for port in (443, GRPC, REDIS):
            assert not allows_outside(policies, own, port), (source, port)


def test_settings_are_those_that_processes_read() -> None:
    """No variable is misspelt: each is a field of the process's settings, or read elsewhere by name."""
    for overlay in OVERLAYS:
        for pod in pods(overlay).values():
            fields = SETTINGS.get(component(pod))
            for variable in pod["spec"]["containers"][0].get("env", ()) if fields else ():
                known = {
                    env_name(field) + suffix for field in fields.__dataclass_fields__ for suffix in ("", FILE_SUFFIX)
                }
                assert variable["name"] in known or not variable["name"].startswith("INFERFLUX_"), variable


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_process_gets_its_own_keys_and_no_others(overlay: str) -> None:
    """A role's certificate alone, and of the shared keys those that it uses; the CA's key goes to nobody."""
    wanted = {
        "gateway": {"pepper.key", "tenant.key", "snapshot.pub", "ops.token"},
        "policy": {"pepper.key", "snapshot.key", "store.key", "ops.token", "redis.url", "api-keys"},
        "registry": {"ops.token", "redis.url"},
        "guardrails": {"ops.token"},
        "prefill": {"ticket.key", "ops.token"},
        "decode": {"ticket.key", "ops.token"},
    }
    for pod in pods(overlay).values():
        role = component(pod)
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert "-ca" not in json.dumps(volumes.get("pki", {}))
        if role in wanted:
            sources = volumes["secrets"]["projected"]["sources"]
            assert {item["path"] for s in sources for item in s["secret"]["items"]} == wanted[role]
            assert {item["path"] for item in volumes["pki"]["secret"]["items"]} == {
                "ca.crt",
                f"{role}.crt",
                f"{role}.key",
            }


def test_the_chart_makes_all_keys_and_certificates() -> None:
    """Those of a cluster on one machine, and the token of the operations port; it starts no guardrail workers."""
    secrets = {s["metadata"]["name"]: s for s in of_kind("laptop", "Secret")}

    keys = {name: base64.b64decode(text) for name, text in secrets["t-inferflux-keys"]["data"].items()}
    assert keys.keys() == {*pki.SECRETS, PUBLIC_FILE, "ops.token"}
    assert {len(keys[name]) for name in pki.SECRETS} == {pki.SECRET_BYTES}
    assert keys[PUBLIC_FILE] == public_key(keys[KEY_FILE])
    assert {name.removeprefix("t-inferflux-tls-") for name in secrets if "-tls-" in name} == {*ROLES} - {"guardrails"}


def test_grace_covers_the_drain() -> None:
    """No pod is killed before its drain may be over; a gateway's pause comes on top."""
    for name, pod in pods("gpu").items():
        if component(pod) in {"prefill", "decode", "gateway"}:
            env = {v["name"]: v.get("value") for v in pod["spec"]["containers"][0]["env"]}
            budget_s = float(env.get("INFERFLUX_DRAIN_BUDGET_S") or env["INFERFLUX_DRAIN_TIMEOUT_S"])
            hook = pod["spec"]["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {"seconds": 0})
            assert pod["spec"]["terminationGracePeriodSeconds"] >= budget_s + hook["seconds"] + 10, name


def test_a_planner_that_acts_may_do_no_more_than_it_must() -> None:
    """It scales the pools it was told of, marks pods and holds its lease; its specs are what the registry reads."""
    planned = {**pool(), "prefill": {**pool()["prefill"], "planner": {"mode": "act", "maxReplicas": 5, "sloMs": 900}}}
    done = template((SIM,), {"planner": {"mode": "kubernetes"}, "pools": [planned]})
    objects = [value for value in yaml.safe_load_all(done.stdout) if value]
    rules = next(value for value in objects if value["kind"] == "Role")["rules"]
    text = next(v for v in objects if v["metadata"]["name"] == "t-inferflux-pools")["data"]["pools.json"]
    specs = [PoolSpec.from_json(item) for item in json.loads(text)]
    target = next(
        v for v in objects if v["metadata"]["name"] == "t-inferflux-sim-prefill" and v["kind"] == "Deployment"
    )

    assert [(spec.name, spec.target, spec.max_replicas, spec.slo_ms) for spec in specs] == [
        ("prefill/sim-model", "deployment/t-inferflux-sim-prefill", 5, 900)
    ]
    assert "replicas" not in target["spec"]
    allowed = {(rule["resources"][0], verb): rule.get("resourceNames") for rule in rules for verb in rule["verbs"]}
    assert allowed == {
        ("deployments/scale", "get"): ["t-inferflux-sim-prefill"],
        ("deployments/scale", "patch"): ["t-inferflux-sim-prefill"],
        ("pods", "patch"): None,
        ("leases", "get"): ["inferflux-planner"],
        ("leases", "update"): ["inferflux-planner"],
        ("leases", "create"): None,
    }
