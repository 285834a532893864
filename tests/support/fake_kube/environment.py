"""The environment, command and arguments of a container, as its manifest describes them."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any

from tests.support.fake_kube.semantics import quantity
from tests.support.fake_kube.store import Object, Store

_REFERENCE = re.compile(r"\$\$|\$\(([^()]+)\)")


class ConfigMissing(Exception):
    """A Secret, ConfigMap or key that a pod needs is not there (yet)."""


def build(store: Store, pod: Object, container: dict[str, Any], base: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a container over those of its image. Raises ConfigMissing."""
    values = dict(base)
    for source in container.get("envFrom") or ():
        values |= _all_of(store, pod, source)
    for entry in container.get("env") or ():
        if "valueFrom" in entry:
            value = _referenced(store, pod, container, entry["valueFrom"])
            if value is None:
                continue
        else:
            value = expand(entry.get("value", ""), values)
        values[entry["name"]] = value
    return values


def expand(text: str, values: Mapping[str, str]) -> str:
    """Replace $(NAME) by the variable's value; $$ is a dollar sign, unknown names stay as they are."""

    def replace(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else values.get(found[1], found[0])

    return _REFERENCE.sub(replace, text)


def field(pod: Object, path: str) -> str:
    """Read what the downward API gives, e.g. status.podIP."""
    if found := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
        return str((pod["metadata"].get(found[1]) or {}).get(found[2], ""))
    value: Any = pod
    for part in path.split("."):
        value = value.get(part, "") if isinstance(value, dict) else ""
    return str(value)


def data_of(store: Store, kind: str, namespace: str, name: str) -> dict[str, bytes]:
    """Return what a Secret or ConfigMap holds. Raises ConfigMissing."""
    found = store.get(kind, namespace, name)
    if found is None:
        raise ConfigMissing(f'{kind.lower()} "{name}" not found')
    data = found.get("data") or {}
    if kind == "Secret":
        return {key: base64.b64decode(text) for key, text in data.items()}
    return {key: text.encode() for key, text in data.items()}


def _all_of(store: Store, pod: Object, source: dict[str, Any]) -> dict[str, str]:
    kind = "Secret" if "secretRef" in source else "ConfigMap"
    reference = source["secretRef" if kind == "Secret" else "configMapRef"]
    data = data_of(store, kind, pod["metadata"]["namespace"], reference["name"])
    return {source.get("prefix", "") + key: value.decode() for key, value in data.items()}


def _referenced(store: Store, pod: Object, container: dict[str, Any], source: dict[str, Any]) -> str | None:
    match source:
        case {"fieldRef": {"fieldPath": path}}:
            return field(pod, path)
        case {"resourceFieldRef": {"resource": resource}}:
            kind, _, name = resource.partition(".")
            return str(int(quantity((container.get("resources") or {}).get(kind, {}).get(name, 0))))
        case {"secretKeyRef": reference}:
            return _key(store, pod, "Secret", reference)
        case {"configMapKeyRef": reference}:
            return _key(store, pod, "ConfigMap", reference)
        case _:
            raise ConfigMissing(f"no such source: {source}")


def _key(store: Store, pod: Object, kind: str, reference: dict[str, Any]) -> str | None:
    try:
        data = data_of(store, kind, pod["metadata"]["namespace"], reference["name"])
    except ConfigMissing:
        if not reference.get("optional"):
            raise
        data = {}
    if reference["key"] in data:
        return data[reference["key"]].decode()
    if reference.get("optional"):
        return None
    raise ConfigMissing(f"no key {reference['key']!r} in {kind.lower()} {reference['name']!r}")
