"""The kinds that this API server knows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """One resource of one API group."""

    group: str
    version: str
    plural: str
    name: str
    is_namespaced: bool = True
    subresources: tuple[str, ...] = ()
    short_names: tuple[str, ...] = ()

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def resource(self) -> str:
        """Its name in messages, e.g. deployments.apps."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


def _core(plural: str, name: str, *short_names: str, is_namespaced: bool = True) -> Kind:
    return Kind("", "v1", plural, name, is_namespaced, ("status",), short_names)


def _apps(plural: str, name: str, *short_names: str) -> Kind:
    return Kind("apps", "v1", plural, name, subresources=("status", "scale"), short_names=short_names)


def _rbac(plural: str, name: str, *, is_namespaced: bool) -> Kind:
    return Kind("rbac.authorization.k8s.io", "v1", plural, name, is_namespaced)


KINDS = (
    _core("pods", "Pod", "po"),
    _core("services", "Service", "svc"),
    _core("configmaps", "ConfigMap", "cm"),
    _core("secrets", "Secret"),
    _core("serviceaccounts", "ServiceAccount", "sa"),
    _core("events", "Event", "ev"),
    _core("endpoints", "Endpoints", "ep"),
    _core("persistentvolumeclaims", "PersistentVolumeClaim", "pvc"),
    _core("namespaces", "Namespace", "ns", is_namespaced=False),
    _core("nodes", "Node", "no", is_namespaced=False),
    _apps("deployments", "Deployment", "deploy"),
    _apps("statefulsets", "StatefulSet", "sts"),
    _apps("replicasets", "ReplicaSet", "rs"),
    Kind("autoscaling", "v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler", True, ("status",), ("hpa",)),
    Kind("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", True, ("status",), ("pdb",)),
    Kind("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", short_names=("netpol",)),
    Kind("networking.k8s.io", "v1", "ingresses", "Ingress", True, ("status",), ("ing",)),
    Kind("coordination.k8s.io", "v1", "leases", "Lease"),
    _rbac("roles", "Role", is_namespaced=True),
    _rbac("rolebindings", "RoleBinding", is_namespaced=True),
    _rbac("clusterroles", "ClusterRole", is_namespaced=False),
    _rbac("clusterrolebindings", "ClusterRoleBinding", is_namespaced=False),
    Kind("monitoring.coreos.com", "v1", "servicemonitors", "ServiceMonitor", short_names=("smon",)),
    Kind("monitoring.coreos.com", "v1", "podmonitors", "PodMonitor", short_names=("pmon",)),
    Kind("monitoring.coreos.com", "v1", "prometheusrules", "PrometheusRule", short_names=("promrule",)),
    Kind("cert-manager.io", "v1", "certificates", "Certificate", True, ("status",), ("cert",)),
    Kind("cert-manager.io", "v1", "issuers", "Issuer", True, ("status",)),
)
BY_NAME = {kind.name: kind for kind in KINDS}
BY_PATH = {(kind.group, kind.version, kind.plural): kind for kind in KINDS}
