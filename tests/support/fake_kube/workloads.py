"""What the controllers of pods have in common."""

from __future__ import annotations

import copy
import uuid

from tests.support.fake_kube.store import Object, Store, key_of, owned_by, owner


def live_pods(store: Store, parent: Object) -> list[Object]:
    """The pods of a controller that are neither over nor going away."""
    pods = store.list("Pod", parent["metadata"]["namespace"])
    return [pod for pod in pods if owner(pod) == parent["metadata"]["uid"] and not _is_leaving(pod)]


def is_ready(pod: Object) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def make_pod(parent: Object, name: str) -> Object:
    """Make a pod of a controller's template; a name that ends with a dash is completed."""
    template = copy.deepcopy(parent["spec"]["template"])
    meta = template["metadata"] | {
        "name": name + uuid.uuid4().hex[:5] if name.endswith("-") else name,
        "namespace": parent["metadata"]["namespace"],
        "ownerReferences": owned_by(parent),
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": template["spec"]}


def delete_pod(store: Store, pod: Object) -> None:
    """Let a pod go with its own grace, once."""
    if "deletionTimestamp" not in pod["metadata"]:
        store.begin_delete(key_of(pod), pod["spec"].get("terminationGracePeriodSeconds", 30))


def _is_leaving(pod: Object) -> bool:
    return "deletionTimestamp" in pod["metadata"] or (pod.get("status") or {}).get("phase") in {"Succeeded", "Failed"}
