"""The fake cluster is good enough for real clients, and as strict as a real one where charts go wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helm.cluster import Cluster, cluster, containers, until

pytestmark = [pytest.mark.timeout(120)]
WAIT_S = 30.0
SLEEPER = {
    "name": "sleeper",
    "image": "none",
    "command": ["sh", "-c", "trap 'exit 0' TERM; echo up $GREETING; while :; do sleep 1 & wait $!; done"],
    "env": [{"name": "GREETING", "value": "hello"}],
    "securityContext": {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    },
}


@pytest.fixture(scope="module")
def kube() -> Iterator[Cluster]:
    with cluster("fake") as found:
        yield found


def deployment(name: str, replicas: int = 1, **changes: Any) -> dict[str, Any]:
    labels = {"app": name}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [SLEEPER | changes]}}
    spec = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": spec}


def apply(kube: Cluster, *objects: dict[str, Any]) -> str:
    return kube.apply(*objects)


def refusal(kube: Cluster, *objects: dict[str, Any]) -> str:
    with pytest.raises(AssertionError) as caught:
        apply(kube, *objects)
    return str(caught.value)


def names(kube: Cluster, app: str) -> list[str]:
    return sorted(pod["metadata"]["name"] for pod in kube.get("pods", "--selector", f"app={app}")["items"])


def says(kube: Cluster, subject: str, word: str) -> None:
    """Wait for a word in a log: without a probe a container is ready before it has written anything."""
    until(lambda: word in kube.kubectl("logs", subject), WAIT_S, lambda: kube.kubectl("logs", subject))


def test_kubectl_applies_scales_rolls_out_and_undoes(kube: Cluster) -> None:
    """A deployment goes through what operators do to it, and is gone with all its processes when it is deleted."""
    apply(kube, deployment("walk"))
    kube.kubectl("rollout", "status", "deployment/walk", "--timeout=30s")
    says(kube, "deployment/walk", "up hello")
    kube.kubectl("scale", "deployment/walk", "--replicas=2")
    kube.kubectl("rollout", "status", "deployment/walk", "--timeout=30s")
    first = names(kube, "walk")
    kube.kubectl("set", "env", "deployment/walk", "GREETING=again")
    kube.kubectl("rollout", "status", "deployment/walk", "--timeout=30s")
    until(lambda: len(names(kube, "walk")) == 2, WAIT_S, lambda: str(names(kube, "walk")))
    assert not set(first) & set(names(kube, "walk"))
    kube.kubectl("rollout", "undo", "deployment/walk")
    kube.kubectl("rollout", "status", "deployment/walk", "--timeout=30s")
    assert kube.get("deployment", "walk")["spec"]["template"]["spec"]["containers"][0]["env"] == SLEEPER["env"]
    kube.kubectl("delete", "deployment", "walk")
    until(lambda: not names(kube, "walk"), WAIT_S, lambda: str(names(kube, "walk")))
    assert not containers(kube.directory)


def test_helm_installs_upgrades_and_uninstalls(kube: Cluster, tmp_path: Path) -> None:
    """Release records, waiting and hooks work as on a real cluster."""
    chart = tmp_path / "tiny"
    (chart / "templates").mkdir(parents=True)
    (chart / "Chart.yaml").write_text("apiVersion: v2\nname: tiny\nversion: 1.0.0\n")
    body = json.dumps(deployment("tiny", 1)).replace('"hello"', '"{{ .Values.greeting }}"')
    (chart / "templates" / "deployment.yaml").write_text(body)
    for verb, greeting in (("install", "one"), ("upgrade", "two")):
        kube.helm(verb, "tiny", str(chart), "--set", f"greeting={greeting}", "--wait", "--timeout", "30s")
        says(kube, "deployment/tiny", f"up {greeting}")
    kube.helm("rollback", "tiny", "1", "--wait", "--timeout", "30s")
    kube.helm("uninstall", "tiny", "--wait", "--timeout", "30s")

    until(lambda: not names(kube, "tiny"), WAIT_S, lambda: str(names(kube, "tiny")))
    assert kube.get("replicasets")["items"] == []


def test_stateful_sets_roll_and_keep_what_is_theirs(kube: Cluster) -> None:
    """A pod comes back under its name with its claim, as a new one of the new template."""
    labels = {"app": "state"}
    keep = f"cat /data/seen 2>/dev/null; echo $GREETING >> /data/seen; {SLEEPER['command'][2]}"
    mounts = [{"name": "data", "mountPath": "/data"}]
    container = SLEEPER | {"command": ["sh", "-c", keep], "volumeMounts": mounts}
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}}
    spec = {
        "replicas": 1,
        "serviceName": "state",
        "selector": {"matchLabels": labels},
        "template": {
            "metadata": {"labels": labels},
            "spec": {"securityContext": {"fsGroup": 10001}, "containers": [container]},
        },
        "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": claim}],
    }
    meta = {"name": "state"}
    apply(kube, {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": meta, "spec": spec})
    kube.kubectl("rollout", "status", "statefulset/state", "--timeout=30s")
    says(kube, "state-0", "up hello")
    first = kube.get("pod", "state-0")["metadata"]["uid"]
    kube.kubectl("set", "env", "statefulset/state", "GREETING=again")
    kube.kubectl("rollout", "status", "statefulset/state", "--timeout=30s")

    assert kube.get("pod", "state-0")["metadata"]["uid"] != first
    says(kube, "state-0", "up again")
    assert kube.kubectl("logs", "state-0").split() == ["hello", "up", "again"]
    kube.kubectl("delete", "statefulset", "state")
    assert kube.get("persistentvolumeclaims")["items"] != []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"containerz": 1}, "containerz"),
        ({"image": 5}, "spec.template.spec.containers[0].image"),
        ({"ports": [{"containerPort": 80, "name": "a-name-that-is-too-long"}]}, "a-name-that-is-too-long"),
        ({"volumeMounts": [{"name": "nowhere", "mountPath": "/x"}]}, "nowhere"),
        ({"readinessProbe": {"tcpSocket": {"port": "none"}}}, "readinessProbe"),
        ({"resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}}, "resources.requests"),
    ],
)
def test_wrong_manifests_are_refused_by_field(kube: Cluster, changes: dict[str, Any], complaint: str) -> None:
    """What the schema does not know, or knows otherwise, and what only an API server checks."""
    assert complaint in refusal(kube, deployment("wrong", **changes))


def test_a_selector_cannot_change(kube: Cluster) -> None:
    """As charts learn when they put a version into it."""
    apply(kube, deployment("fixed", 0))
    changed = deployment("fixed", 0)
    changed["spec"]["selector"]["matchLabels"]["version"] = "2"
    changed["spec"]["template"]["metadata"]["labels"]["version"] = "2"

    assert "spec.selector" in refusal(kube, changed)


def test_restricted_namespaces_refuse_privileged_pods(kube: Cluster) -> None:
    """The namespace of these tests enforces the restricted standard."""
    meta = {"name": "root", "namespace": kube.namespace}
    spec = {"containers": [SLEEPER | {"securityContext": {"privileged": True}}]}
    complaint = refusal(kube, {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})

    assert "violates PodSecurity" in complaint
    assert "privileged" in complaint


def test_the_python_client_scales_and_meets_conflicts(kube: Cluster) -> None:
    """The scale subresource and optimistic locking, as the planner uses them."""
    from kubernetes import client, config
    from kubernetes.client.exceptions import ApiException

    apply(kube, deployment("python", 0))
    with config.new_client_from_config(str(kube.kubeconfig)) as api_client:
        api = client.AppsV1Api(api_client)
        scale = api.read_namespaced_deployment_scale("python", kube.namespace)
        api.patch_namespaced_deployment_scale("python", kube.namespace, {"spec": {"replicas": 1}})
        scale.spec.replicas = 3
        with pytest.raises(ApiException) as caught:
            api.replace_namespaced_deployment_scale("python", kube.namespace, scale)
        assert caught.value.status == 409
        assert api.read_namespaced_deployment("python", kube.namespace).spec.replicas == 1
    kube.kubectl("delete", "deployment", "python")


def test_a_pod_may_do_what_its_account_may(kube: Cluster) -> None:
    """Pods get a token, an address and a CA; the roles of their account say what the token is good for."""
    account = {"name": "reader", "namespace": kube.namespace}
    rule = {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["seen"], "verbs": ["get"]}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "reader"}
    rbac = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": account}
    apply(
        kube,
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account},
        rbac | {"kind": "Role", "rules": [rule]},
        rbac | {"kind": "RoleBinding", "roleRef": reference, "subjects": [{"kind": "ServiceAccount", **account}]},
        *({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}} for name in ("seen", "hidden")),
    )
    code = """
import json
from kubernetes import client, config
config.load_incluster_config()
api = client.CoreV1Api()
namespace = open("/var/run/secrets/kubernetes.io/serviceaccount/namespace").read()
print(api.read_namespaced_config_map("seen", namespace).metadata.name)
for call in (api.read_namespaced_config_map, api.delete_namespaced_config_map):
    try:
        call("hidden", namespace)
    except client.ApiException as e:
        print(e.status)
"""
    container = SLEEPER | {"command": ["python", "-c", code]}
    spec = {"serviceAccountName": "reader", "restartPolicy": "Never", "containers": [container]}
    apply(kube, {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "reader"}, "spec": spec})
    ends = {"Succeeded", "Failed"}
    until(lambda: kube.get("pod", "reader")["status"].get("phase") in ends, WAIT_S, lambda: "it does not end")

    assert kube.kubectl("logs", "reader").split() == ["seen", "403", "403"]


def test_callers_without_a_token_get_nothing(kube: Cluster) -> None:
    """The API answers nobody whom it does not know."""
    with pytest.raises(AssertionError, match=r"Unauthorized|provide credentials"):
        kube.kubectl("get", "pods", "--token", "wrong")
