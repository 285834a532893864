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
from inferflux.config import env_name
from inferflux.policy.signature import KEY_FILE, PUBLIC_FILE, public_key
from inferflux.rpc.mtls import ROLES
from inferflux.worker.settings import WorkerSettings
from services.gateway.settings import Settings as GatewaySettings
from services.policy.__main__ import Settings as PolicySettings
from services.registry.__main__ import Settings as RegistrySettings
from tests.support.chart import CHART, OVERLAYS, SIM, of_kind, pods, rendered, template
from tests.support.fake_kube import pod_security, schema, semantics
from tests.support.kube_tools import tool
from tests.support.network_policy import allows, allows_outside

SETTINGS = {
    "gateway": GatewaySettings,
    "policy": PolicySettings,
    "registry": RegistrySettings,
    "prefill": WorkerSettings,
    "decode": WorkerSettings,
}
GRPC, OPS, HTTP, REDIS = 50051, 9090, 8080, 6379
WIRES = {
    ("gateway", "policy", GRPC),
    ("gateway", "registry", GRPC),
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


@pytest.mark.parametrize("overlay", ["laptop", "gpu", "ha"])
def test_pods_meet_the_restricted_standard(overlay: str) -> None:
    """All of them, with a read-only root and without a token of the API."""
    for name, pod in pods(overlay).items():
        hostless = copy.deepcopy(pod["spec"])
        assert list(pod_security.violations(hostless, "restricted")) == [], name
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert all(c["securityContext"]["readOnlyRootFilesystem"] for c in pod["spec"]["containers"]), name


def test_rdma_is_the_only_exception() -> None:
    """It takes IPC_LOCK for workers, and nothing else."""
    for name, pod in pods("rdma").items():
        violations = list(pod_security.violations(pod["spec"], "restricted"))
        role = component(pod)
        assert violations == ([f"unrestricted capabilities in container '{role}'"] * (role in {"prefill", "decode"})), (
            name
        )


@pytest.mark.parametrize("overlay", ["laptop", "gpu"])
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
                name = variable["name"].removesuffix("_FILE")
                if name.startswith("INFERFLUX_"):
                    assert name in {env_name(field) for field in fields.__dataclass_fields__}, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_process_gets_its_own_keys_and_no_others(overlay: str) -> None:
    """A role's certificate alone, and of the shared keys those that it uses; the CA's key goes to nobody."""
    wanted = {
        "gateway": {"pepper.key", "tenant.key", "snapshot.pub", "ops.token"},
        "policy": {"pepper.key", "snapshot.key", "ops.token", "redis.url", "api-keys"},
        "registry": {"ops.token", "redis.url"},
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
    """Those of a cluster on one machine, and the token of the operations port."""
    secrets = {s["metadata"]["name"]: s for s in of_kind("laptop", "Secret")}

    keys = {name: base64.b64decode(text) for name, text in secrets["t-inferflux-keys"]["data"].items()}
    assert keys.keys() == {*pki.SECRETS, PUBLIC_FILE, "ops.token"}
    assert {len(keys[name]) for name in pki.SECRETS} == {pki.SECRET_BYTES}
    assert keys[PUBLIC_FILE] == public_key(keys[KEY_FILE])
    assert {name.removeprefix("t-inferflux-tls-") for name in secrets if "-tls-" in name} == set(ROLES)


def test_grace_covers_the_drain() -> None:
    """No pod is killed before its drain may be over; a gateway's pause comes on top."""
    for name, pod in pods("gpu").items():
        if component(pod) in {"prefill", "decode", "gateway"}:
            env = {v["name"]: v.get("value") for v in pod["spec"]["containers"][0]["env"]}
            budget_s = float(env.get("INFERFLUX_DRAIN_BUDGET_S") or env["INFERFLUX_DRAIN_TIMEOUT_S"])
            hook = pod["spec"]["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {"seconds": 0})
            assert pod["spec"]["terminationGracePeriodSeconds"] >= budget_s + hook["seconds"] + 10, name


BAD: list[tuple[str, Any]] = [
    ("fullnameOverride", "Has Capitals"),
    ("logLevel", "LOUD"),
    ("ipv6", "yes"),
    ("images.tag", 1),
    ("images.registry", "ghcr.io"),
    ("images.pullPolicy", "Sometimes"),
    ("images.pullSecrets", "one"),
    ("images.gateway.repository", ""),
    ("gateway.replicas", 0),
    ("gateway.replicas", "two"),
    ("gateway.replcas", 2),
    ("gateway.drainSeconds", 0),
    ("gateway.preStopSeconds", -1),
    ("gateway.service.type", "ExternalName"),
    ("gateway.service.port", 70000),
    ("gateway.maxUnavailable", "half"),
    ("gateway.env", {"lower": "case"}),
    ("gateway.env.INFERFLUX_MAX_HEADERS", 5),
    ("gateway.autoscaling.targetCpuPercent", 200),
    ("gateway.resources.requests.cpu", "lots"),
    ("gateway.tolerations", [{"effect": "Never"}]),
    ("gateway.topologySpread", [{"maxSkew": 1}]),
    ("policy.replicas", 1.5),
    ("registry.priorityClassName", 7),
    ("tls.mode", "none"),
    ("tls.validityDays", 0),
    ("tls.rotation", 2),
    ("tls.issuer.kind", "Vault"),
    ("redis.mode", "cluster"),
    ("redis.external.port", 0),
    ("redis.external.cidrs", ["10.0.0.1"]),
    ("redis.bundled.persistence.size", "big"),
    ("podSecurity.runAsUser", 0),
    ("networkPolicy.enabled", "true"),
    ("networkPolicy.extraEgress.pods", []),
    ("telemetry.otlpEndpoint", "collector:4317"),
    ("telemetry.sampleRatio", 2),
    ("monitoring.interval", "often"),
    ("tests.timeoutSeconds", 1),
    ("secrets.existingSecret", "A_B"),
    ("pools", []),
    ("pools.0.name", "Main Pool"),
    ("pools.0.model", "a b"),
    ("pools.0.engine", "llama"),
    ("pools.0.dtype", "int4"),
    ("pools.0.transport", "pigeon"),
    ("pools.0.modelDigest", "abc"),
    ("pools.0.blockSize", -1),
    ("pools.0.prefill.replicas", -1),
    ("pools.0.prefill.kvArenaBytes", "32Gi"),
    ("pools.0.decode.kvArenaBytes", 67108864),
    ("pools.0.decode.kvCacheBytes", 1),
    ("pools.0.decode.threads", 0),
    ("pools.0.decode.drainSeconds", 0),
    ("pools.0.decode.engineArgs", "--x"),
    ("pools.0.decode.parallelism.tensor", 0),
    ("pools.0.decode.parallelism.executor", "threads"),
    ("policy.audit.size", "much"),
]
CROSSED: list[tuple[str, dict[str, Any]]] = [
    ("gateway.autoscaling.minReplicas", {"gateway": {"autoscaling": {"enabled": True, "minReplicas": 9}}}),
    ("redis.external.existingSecret", {"redis": {"mode": "external"}}),
    ("tls.issuer.name", {"tls": {"mode": "cert-manager"}}),
    ("tls.existingSecretPrefix", {"tls": {"mode": "secret"}}),
    ("tls.existingSecretPrefix", {"tls": {"existingSecretPrefix": "mine"}}),
]
CROSSED_POOL: list[tuple[str, dict[str, Any]]] = [
    ("pools[0].storage", {"engine": "vllm"}),
    ("pools[0].storage", {"engine": "vllm", "storage": {"claim": "a", "hostPath": "/b"}}),
    ("pools[0].sharedMemory", {"sharedMemory": {"claim": "a", "hostPath": "/b"}}),
    ("pools[0].transport", {"sharedMemory": None}),
    ("pools[0].decode.autoscaling.maxReplicas", {"decode.autoscaling": {"enabled": True, "minReplicas": 1}}),
    ("pools[0].prefill.parallelism.rayAuthSecret", {"prefill.parallelism": {"tensor": 2, "executor": "ray"}}),
    ("pools[0].decode.rollout", {"decode.rollout": {"maxSurge": 0, "maxUnavailable": 0}}),
]


def pool() -> dict[str, Any]:
    pools: list[dict[str, Any]] = yaml.safe_load((CHART / SIM).read_text())["pools"]
    return pools[0]


def changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return `values` with one of them, named by its path, set, or left out if it is None."""
    values = copy.deepcopy(values)
    *parents, last = path.split(".")
    place: Any = values
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
    place[last] = value
    if value is None:
        del place[last]
    return values


def refusal(extra: dict[str, Any]) -> str:
    done = template((SIM,), extra)
    assert done.returncode != 0, "taken"
    return done.stderr


@pytest.mark.parametrize(("path", "value"), BAD)
def test_bad_values_are_refused_by_name(path: str, value: Any) -> None:
    """The message has the path of the value as the schema gives it."""
    message = refusal(changed({"pools": [pool()]} if path.startswith("pools") else {}, path, value))
    *parents, last = path.split(".")

    assert f"/{path.replace('.', '/')}" in message or (
        f"'/{'/'.join(parents)}'" in message and f"'{last}' not allowed" in message
    )


@pytest.mark.parametrize(("field", "extra"), CROSSED)
def test_values_that_do_not_fit_together_are_refused_by_name(field: str, extra: dict[str, Any]) -> None:
    """What a schema can't say."""
    assert field in refusal(extra)


@pytest.mark.parametrize(("field", "changes"), CROSSED_POOL)
def test_pools_that_do_not_fit_together_are_refused_by_name(field: str, changes: dict[str, Any]) -> None:
    """With the number of the pool."""
    bad = pool()
    for path, value in changes.items():
        bad = changed(bad, path, value)

    assert f"{field}:" in refusal({"pools": [bad]})


def test_a_name_is_one_pool() -> None:
    """Two pools of a name would be one set of objects."""
    assert "pools[1].name" in refusal({"pools": [pool(), pool()]})
