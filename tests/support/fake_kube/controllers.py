"""What Kubernetes' controllers do: Deployments make ReplicaSets, these make Pods, Services find theirs.

All of them look at the whole store after each change and do what is still to be done, so order does not matter.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from datetime import datetime
from typing import Any

from tests.support.fake_kube import defaults, selectors, semantics
from tests.support.fake_kube.api import admit_to_namespace
from tests.support.fake_kube.errors import ApiError
from tests.support.fake_kube.statefulsets import stateful_sets
from tests.support.fake_kube.store import Object, Store, canonical, key_of, owned_by, owner
from tests.support.fake_kube.workloads import delete_pod, is_ready, live_pods, make_pod

HASH = "pod-template-hash"
DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
REVISION = "deployment.kubernetes.io/revision"


async def run(store: Store) -> None:
    """Reconcile for ever."""
    while True:
        revision = store.revision
        for reconcile in RECONCILERS:
            reconcile(store)
        await store.wait(revision)


def deployments(store: Store) -> None:
    for deployment in store.list("Deployment"):
        sets = [s for s in store.list("ReplicaSet", namespace(deployment)) if owner(s) == uid(deployment)]
        current = _current_set(store, deployment, sets)
        _roll(store, deployment, current, [s for s in sets if uid(s) != uid(current)])
        _report(store, deployment)


def replica_sets(store: Store) -> None:
    for replica_set in store.list("ReplicaSet"):
        pods = live_pods(store, replica_set)
        missing = replica_set["spec"]["replicas"] - len(pods)
        failure = _create_pods(store, replica_set, missing)
        for pod in sorted(pods, key=_value)[: max(0, -missing)]:
            delete_pod(store, pod)
        pods = live_pods(store, replica_set)
        num_ready = sum(is_ready(pod) for pod in pods)
        status = {
            "replicas": len(pods),
            "readyReplicas": num_ready,
            "availableReplicas": num_ready,
            "observedGeneration": replica_set["metadata"]["generation"],
            "conditions": [{"type": "ReplicaFailure", "status": "True", "message": failure}] if failure else [],
        }
        store.set_status(key_of(replica_set), status)


def endpoints(store: Store) -> None:
    """Keep for each service the addresses that are ready."""
    for service in store.list("Service"):
        selector = service["spec"].get("selector")
        if not selector:
            continue
        pods = [p for p in store.list("Pod", namespace(service)) if _is_endpoint(p, selector)]
        _write_endpoints(store, service, pods)


def budgets(store: Store) -> None:
    """Report what disruption budgets allow."""
    for budget in store.list("PodDisruptionBudget"):
        spec = budget["spec"]
        pods = [p for p in store.list("Pod", namespace(budget)) if _is_selected(p, spec.get("selector"))]
        healthy = sum(is_ready(pod) for pod in pods)
        if "minAvailable" in spec:
            desired = portion(spec["minAvailable"], len(pods), is_rounded_up=True)
        else:
            desired = len(pods) - portion(spec.get("maxUnavailable", 0), len(pods), is_rounded_up=True)
        status = {"currentHealthy": healthy, "desiredHealthy": desired, "expectedPods": len(pods)}
        status |= {"disruptionsAllowed": max(0, healthy - desired)}
        store.set_status(key_of(budget), status | {"observedGeneration": budget["metadata"]["generation"]})


def claims(store: Store) -> None:
    for claim in store.list("PersistentVolumeClaim"):
        store.set_status(key_of(claim), {"phase": "Bound"})


def garbage(store: Store) -> None:
    """Remove what belongs to owners and namespaces that are gone."""
    owners = {uid(value) for value in store.all()}
    for value in store.all():
        references = value["metadata"].get("ownerReferences") or ()
        home = value["metadata"].get("namespace")
        is_orphan = bool(references) and not any(r["uid"] in owners for r in references)
        if not (is_orphan or (home and store.get("Namespace", "", home) is None)):
            continue
        if value["kind"] == "Pod":
            delete_pod(store, value)
        else:
            store.remove(key_of(value))


RECONCILERS: tuple[Callable[[Store], None], ...] = (
    garbage,
    deployments,
    replica_sets,
    stateful_sets,
    endpoints,
    budgets,
    claims,
)


def namespace(value: Object) -> str:
    return str(value["metadata"].get("namespace", ""))


def uid(value: Object) -> str:
    return str(value["metadata"]["uid"])


def portion(value: int | str, total: int, *, is_rounded_up: bool) -> int:
    """Read a number or a percentage of `total`."""
    if not isinstance(value, str) or not value.endswith("%"):
        return int(value)
    scaled = int(value[:-1]) * total
    return -(-scaled // 100) if is_rounded_up else scaled // 100


def _current_set(store: Store, deployment: Object, sets: list[Object]) -> Object:
    """Find the replica set of the deployment's template, or make it."""
    template = copy.deepcopy(deployment["spec"]["template"])
    digest = hashlib.sha256(canonical(template).encode()).hexdigest()[:10]
    numbers = [int(s["metadata"]["annotations"][REVISION]) for s in sets]
    found = next((s for s in sets if s["metadata"]["labels"][HASH] == digest), None)
    if found is not None:
        if int(found["metadata"]["annotations"][REVISION]) < max(numbers):  # a rollback
            found = copy.deepcopy(found)
            found["metadata"]["annotations"][REVISION] = str(max(numbers) + 1)
            found = store.replace(found)
        return found
    labels = (template["metadata"].get("labels") or {}) | {HASH: digest}
    template["metadata"]["labels"] = labels
    selector = copy.deepcopy(deployment["spec"]["selector"])
    selector["matchLabels"] = (selector.get("matchLabels") or {}) | {HASH: digest}
    meta = {
        "name": f"{deployment['metadata']['name']}-{digest}",
        "namespace": namespace(deployment),
        "labels": labels,
        "annotations": {REVISION: str(max(numbers, default=0) + 1)},
        "ownerReferences": owned_by(deployment),
    }
    spec = {"replicas": 0, "selector": selector, "template": template}
    return store.create({"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": meta, "spec": spec})


def _roll(store: Store, deployment: Object, current: Object, old: list[Object]) -> None:
    """Go one step from the old replica sets to the current one, within surge and unavailability."""
    desired = deployment["spec"]["replicas"]
    surge, unavailable = _limits(deployment["spec"]["strategy"], desired)
    if deployment["spec"]["strategy"]["type"] == "Recreate" and any(_num_pods(store, s) for s in old):
        for replica_set in old:
            store.set_scale(key_of(replica_set), 0)
        return
    total = sum(s["spec"]["replicas"] for s in [current, *old])
    own = current["spec"]["replicas"]
    wanted = desired if own > desired else min(desired, own + max(0, desired + surge - total))
    store.set_scale(key_of(current), wanted)
    total += wanted - own
    ready = {uid(s): sum(is_ready(p) for p in live_pods(store, s)) for s in [current, *old]}
    least = desired - unavailable
    room = total - least - max(0, wanted - ready[uid(current)])
    _scale_down(store, old, ready, room, sum(ready.values()) - least)


def _scale_down(store: Store, old: list[Object], ready: dict[str, int], room: int, surplus: int) -> None:
    """Take pods from old replica sets: at most `room`, and of the ready ones `surplus`; the others go first."""
    sizes = {uid(s): s["spec"]["replicas"] for s in old}
    for replica_set in old:
        idle = min(max(0, sizes[uid(replica_set)] - ready[uid(replica_set)]), max(0, room))
        sizes[uid(replica_set)] -= idle
        room -= idle
    spare = min(room, surplus)
    for replica_set in old:
        taken = min(sizes[uid(replica_set)], max(0, spare))
        spare -= taken
        store.set_scale(key_of(replica_set), sizes[uid(replica_set)] - taken)


def _limits(strategy: dict[str, Any], desired: int) -> tuple[int, int]:
    rolling = strategy.get("rollingUpdate") or {}
    surge = portion(rolling.get("maxSurge", 0), desired, is_rounded_up=True)
    unavailable = portion(rolling.get("maxUnavailable", 0), desired, is_rounded_up=False)
    return surge, unavailable if surge or unavailable else 1


def _report(store: Store, deployment: Object) -> None:
    sets = [s for s in store.list("ReplicaSet", namespace(deployment)) if owner(s) == uid(deployment)]
    newest = max(sets, key=lambda s: int(s["metadata"]["annotations"][REVISION]))
    pods = [pod for s in sets for pod in live_pods(store, s)]
    num_ready = sum(is_ready(pod) for pod in pods)
    desired = deployment["spec"]["replicas"]
    updated = _num_pods(store, newest)
    is_complete = updated == desired == len(pods) == num_ready
    _, unavailable = _limits(deployment["spec"]["strategy"], desired)
    status = {
        "observedGeneration": deployment["metadata"]["generation"],
        "replicas": len(pods),
        "updatedReplicas": updated,
        "readyReplicas": num_ready,
        "availableReplicas": num_ready,
        "unavailableReplicas": max(0, desired - num_ready),
        "conditions": [
            _condition("Available", is_true=num_ready >= desired - unavailable, reason="MinimumReplicasAvailable"),
            _condition("Progressing", is_true=True, reason="NewReplicaSetAvailable" if is_complete else "Updating"),
        ],
    }
    store.set_status(key_of(deployment), status)
    _set_revision(store, deployment, newest["metadata"]["annotations"][REVISION])


def _set_revision(store: Store, deployment: Object, revision: str) -> None:
    current = copy.deepcopy(store.get(*key_of(deployment)))
    assert current is not None
    annotations = current["metadata"].setdefault("annotations", {})
    if annotations.get(REVISION) != revision:
        annotations[REVISION] = revision
        store.replace(current)


def _condition(type_: str, *, is_true: bool, reason: str) -> dict[str, str]:
    return {"type": type_, "status": "True" if is_true else "False", "reason": reason}


def _create_pods(store: Store, parent: Object, count: int) -> str:
    """Make pods; returns why that was refused, or nothing."""
    for _ in range(count):
        pod = make_pod(parent, f"{parent['metadata']['name']}-")
        try:
            semantics.check(pod, None)
            defaults.fill(pod)
            admit_to_namespace(store, pod)
        except ApiError as e:
            return e.message
        store.create(pod)
    return ""


def _num_pods(store: Store, replica_set: Object) -> int:
    return len(live_pods(store, replica_set))


def _value(pod: Object) -> tuple[bool, int, float]:
    """What to order pods by when some must go: first those that are not ready, then the cheapest, then the youngest."""
    cost = int((pod["metadata"].get("annotations") or {}).get(DELETION_COST, 0))
    created = datetime.fromisoformat(pod["metadata"]["creationTimestamp"])
    return is_ready(pod), cost, -created.timestamp()


def _is_endpoint(pod: Object, selector: dict[str, str]) -> bool:
    is_leaving = "deletionTimestamp" in pod["metadata"]
    return not is_leaving and is_ready(pod) and _is_selected(pod, {"matchLabels": selector})


def _is_selected(pod: Object, selector: dict[str, Any] | None) -> bool:
    return selectors.selects(selector, pod["metadata"].get("labels") or {})


def _write_endpoints(store: Store, service: Object, pods: list[Object]) -> None:
    meta = {"name": service["metadata"]["name"], "namespace": namespace(service), "ownerReferences": owned_by(service)}
    subsets = [_subset(service, pod) for pod in pods]
    value = {"apiVersion": "v1", "kind": "Endpoints", "metadata": meta, "subsets": subsets}
    current = store.get("Endpoints", meta["namespace"], meta["name"])
    if current is None:
        store.create(value)
    elif current["subsets"] != subsets:
        store.replace(current | {"subsets": subsets})


def _subset(service: Object, pod: Object) -> dict[str, Any]:
    ports = [{"name": p.get("name", ""), "port": port_of(pod, p["targetPort"])} for p in service["spec"]["ports"]]
    reference = {"kind": "Pod", "name": pod["metadata"]["name"]}
    return {"addresses": [{"ip": pod["status"]["podIP"], "targetRef": reference}], "ports": ports}


def port_of(pod: Object, port: int | str) -> int:
    """Find the number of a pod's port that may be named."""
    if isinstance(port, int):
        return port
    named = [p for c in pod["spec"]["containers"] for p in c.get("ports") or () if p.get("name") == port]
    return int(named[0]["containerPort"])
