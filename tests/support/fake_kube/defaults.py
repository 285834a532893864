"""What an API server fills in where a manifest says nothing, as far as clients and controllers look at it."""

from __future__ import annotations

from typing import Any


def fill(value: dict[str, Any]) -> None:
    """Fill in the defaults of an object, in place."""
    spec = value.get("spec") or {}
    match value["kind"]:
        case "Deployment":
            spec.setdefault("replicas", 1)
            spec.setdefault("revisionHistoryLimit", 10)
            strategy = spec.setdefault("strategy", {})
            if strategy.setdefault("type", "RollingUpdate") == "RollingUpdate":
                rolling = strategy.setdefault("rollingUpdate", {})
                rolling.setdefault("maxSurge", "25%")
                rolling.setdefault("maxUnavailable", "25%")
        case "StatefulSet":
            spec.setdefault("replicas", 1)
            spec.setdefault("updateStrategy", {}).setdefault("type", "RollingUpdate")
        case "ReplicaSet":
            spec.setdefault("replicas", 1)
        case "Service":
            spec.setdefault("type", "ClusterIP")
            for port in spec.get("ports") or ():
                port.setdefault("protocol", "TCP")
                port.setdefault("targetPort", port["port"])
        case "Pod":
            _pod(spec)


def _pod(spec: dict[str, Any]) -> None:
    spec.setdefault("restartPolicy", "Always")
    spec.setdefault("terminationGracePeriodSeconds", 30)
    spec.setdefault("serviceAccountName", "default")
    for container in spec["containers"]:
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if probe in container:
                _probe(container[probe])


def _probe(probe: dict[str, Any]) -> None:
    defaults = {"periodSeconds": 10, "timeoutSeconds": 1, "failureThreshold": 3, "successThreshold": 1}
    for name, default in defaults.items():
        probe.setdefault(name, default)
