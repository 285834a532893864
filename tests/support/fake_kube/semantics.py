"""What an API server checks beyond the schema, as far as charts get it wrong."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tests.support.fake_kube.errors import invalid
from tests.support.fake_kube.selectors import selects

_NAME = re.compile(r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
_LABEL = re.compile(r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$")
_PORT_NAME = re.compile(r"^(?=.*[a-z])[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
Problem = tuple[str, str]


def check(value: dict[str, Any], current: dict[str, Any] | None) -> None:
    """Raise ApiError naming all that is wrong with an object that is to replace `current`."""
    problems = [*_metadata(value["metadata"], "metadata"), *_by_kind(value), *_immutable(value, current)]
    if problems:
        raise invalid(value["kind"], value["metadata"]["name"], problems)


def _metadata(meta: dict[str, Any], path: str) -> Iterator[Problem]:
    name = meta.get("name", "")
    if name and not (_NAME.match(name) and len(name) <= 253):
        yield f"{path}.name", f"Invalid value: {name!r}: must be a lowercase RFC 1123 subdomain"
    for key, text in (meta.get("labels") or {}).items():
        if not (_LABEL.match(text) and len(text) <= 63):
            yield f"{path}.labels", f"Invalid value: {text!r} of {key}: must be no more than 63 label characters"


def _by_kind(value: dict[str, Any]) -> Iterator[Problem]:
    spec = value.get("spec") or {}
    match value["kind"]:
        case "Pod":
            yield from _pod(spec, "spec")
        case "Deployment" | "StatefulSet" | "ReplicaSet":
            yield from _workload(spec)
        case "Service":
            yield from _service(spec)
        case "Secret":
            yield from _secret(value.get("data") or {})


def _workload(spec: dict[str, Any]) -> Iterator[Problem]:
    template = spec["template"]
    if not selects(spec["selector"], template["metadata"].get("labels") or {}):
        yield "spec.template.metadata.labels", "Invalid value: `selector` does not match template `labels`"
    yield from _metadata(template["metadata"], "spec.template.metadata")
    claims = [claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates") or ()]
    yield from _pod(template["spec"], "spec.template.spec", claims)
    if template["spec"].get("restartPolicy", "Always") != "Always":
        yield "spec.template.spec.restartPolicy", "Unsupported value: supported values: 'Always'"


def _pod(spec: dict[str, Any], path: str, claims: Sequence[str] = ()) -> Iterator[Problem]:
    volumes = [*claims, *(volume["name"] for volume in spec.get("volumes") or ())]
    containers = [*(spec.get("initContainers") or ()), *spec["containers"]]
    for name in _repeated(volumes):
        yield f"{path}.volumes", f"Duplicate value: {name!r}"
    for name in _repeated([container["name"] for container in containers]):
        yield f"{path}.containers", f"Duplicate value: {name!r}"
    for container in containers:
        where = f"{path}.containers[{container['name']}]"
        yield from _container(container, set(volumes), where)
    grace_s = spec.get("terminationGracePeriodSeconds", 30)
    if grace_s < 0:
        yield f"{path}.terminationGracePeriodSeconds", f"Invalid value: {grace_s}: must not be negative"


def _container(container: dict[str, Any], volumes: set[str], path: str) -> Iterator[Problem]:
    if not container.get("image"):
        yield f"{path}.image", "Required value"
    for mount in container.get("volumeMounts") or ():
        if mount["name"] not in volumes:
            yield f"{path}.volumeMounts", f"Not found: {mount['name']!r}"
    paths = [mount["mountPath"] for mount in container.get("volumeMounts") or ()]
    for repeated in _repeated(paths):
        yield f"{path}.volumeMounts", f"Invalid value: {repeated!r}: must be unique"
    ports = container.get("ports") or ()
    for port in ports:
        name = port.get("name", "a")
        if not _PORT_NAME.match(name) or len(name) > 15:
            yield f"{path}.ports", f"Invalid value: {name!r}: must be no more than 15 characters of a-z, 0-9 and -"
    known = {port.get("name") for port in ports} | {port["containerPort"] for port in ports}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        action = container.get(probe) or {}
        port = (action.get("httpGet") or action.get("tcpSocket") or {}).get("port")
        if isinstance(port, str) and port not in known:
            yield f"{path}.{probe}", f"Invalid value: {port!r}: no such port"
    yield from _resources(container.get("resources") or {}, path)


def _resources(resources: dict[str, Any], path: str) -> Iterator[Problem]:
    requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
    for name, request in requests.items():
        if name in limits and quantity(request) > quantity(limits[name]):
            yield f"{path}.resources.requests", f"Invalid value: {request!r}: must be at most the {name} limit"


def _service(spec: dict[str, Any]) -> Iterator[Problem]:
    ports = spec.get("ports") or []
    names = [port.get("name", "") for port in ports]
    if len(ports) > 1 and not all(names):
        yield "spec.ports[0].name", "Required value"
    for name in _repeated(names):
        yield "spec.ports", f"Duplicate value: {name!r}"


def _secret(data: dict[str, str]) -> Iterator[Problem]:
    for key, text in data.items():
        try:
            base64.b64decode(text, validate=True)
        except binascii.Error:
            yield f"data[{key}]", "Invalid value: must be base64"


def _immutable(value: dict[str, Any], current: dict[str, Any] | None) -> Iterator[Problem]:
    if current is None or value["kind"] not in {"Deployment", "StatefulSet", "ReplicaSet"}:
        return
    if value["spec"]["selector"] != current["spec"]["selector"]:
        yield "spec.selector", "Invalid value: field is immutable"


def _repeated(names: list[str]) -> set[str]:
    return {name for name in names if names.count(name) > 1}


_SUFFIXES = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SUFFIXES |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity(text: str | float) -> float:
    """Read a quantity, e.g. 500m or 2Gi. Raises ValueError."""
    text = str(text)
    suffix = next((s for s in sorted(_SUFFIXES, key=len, reverse=True) if text.endswith(s)), "")
    return float(text.removesuffix(suffix)) * _SUFFIXES.get(suffix, 1)
