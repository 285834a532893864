"""The restricted and baseline Pod Security Standards, for namespaces that enforce one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.support.fake_kube.errors import ApiError

LABEL = "pod-security.kubernetes.io/enforce"
_RESTRICTED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def admit(pod: dict[str, Any], level: str) -> None:
    """Raise ApiError when a namespace of this level does not take the pod."""
    if problems := list(violations(pod["spec"], level)):
        name, text = pod["metadata"]["name"], "; ".join(problems)
        raise ApiError(403, "Forbidden", f'pods "{name}" is forbidden: violates PodSecurity "{level}:latest": {text}')


def violations(spec: dict[str, Any], level: str) -> Iterator[str]:
    """Say what a pod has that the level does not allow."""
    if level not in {"baseline", "restricted"}:
        return
    for flag in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(flag):
            yield f"{flag} must not be set"
    for volume in spec.get("volumes") or ():
        if "hostPath" in volume:
            yield f"hostPath volume {volume['name']!r}"
        elif level == "restricted" and not (volume.keys() - {"name"}) <= _RESTRICTED_VOLUMES:
            yield f"restricted volume type of {volume['name']!r}"
    for container in [*(spec.get("initContainers") or ()), *spec["containers"]]:
        yield from _container(spec, container, level)


def _container(spec: dict[str, Any], container: dict[str, Any], level: str) -> Iterator[str]:
    name = container["name"]
    own = (spec.get("securityContext") or {}) | (container.get("securityContext") or {})
    capabilities = own.get("capabilities") or {}
    if own.get("privileged"):
        yield f"privileged container {name!r}"
    if any(port.get("hostPort") for port in container.get("ports") or ()):
        yield f"hostPort of container {name!r}"
    if level == "baseline":
        return
    if own.get("allowPrivilegeEscalation") is not False:
        yield f"allowPrivilegeEscalation != false in container {name!r}"
    if "ALL" not in capabilities.get("drop", ()) or set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"}:
        yield f"unrestricted capabilities in container {name!r}"
    if own.get("runAsNonRoot") is not True or own.get("runAsUser") == 0:
        yield f"runAsNonRoot != true in container {name!r}"
    if (own.get("seccompProfile") or {}).get("type") not in {"RuntimeDefault", "Localhost"}:
        yield f"seccompProfile of container {name!r} must be RuntimeDefault or Localhost"
