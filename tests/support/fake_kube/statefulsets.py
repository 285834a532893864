"""The controller of StatefulSets: pods with names and claims of their own, one after the other."""

from __future__ import annotations

import copy
import hashlib

from tests.support.fake_kube import defaults
from tests.support.fake_kube.store import Object, Store, canonical, key_of, owner
from tests.support.fake_kube.workloads import delete_pod, is_ready, make_pod

REVISION = "controller-revision-hash"


def stateful_sets(store: Store) -> None:
    for stateful_set in store.list("StatefulSet"):
        revision = _revision(stateful_set)
        pods = _pods(store, stateful_set)
        _step(store, stateful_set, pods, revision)
        _report(store, stateful_set, revision)


def _step(store: Store, stateful_set: Object, pods: dict[int, Object], revision: str) -> None:
    """Make, replace or remove one pod, when all others are as they should be."""
    desired = stateful_set["spec"]["replicas"]
    surplus = [number for number in pods if number >= desired]
    if surplus:
        delete_pod(store, pods[max(surplus)])
        return
    for number in range(desired):
        if number not in pods:
            _create(store, stateful_set, number, revision)
            return
        if not is_ready(pods[number]) and pods[number]["metadata"]["labels"][REVISION] == revision:
            return
    outdated = [number for number, pod in pods.items() if pod["metadata"]["labels"][REVISION] != revision]
    if outdated:
        delete_pod(store, pods[max(outdated)])


def _create(store: Store, stateful_set: Object, number: int, revision: str) -> None:
    name = f"{stateful_set['metadata']['name']}-{number}"
    pod = make_pod(stateful_set, name)
    labels = pod["metadata"].setdefault("labels", {})
    labels |= {REVISION: revision, "statefulset.kubernetes.io/pod-name": name}
    pod["spec"] |= {"hostname": name, "subdomain": stateful_set["spec"].get("serviceName", "")}
    for template in stateful_set["spec"].get("volumeClaimTemplates") or ():
        claim = f"{template['metadata']['name']}-{name}"
        _claim(store, stateful_set, template, claim)
        reference = {"name": template["metadata"]["name"], "persistentVolumeClaim": {"claimName": claim}}
        pod["spec"].setdefault("volumes", []).append(reference)
    defaults.fill(pod)
    store.create(pod)


def _claim(store: Store, stateful_set: Object, template: Object, name: str) -> None:
    namespace = stateful_set["metadata"]["namespace"]
    if store.get("PersistentVolumeClaim", namespace, name) is None:
        meta = {"name": name, "namespace": namespace}
        spec = copy.deepcopy(template["spec"])
        store.create({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": meta, "spec": spec})


def _pods(store: Store, stateful_set: Object) -> dict[int, Object]:
    """All pods by number, those that are going away included: their names are still taken."""
    pods = store.list("Pod", stateful_set["metadata"]["namespace"])
    own = [pod for pod in pods if owner(pod) == stateful_set["metadata"]["uid"]]
    return {int(pod["metadata"]["name"].rpartition("-")[2]): pod for pod in own}


def _report(store: Store, stateful_set: Object, revision: str) -> None:
    pods = list(_pods(store, stateful_set).values())
    updated = sum(pod["metadata"]["labels"][REVISION] == revision for pod in pods)
    num_ready = sum(is_ready(pod) for pod in pods)
    status = {
        "observedGeneration": stateful_set["metadata"]["generation"],
        "replicas": len(pods),
        "readyReplicas": num_ready,
        "availableReplicas": num_ready,
        "currentReplicas": updated,
        "updatedReplicas": updated,
        "currentRevision": revision,
        "updateRevision": revision,
    }
    store.set_status(key_of(stateful_set), status)


def _revision(stateful_set: Object) -> str:
    digest = hashlib.sha256(canonical(stateful_set["spec"]["template"]).encode()).hexdigest()[:10]
    return f"{stateful_set['metadata']['name']}-{digest}"[-63:].lstrip("-")
