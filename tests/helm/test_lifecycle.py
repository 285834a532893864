"""What an operator does with the chart, from the first install to the end, while clients never stop.

Each test goes on where the one before ended. Runs on a fake cluster that starts the pods as processes of this machine,
or on the one that KUBECONFIG names; then INFERFLUX_TEST_VALUES names more values, e.g. with the images.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helm.cluster import CHART, CLAIM, Cluster, cluster, containers, until
from tests.helm.sockets import listening

pytestmark = [pytest.mark.timeout(300)]
RELEASE, MODEL = "t", "sim-model"
FULL = f"{RELEASE}-inferflux"
COMPONENTS = ("gateway", "policy", "registry", "prefill", "decode")
OPS = 9090
WAIT_S = 120.0
GUARDRAILS = ("--values", str(CHART / "ci" / "guardrails-values.yaml"))


@dataclass
class Load:
    """The clients' pod and its output."""

    log: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def kube() -> Iterator[Cluster]:
    with cluster(f"ifx-test-{os.getpid()}", os.environ.get("KUBECONFIG", "")) as found:
        found.apply(CLAIM)
        yield found


@pytest.fixture(scope="module")
def values() -> list[str]:
    files = [CHART / "values-laptop.yaml", CHART / "ci" / "sim-values.yaml"]
    files += [Path(name) for name in os.environ.get("INFERFLUX_TEST_VALUES", "").split(",") if name]
    return [part for file in files for part in ("--values", str(file))]


@pytest.fixture(scope="module")
def load(kube: Cluster) -> Iterator[Load]:
    """Run the clients from the first test that asks for them to the one that ends them."""
    kube.apply(*_load_pod(kube))
    until(lambda: kube.get("pod", "load")["status"].get("phase") == "Running", WAIT_S, lambda: "no load")
    running = Load(kube.follow_log("load"))
    yield running
    running.log.kill()
    running.log.communicate()


def test_install_waits_for_a_cluster_that_answers(kube: Cluster, values: list[str]) -> None:
    """`helm install --wait` returns when all is ready; nothing had to be restarted for that."""
    began_at = time.monotonic()
    kube.helm("install", RELEASE, str(CHART), *values, "--wait", "--timeout", "120s")
    until(lambda: _first_token(kube), WAIT_S, lambda: "no token")
    elapsed_s = time.monotonic() - began_at
    pods = kube.pods()
    slowest_s = max(_startup_s(pod) for pod in pods)
    print(f"install to first token: {elapsed_s:.1f} s; slowest pod from its creation to ready: {slowest_s:.0f} s")

    assert {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods} >= set(COMPONENTS)
    assert all(pod["status"]["containerStatuses"][0]["restartCount"] == 0 for pod in pods)


def test_helm_test_generates_text_through_both_pools(kube: Cluster) -> None:
    """The chart's own test passes, and says that KV was read."""
    output = kube.helm("test", RELEASE, "--logs", "--timeout", "120s")

    assert f"ok {MODEL}" in output
    assert f"of KV went from {FULL}-sim-prefill" in output


def test_nothing_listens_but_what_the_chart_says(kube: Cluster) -> None:
    """Each pod has the ports of its manifest, at its own address; metrics are for those who show the token."""
    if not kube.is_fake:
        return  # only here are a pod's sockets ours to see
    pods = [pod for pod in kube.pods() if pod["status"]["phase"] == "Running"]
    wanted = {
        (pod["status"]["podIP"], port["containerPort"])
        for pod in pods
        for container in pod["spec"]["containers"]
        for port in container["ports"]
    }
    assert listening(containers(kube.directory)) == wanted

    for address in {address for address, port in wanted if port == OPS}:
        assert _scrape(address, "wrong").status_code == 401
        assert "inferflux_" in _metrics(kube, address)


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_each_pool_scales_by_itself(kube: Cluster, load: Load, role: str) -> None:
    """Two workers, then one again: the other pool does not move."""
    other = {"decode": "prefill", "prefill": "decode"}[role]
    others = _names(kube.pods(other))
    _scale(kube, f"{FULL}-sim-{role}", 2)
    assert len(_ready(kube, role)) == 2
    _scale(kube, f"{FULL}-sim-{role}", 1)
    until(lambda: len(kube.pods(role)) == 1, WAIT_S, lambda: f"not drained: {_names(kube.pods(role))}")

    assert _names(kube.pods(other)) == others


def test_certificates_and_pools_change_without_a_restart(kube: Cluster, load: Load, values: list[str]) -> None:
    """An upgrade restarts nothing: processes talk with new certificates, and the planner knows of a pool."""
    before, certificate = _uids(kube), _certificate(kube)
    changes = ["--set-string", "tls.rotation=2", "--set", "pools[0].decode.planner.maxReplicas=3"]
    kube.helm("upgrade", RELEASE, str(CHART), *values, *changes, "--wait")
    until(lambda: _pools_read(kube) == [["decode/sim-model"]], WAIT_S, lambda: f"pools read: {_pools_read(kube)}")
    assert _certificate(kube) != certificate
    assert _uids(kube) == before
    _scale(kube, f"{FULL}-sim-decode", 2)
    _scale(kube, f"{FULL}-sim-decode", 1)


def test_guardrail_workers_come_and_judge(kube: Cluster, load: Load, values: list[str]) -> None:
    """An upgrade brings them, and gateways that ask them."""
    kube.helm("upgrade", RELEASE, str(CHART), *values, *GUARDRAILS, "--wait", "--timeout", "120s")
    assert len(_ready(kube, "guardrails")) == 1
    if kube.is_fake:
        rule = {"name": "rude", "kind": "profanity", "action": "block", "deadline_ms": 2000}
        body = {"text": "you stupid asshole, go to hell", "guardrails": {"rules": [rule]}}
        until(
            lambda: _try_guardrails(kube, body)["action"] == "block", WAIT_S, lambda: str(_try_guardrails(kube, body))
        )


def test_green_pools_take_over_from_blue_ones(kube: Cluster, load: Load, values: list[str]) -> None:
    """Workers of two kinds serve one model side by side, then green ones alone; a rollback brings the others back."""
    both = [*values, "--values", str(CHART / "ci" / "green-values.yaml")]
    no_blue = [part for role in ("prefill", "decode") for part in ("--set", f"pools[0].{role}.replicas=0")]
    kube.helm("upgrade", RELEASE, str(CHART), *both, "--wait", "--timeout", "120s")
    assert len(_ready(kube, "decode")) == 2
    kube.helm("upgrade", RELEASE, str(CHART), *both, *no_blue, "--wait", "--timeout", "120s")
    _settle(kube)
    assert {pod["metadata"]["labels"]["inferflux.io/pool"] for pod in kube.pods("decode")} == {"green"}
    assert f"of KV went from {FULL}-green-prefill" in kube.helm("test", RELEASE, "--logs", "--timeout", "120s")

    kube.helm("rollback", RELEASE, "--wait", "--timeout", "120s")
    kube.helm("upgrade", RELEASE, str(CHART), *values, "--wait", "--timeout", "120s")
    _settle(kube)
    assert {pod["metadata"]["labels"]["inferflux.io/pool"] for pod in kube.pods("decode")} == {"sim"}


def test_upgrade_replaces_every_pod(kube: Cluster, load: Load, values: list[str]) -> None:
    """All of ours are new afterwards; meanwhile KV passes only between workers of the same blocks."""
    before = _uids(kube)
    changed = [f"{c}.podAnnotations.release" for c in ("gateway", "policy", "registry")]
    changed += [f"pools[0].{role}.podAnnotations.release" for role in ("prefill", "decode")]
    options = [part for name in changed for part in ("--set-string", f"{name}=new")]
    options += ["--set", "pools[0].blockSize=32"]
    kube.helm("upgrade", RELEASE, str(CHART), *values, *options, "--wait", "--timeout", "180s")
    _settle(kube)

    assert not _uids(kube) & before
    assert f"of KV went from {FULL}-sim-prefill" in kube.helm("test", RELEASE, "--logs", "--timeout", "120s")
    if kube.is_fake:
        (decode,) = kube.pods("decode")
        assert 'inferflux_kv_rejected_total{reason="fingerprint"}' not in _metrics(kube, decode["status"]["podIP"])


def test_rollback_replaces_every_pod_again(kube: Cluster, load: Load) -> None:
    """The former templates are back, as new pods."""
    before = _uids(kube)
    kube.helm("rollback", RELEASE, "--wait", "--timeout", "180s")
    _settle(kube)

    assert not _uids(kube) & before


def test_no_request_failed_meanwhile(kube: Cluster, load: Load) -> None:
    """From the first scaling to the rollback each request was answered in full."""
    kube.kubectl("delete", "pod", "load", "--wait=false")
    output, _ = load.log.communicate(timeout=WAIT_S)
    summary = json.loads(output.strip().splitlines()[-1])
    print(f"load: {summary}")

    assert summary["failed"] == 0, summary["failures"]
    assert summary["ok"] > 50


def test_uninstall_leaves_nothing(kube: Cluster) -> None:
    """No object, no pod, no process."""
    kube.helm("uninstall", RELEASE, "--wait", "--timeout", "120s")
    kube.kubectl("delete", "pod", f"{FULL}-test")  # helm leaves the pods of tests, for their logs
    until(lambda: not kube.get("pods")["items"], WAIT_S, lambda: f"left: {_names(kube.get('pods')['items'])}")
    kinds = "deployments,statefulsets,services,secrets,configmaps,serviceaccounts,networkpolicies,poddisruptionbudgets"
    left = [item["metadata"]["name"] for item in kube.get(kinds)["items"]]

    assert [name for name in left if "inferflux" in name] == []
    assert not kube.is_fake or not containers(kube.directory)


def _load_pod(kube: Cluster) -> list[dict[str, Any]]:
    """Clients in a pod of the gateway's image: it has Python, and where it runs names are known."""
    gateway = kube.pods("gateway")[0]["spec"]
    script = (Path(__file__).parent / "load.py").read_text()
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "load"}, "data": {"load.py": script}}
    key = {"secretKeyRef": {"name": f"{FULL}-api-keys", "key": "key"}}
    env = [{"name": n, "value": v} for n, v in (("LOAD_HOST", FULL), ("LOAD_PORT", "80"), ("LOAD_MODEL", MODEL))]
    container = {
        "name": "load",
        "image": gateway["containers"][0]["image"],
        "command": ["python", "/load/load.py"],
        "env": [*env, {"name": "LOAD_KEY", "valueFrom": key}],
        "securityContext": gateway["containers"][0]["securityContext"],
        "volumeMounts": [{"name": "load", "mountPath": "/load", "readOnly": True}],
    }
    spec = {
        "automountServiceAccountToken": False,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 90,
        "securityContext": gateway["securityContext"],
        "containers": [container],
        "volumes": [{"name": "load", "configMap": {"name": "load"}}],
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "load"}, "spec": spec}
    return [config, pod]


def _scrape(address: str, token: str) -> httpx.Response:
    return httpx.get(f"http://{address}:{OPS}/metrics", headers={"authorization": f"Bearer {token}"}, timeout=10)


def _metrics(kube: Cluster, address: str) -> str:
    token = base64.b64decode(kube.get("secret", f"{FULL}-keys")["data"]["ops.token"]).decode()
    return _scrape(address, token).text


def _try_guardrails(kube: Cluster, body: dict[str, Any]) -> Any:
    key = base64.b64decode(kube.get("secret", f"{FULL}-api-keys")["data"]["key"]).decode()
    url = f"http://{kube.get('service', FULL)['spec']['clusterIP']}/v1/admin/guardrails/test"
    return httpx.post(url, json=body, headers={"authorization": f"Bearer {key}"}, timeout=10).raise_for_status().json()


def _pools_read(kube: Cluster) -> list[list[str]]:
    """The pools that the registry has read from its file, each time that it did, but for none."""
    lines = [json.loads(line) for line in kube.kubectl("logs", f"deployment/{FULL}-registry").splitlines()]
    return [line["pools"] for line in lines if line.get("pools")]


def _first_token(kube: Cluster) -> bool:
    return kube.helm("test", RELEASE, "--timeout", "60s") != ""


def _startup_s(pod: dict[str, Any]) -> float:
    """Seconds from a pod's creation to its readiness."""
    ready = next(c for c in pod["status"]["conditions"] if c["type"] == "Ready")
    return _seconds(ready["lastTransitionTime"]) - _seconds(pod["metadata"]["creationTimestamp"])


def _seconds(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ"))


def _scale(kube: Cluster, deployment: str, replicas: int) -> None:
    kube.kubectl("scale", f"deployment/{deployment}", f"--replicas={replicas}")
    kube.kubectl("rollout", "status", f"deployment/{deployment}", "--timeout=120s")


def _ready(kube: Cluster, component: str) -> list[str]:
    return [pod["metadata"]["name"] for pod in kube.pods(component) if pod["status"]["containerStatuses"][0]["ready"]]


def _settle(kube: Cluster) -> None:
    """Wait until the pods that were replaced are gone."""

    def leaving() -> list[Any]:
        return [
            pod for component in COMPONENTS for pod in kube.pods(component) if "deletionTimestamp" in pod["metadata"]
        ]

    until(lambda: not leaving(), WAIT_S, lambda: f"still there: {_names(leaving())}")


def _uids(kube: Cluster) -> set[str]:
    return {pod["metadata"]["uid"] for component in COMPONENTS for pod in kube.pods(component)}


def _names(pods: list[Any]) -> list[str]:
    return sorted(pod["metadata"]["name"] for pod in pods)


def _certificate(kube: Cluster) -> bytes:
    return base64.b64decode(kube.get("secret", f"{FULL}-tls-decode")["data"]["tls.crt"])
