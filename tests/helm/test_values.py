"""What the chart can't do it refuses, by the name of the value."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.support.chart import SIM, pool, template

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
    ("guardrails.kinds", []),
    ("guardrails.enabled", "yes"),
    ("images.gateway.digest", "sha256:1"),
    ("monitoring.dashboards.labels", ["grafana"]),
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
    ("pools[0].prefill.planner.mode", {"prefill.planner": {"mode": "act"}}),
    ("pools[0].decode.rollout", {"decode.rollout": {"maxSurge": 0, "maxUnavailable": 0}}),
]


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
