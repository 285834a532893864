"""Workers that are larger than a node, as the chart renders them for KubeRay.

KubeRay's schemas come in no package; the shape here is that of its API ray.io/v1, and pods are checked as pods.
"""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.contract.test_chart import SETTINGS
from tests.support.chart import CHART, OVERLAYS, of_kind, rendered, template
from tests.support.fake_kube import pod_security, schema
from tests.support.network_policy import allows

RAY, GRPC = 6379, 50051
LONG = "a-release-of-thirty-characters"
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
POD = {"type": "object", "required": ["metadata", "spec"]}


def shape(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "additionalProperties": False, "properties": properties}


HEAD = shape(
    ["rayStartParams", "template"],
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    headService={"type": "object"},
    enableIngress={"type": "boolean"},
    rayStartParams=TEXTS,
    template=POD,
)
GROUP = shape(
    ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
    groupName={"type": "string"},
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    rayStartParams=TEXTS,
    template=POD,
)
RAY_CLUSTER = shape(
    ["headGroupSpec"],
    rayVersion={"type": "string"},
    upgradeStrategy=shape(["type"], type={"enum": ["Recreate", "None"]}),
    enableInTreeAutoscaling={"type": "boolean"},
    suspend={"type": "boolean"},
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": GROUP},
)


def clusters(extra: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The Ray clusters of the overlay, with more values."""
    if extra is None:
        return of_kind("ray", "RayCluster")
    done = template(OVERLAYS["ray"], extra)
    assert done.returncode == 0, done.stderr
    return [value for value in yaml.safe_load_all(done.stdout) if value and value["kind"] == "RayCluster"]


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods of its head and of its other nodes."""
    spec = cluster["spec"]
    return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]


def environ(pod: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {variable["name"]: variable for variable in pod["spec"]["containers"][0]["env"]}


def decode_spec() -> dict[str, Any]:
    pool: dict[str, Any] = yaml.safe_load((CHART / "values-ray.yaml").read_text())["pools"][0]
    return pool


def test_each_worker_is_a_cluster_of_its_own() -> None:
    """With as many nodes as it was given, and no Deployment beside it."""
    found = clusters()

    assert [cluster["metadata"]["name"] for cluster in found] == [f"t-inferflux-main-decode-{i}" for i in range(2)]
    assert "t-inferflux-main-decode" not in {d["metadata"]["name"] for d in of_kind("ray", "Deployment")}
    for cluster in found:
        (group,) = cluster["spec"]["workerGroupSpecs"]
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 1
        assert environ(pods(cluster)[0])["INFERFLUX_NODES"]["value"] == "2"


def test_clusters_have_the_form_that_kuberay_takes() -> None:
    """And their pods, with a command of their own, the form that Kubernetes takes, strictly."""
    for cluster in clusters():
        assert cluster["apiVersion"] == "ray.io/v1"
        assert cluster["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
        assert len(cluster["metadata"]["name"]) <= 53
        errors = list(Draft202012Validator(RAY_CLUSTER).iter_errors(cluster["spec"]))
        assert not errors, [e.message for e in errors]
        for i, pod in enumerate(copy.deepcopy(pods(cluster))):
            pod["metadata"]["name"] = f"pod-{i}"
            schema.check({"apiVersion": "v1", "kind": "Pod", **pod}, is_strict=True)


def test_a_worker_is_one_failure_domain() -> None:
    """Its pods are together in a zone, each on a node of its own, and whatever ends, ends the head's one container."""
    for cluster in clusters():
        worker = cluster["metadata"]["name"]
        for pod in pods(cluster):
            assert pod["metadata"]["labels"]["inferflux.io/worker"] == worker
            for term, key in (
                ("podAffinity", "topology.kubernetes.io/zone"),
                ("podAntiAffinity", "kubernetes.io/hostname"),
            ):
                (rule,) = pod["spec"]["affinity"][term]["requiredDuringSchedulingIgnoredDuringExecution"]
                assert rule["topologyKey"] == key
                assert rule["labelSelector"]["matchLabels"] == {"inferflux.io/worker": worker}
            assert len(pod["spec"]["containers"]) == 1
        head, ranks = pods(cluster)
        # KubeRay's own Service of a head names it before it is ready, which it becomes with the others.
        assert "headService" not in cluster["spec"]["headGroupSpec"]
        assert {"name": "gcs-server", "containerPort": RAY} in head["spec"]["containers"][0]["ports"]
        assert head["spec"]["containers"][0]["args"][0].endswith("&& exec inferflux-decode")
        assert "ray start --block" in ranks["spec"]["containers"][0]["args"][0]
        hook = ranks["spec"]["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert hook == 125 < ranks["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(
    ("ray", "labels"),
    [
        ({}, {}),
        (
            {"gangScheduler": "volcano", "queue": "q"},
            {"ray.io/scheduler-name": "volcano", "volcano.sh/queue-name": "q"},
        ),
        ({"gangScheduler": "scheduler-plugins"}, {"ray.io/gang-scheduling-enabled": "true"}),
        ({"gangScheduler": "kueue", "queue": "q"}, {"kueue.x-k8s.io/queue-name": "q"}),
    ],
)
def test_pods_of_a_worker_are_scheduled_as_a_gang(ray: dict[str, str], labels: dict[str, str]) -> None:
    """By the labels that each of KubeRay's schedulers looks for."""
    theirs = re.compile(r"^(ray\.io|volcano\.sh|kueue\.x-k8s\.io)/")
    for cluster in clusters({"ray": ray}):
        found = cluster["metadata"]["labels"]
        assert {name: value for name, value in found.items() if theirs.match(name)} == labels


def test_all_nodes_ask_for_the_token() -> None:
    """The chart's own; no dashboard and no exporter of metrics is started."""
    (secret,) = [s for s in of_kind("ray", "Secret") if s["metadata"]["name"] == "t-inferflux-ray"]
    assert set(secret["data"]) == {"token"}
    for cluster in clusters():
        for pod in pods(cluster):
            env = environ(pod)
            assert env["RAY_AUTH_MODE"]["value"] == "token"
            assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "t-inferflux-ray", "key": "token"}
        command = pods(cluster)[0]["spec"]["containers"][0]["args"][0]
        assert {"--include-dashboard=false", "--no-monitor"} <= set(command.split())


def test_a_pool_may_bring_its_own_token() -> None:
    pool = decode_spec()
    pool["decode"]["parallelism"]["rayAuthSecret"] = "mine"
    done = template(OVERLAYS["ray"], {"pools": [pool]})
    objects = [value for value in yaml.safe_load_all(done.stdout) if value]

    assert not [v for v in objects if v["metadata"]["name"] == "t-inferflux-ray"]
    (first, *_) = [v for v in objects if v["kind"] == "RayCluster"]
    assert environ(pods(first)[1])["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "mine"


def test_pods_meet_the_restricted_standard_and_know_what_they_must() -> None:
    """Nodes that only take ranks have no keys and no certificates; settings are those that the worker reads."""
    known = set(SETTINGS["decode"].__dataclass_fields__)
    for cluster in clusters():
        head, ranks = pods(cluster)
        for pod in (head, ranks):
            assert list(pod_security.violations(pod["spec"], "restricted")) == []
            assert pod["spec"]["automountServiceAccountToken"] is False
            assert pod["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
        assert {v["name"] for v in ranks["spec"]["volumes"]} == {"tmp", "model", "shm"}
        assert not [name for name in environ(ranks) if name.startswith("INFERFLUX_")]
        ours = [name.removeprefix("INFERFLUX_").lower() for name in environ(head) if name.startswith("INFERFLUX_")]
        assert {name.removesuffix("_file") for name in ours} <= known | {"ops_token"}


def test_only_the_nodes_of_a_worker_reach_its_ray() -> None:
    """Not another worker's, nor anybody else; the gateway reaches the worker."""
    policies = of_kind("ray", "NetworkPolicy")
    (head, ranks), (other, _) = [[pod["metadata"]["labels"] for pod in pods(cluster)] for cluster in clusters()]
    labels = {d["metadata"]["name"]: d["spec"]["template"]["metadata"]["labels"] for d in of_kind("ray", "Deployment")}

    assert allows(policies, ranks, head, RAY)
    assert allows(policies, head, ranks, RAY)
    assert not allows(policies, other, head, RAY)
    for name in ("t-inferflux-gateway", "t-inferflux-registry", "t-inferflux-policy"):
        if name in labels:
            assert not allows(policies, labels[name], head, RAY)
    assert allows(policies, labels["t-inferflux-gateway"], head, GRPC)


def test_disruptions_take_one_node_at_a_time() -> None:
    """Kubernetes takes no other number for pods that an operator makes."""
    (budget,) = [b for b in of_kind("ray", "PodDisruptionBudget") if b["metadata"]["name"].endswith("main-decode")]

    assert budget["spec"]["minAvailable"] == 2 * 2 - 1
    assert "maxUnavailable" not in budget["spec"]


def test_nodes_without_gpus_say_how_many_ranks_they_take() -> None:
    pool = decode_spec()
    pool["decode"] |= {"parallelism": {"tensor": 4, "nodes": 2}, "resources": {"limits": {"memory": "8Gi"}}}
    for cluster in clusters({"pools": [pool]}):
        for pod in pods(cluster):
            (flag,) = re.findall(r"--resources='([^']*)'", pod["spec"]["containers"][0]["args"][0])
            assert json.loads(flag) == {"inferflux_rank": 2}


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("prefill.parallelism.nodes", 2, "pools[0].prefill.parallelism.nodes: 2; the ranks of a prefill worker share"),
        ("decode.parallelism.executor", "mp", "pools[0].decode.parallelism.nodes: 2 nodes take the executor ray"),
        ("decode.parallelism.rayAddress", "head:6379", "pools[0].decode.parallelism.rayAddress: with 2 nodes"),
        ("decode.parallelism.nodes", 3, "pools[0].decode.parallelism.nodes: 16 ranks can't lie equally on 3 nodes"),
        ("decode.parallelism.nodes", 4, "pools[0].decode.resources.limits: 8 GPUs for 4 ranks on each of 4 nodes"),
        ("decode.parallelism.nodes", 0, "/pools/0/decode/parallelism/nodes"),
        ("transport", "auto", "pools[0].decode.parallelism.nodes: ranks on 2 nodes read KV over the network"),
        ("engine", "sim", "pools[0].decode.parallelism.nodes: 2; the engine sim has one rank"),
        (
            "decode.autoscaling",
            {"enabled": True, "minReplicas": 1, "maxReplicas": 2, "averageValue": 4},
            "pools[0].decode.parallelism.nodes: nothing scales workers of 2 nodes by itself",
        ),
        ("name", "a-very-long-pool-one", f"the name {LONG}-a-very-long-pool-one-decode-2 of its Ray clusters has 60"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(path: str, value: Any, complaint: str) -> None:
    pool = decode_spec()
    place: Any = pool
    *parents, last = path.split(".")
    for name in parents:
        place = place[name]
    place[last] = value
    extra = {"pools": [pool], "fullnameOverride": LONG if path == "name" else ""}
    done = template(OVERLAYS["ray"], extra)

    assert done.returncode != 0, "taken"
    assert complaint in done.stderr


def test_other_overlays_have_none() -> None:
    """A chart without such workers needs no KubeRay."""
    for overlay in set(OVERLAYS) - {"ray"}:
        assert not [value for value in rendered(overlay) if value["apiVersion"].startswith("ray.io/")]
