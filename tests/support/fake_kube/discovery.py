"""What this API server tells clients that ask which resources there are."""

from __future__ import annotations

from typing import Any

from tests.support.fake_kube.errors import no_such_resource
from tests.support.fake_kube.kinds import KINDS, Kind
from tests.support.fake_kube.schema import VERSION

_VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
_PATCH_PARAMETERS = ("dryRun", "fieldManager", "fieldValidation", "force")


def answer(parts: list[str]) -> dict[str, Any] | None:  # noqa: PLR0911  -- a table
    """Answer a discovery request; None when the path is no such. Raises ApiError for unknown groups."""
    match parts:
        case ["version"]:
            major, minor, _ = VERSION.split(".")
            return {"major": major, "minor": minor, "gitVersion": f"v{VERSION}", "platform": "linux/amd64"}
        case ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
        case ["apis"]:
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": _groups()}
        case ["api", version]:
            return _resources("", version)
        case ["apis", group, version]:
            return _resources(group, version)
        case ["openapi", "v3"]:
            return {"paths": {_root(k): {"serverRelativeURL": f"/openapi/v3/{_root(k)}?hash=1"} for k in KINDS}}
        case ["openapi", "v3", "api", version]:
            return _openapi("", version)
        case ["openapi", "v3", "apis", group, version]:
            return _openapi(group, version)
        case _:
            return None


def _groups() -> list[dict[str, Any]]:
    pairs = dict.fromkeys((kind.group, kind.version) for kind in KINDS if kind.group)
    versions = [(group, {"groupVersion": f"{group}/{version}", "version": version}) for group, version in pairs]
    return [{"name": group, "versions": [entry], "preferredVersion": entry} for group, entry in versions]


def _resources(group: str, version: str) -> dict[str, Any]:
    resources = [entry for kind in _of(group, version) for entry in _entries(kind)]
    group_version = f"{group}/{version}" if group else version
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources}


def _entries(kind: Kind) -> list[dict[str, Any]]:
    common = {"singularName": kind.name.lower(), "namespaced": kind.is_namespaced}
    entries = [common | {"name": kind.plural, "kind": kind.name, "shortNames": kind.short_names, "verbs": _VERBS}]
    for subresource in kind.subresources:
        is_scale = subresource == "scale"
        entry = {"name": f"{kind.plural}/{subresource}", "kind": "Scale" if is_scale else kind.name}
        scale = {"group": "autoscaling", "version": "v1"} if is_scale else {}
        entries.append(common | entry | scale | {"verbs": ["get", "patch", "update"]})
    return entries


def _openapi(group: str, version: str) -> dict[str, Any]:
    """As much as kubectl wants: that fields are validated here, not by the client."""
    document = {"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": f"v{VERSION}"}}
    paths = {_path(kind): {"patch": _patch(kind)} for kind in _of(group, version)}
    return document | {"paths": paths, "components": {"schemas": {}}}


def _patch(kind: Kind) -> dict[str, Any]:
    schema = {"type": "string", "uniqueItems": True}
    return {
        "parameters": [{"name": name, "in": "query", "schema": schema} for name in _PATCH_PARAMETERS],
        "x-kubernetes-action": "patch",
        "x-kubernetes-group-version-kind": {"group": kind.group, "kind": kind.name, "version": kind.version},
        "responses": {"200": {"description": "OK"}},
    }


def _path(kind: Kind) -> str:
    scope = "/namespaces/{namespace}" if kind.is_namespaced else ""
    return f"/{_root(kind)}{scope}/{kind.plural}/{{name}}"


def _root(kind: Kind) -> str:
    return f"apis/{kind.group}/{kind.version}" if kind.group else f"api/{kind.version}"


def _of(group: str, version: str) -> list[Kind]:
    found = [kind for kind in KINDS if (kind.group, kind.version) == (group, version)]
    if not found:
        raise no_such_resource()
    return found
