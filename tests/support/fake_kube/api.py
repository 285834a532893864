"""The API server: reads and writes of the store over HTTPS, as Kubernetes' clients ask for them."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

from tests.support.fake_kube import defaults, discovery, merge, pod_security, protobuf, schema, selectors, semantics
from tests.support.fake_kube.errors import ApiError, conflict, invalid, no_such_resource
from tests.support.fake_kube.kinds import BY_PATH, Kind
from tests.support.fake_kube.rbac import Guard, Request
from tests.support.fake_kube.store import Key, Object, Store, key_of

MAX_BODY_BYTES = 64 << 20
FOLLOW_S = 0.1
_VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_PLACE = ("name", "namespace")
Allocate = Callable[[Object], None]


@dataclass(frozen=True, slots=True)
class Target:
    """What a path names; `name` is empty for a collection."""

    kind: Kind
    namespace: str
    name: str
    subresource: str

    @property
    def key(self) -> Key:
        return self.kind.name, self.namespace, self.name


class Api:
    """An ASGI-like handler for aiohttp. `allocate` gives a new service its address, `logs` finds a pod's output."""

    def __init__(self, store: Store, guard: Guard, allocate: Allocate, logs: Callable[[Key, str], Path | None]) -> None:
        self._store = store
        self._guard = guard
        self._allocate = allocate
        self._logs = logs
        self._applied: dict[Key, dict[str, Object]] = {}

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", self._handle)
        return app

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._answer(request)
        except ApiError as e:
            return web.json_response(e.to_status(), status=e.code)
        except ConnectionError:  # whoever watched is gone
            return web.Response()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        user = self._guard.authenticate(request.headers.get("Authorization", ""))
        parts = [part for part in request.path.split("/") if part]
        if (found := discovery.answer(parts)) is not None:
            return web.json_response(found)
        target = _target(parts)
        self._guard.authorize(user, _asked(request, target))
        match request.method:
            case "GET" if request.query.get("watch") in {"1", "true", "True"}:
                return await self._watch(request, target)
            case "GET" if target.subresource == "log":
                return await self._log(request, target)
            case "GET":
                return web.json_response(self._get(request, target))
            case _:
                return await self._write(request, target)

    async def _write(self, request: web.Request, target: Target) -> web.StreamResponse:
        body = await _body(request)
        match request.method:
            case "POST":
                return web.json_response(self._create(request, target, body), status=201)
            case "PUT" | "PATCH":
                return web.json_response(self._change(request, target, body))
            case "DELETE":
                return web.json_response(self._delete(request, target, body))
            case _:
                raise ApiError(405, "MethodNotAllowed", f"{request.method} is not supported")

    def _get(self, request: web.Request, target: Target) -> Object:
        if target.name:
            found = self._store.require(target.kind, target.namespace, target.name)
            return scale_of(found) if target.subresource == "scale" else found
        listed = {"kind": f"{target.kind.name}List", "apiVersion": target.kind.api_version}
        meta = {"resourceVersion": str(self._store.revision)}
        return listed | {"metadata": meta, "items": self._matching(request, target)}

    def _matching(self, request: web.Request, target: Target) -> list[Object]:
        labels, fields = request.query.get("labelSelector", ""), request.query.get("fieldSelector", "")
        found = self._store.list(target.kind.name, target.namespace)
        return [value for value in found if selectors.matches(value, labels, fields)]

    def _create(self, request: web.Request, target: Target, body: Object) -> Object:
        meta = body.setdefault("metadata", {})
        if target.kind.is_namespaced:
            meta["namespace"] = target.namespace
        if not meta.get("name") and meta.get("generateName"):
            meta["name"] = meta["generateName"] + uuid.uuid4().hex[:5]
        if not meta.get("name"):
            raise invalid(target.kind.name, "", [("metadata.name", "Required value: name or generateName is required")])
        body = {"apiVersion": target.kind.api_version, "kind": target.kind.name} | body
        self._admit(request, body, None)
        if _is_dry(request):
            return body
        return self._store.create(body)

    def _admit(self, request: web.Request, value: Object, current: Object | None) -> None:
        """Check an object and fill in what it leaves open. Raises ApiError."""
        schema.check(value, is_strict=request.query.get("fieldValidation") == "Strict")
        if value["kind"] == "Secret" and "stringData" in value:
            value["data"] = value.get("data", {}) | _encoded(value.pop("stringData"))
        semantics.check(value, current)
        defaults.fill(value)
        admit_to_namespace(self._store, value)
        self._allocate(value)

    def _change(self, request: web.Request, target: Target, body: Object) -> Object:
        current = self._store.get(*target.key)
        if "apply-patch" in request.content_type and not target.subresource:
            return self._apply(request, target, body, current)
        current = self._store.require(target.kind, target.namespace, target.name)
        if target.subresource == "scale":
            return self._scale(request, target, body, current)
        new = _patched(request, current, body) if request.method == "PATCH" else copy.deepcopy(body)
        _check_revision(target, new, current)
        if target.subresource == "status":
            new = current | {"status": new.get("status")}
        elif "status" in target.kind.subresources and "status" in current:
            new["status"] = current["status"]
        return self._replace(request, new, current)

    def _apply(self, request: web.Request, target: Target, body: Object, current: Object | None) -> Object:
        manager = request.query.get("fieldManager", "unknown")
        if current is None:
            new = self._create(request, target, copy.deepcopy(body))
        else:
            before = self._applied.get(target.key, {}).get(manager)
            new = self._replace(request, merge.apply(current, body, before), current)
        if not _is_dry(request):
            self._applied.setdefault(target.key, {})[manager] = body
        return new

    def _replace(self, request: web.Request, new: Object, current: Object) -> Object:
        new["metadata"] = new.get("metadata", {}) | {
            n: current["metadata"][n] for n in _PLACE if n in current["metadata"]
        }
        if new["kind"] == "Service" and "clusterIP" in current["spec"]:
            new["spec"].setdefault("clusterIP", current["spec"]["clusterIP"])
        self._admit(request, new, current)
        return new if _is_dry(request) else self._store.replace(new)

    def _scale(self, request: web.Request, target: Target, body: Object, current: Object) -> Object:
        scale = merge.merge(scale_of(current), body, is_strategic=False) if request.method == "PATCH" else body
        _check_revision(target, scale, current)
        if not _is_dry(request):
            self._store.set_scale(target.key, int(scale["spec"].get("replicas", 0)))
        return scale_of(self._store.require(target.kind, target.namespace, target.name))

    def _delete(self, request: web.Request, target: Target, options: Object) -> Object:
        if target.name:
            doomed = [self._store.require(target.kind, target.namespace, target.name)]
        else:
            doomed = self._matching(request, target)
        for value in doomed if not _is_dry(request) else ():
            self._remove(value, options.get("gracePeriodSeconds", request.query.get("gracePeriodSeconds")))
        details = {"name": target.name, "kind": target.kind.plural}
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}

    def _remove(self, value: Object, grace_s: Any) -> None:
        key = key_of(value)
        self._applied.pop(key, None)
        if value["kind"] == "Pod":
            default_s = value["spec"]["terminationGracePeriodSeconds"]
            self._store.begin_delete(key, int(default_s if grace_s is None else grace_s))
        else:
            self._store.remove(key)

    async def _watch(self, request: web.Request, target: Target) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)

        async def send(type_: str, value: Object) -> None:
            await response.write(json.dumps({"type": type_, "object": value}).encode() + b"\n")

        revision = int(request.query.get("resourceVersion") or 0)
        if request.query.get("sendInitialEvents") == "true" or not revision:
            revision = self._store.revision
            for value in self._matching(request, target):
                await send("ADDED", value)
            if request.query.get("sendInitialEvents") == "true":
                await send("BOOKMARK", _bookmark(target, revision))
        try:
            async with asyncio.timeout(float(request.query.get("timeoutSeconds") or 1800)):
                await self._send_changes(request, target, revision, send)
        except TimeoutError:
            return response

    async def _send_changes(self, request: web.Request, target: Target, revision: int, send: Any) -> None:
        labels, fields = request.query.get("labelSelector", ""), request.query.get("fieldSelector", "")
        while True:
            newer = [event for event in self._store.events if event.revision > revision]
            for event in newer:
                kind, namespace, _ = event.key
                is_ours = kind == target.kind.name and target.namespace in {"", namespace}
                if is_ours and selectors.matches(event.object, labels, fields):
                    await send(event.type, event.object)
                revision = event.revision
            await self._store.wait(revision)

    async def _log(self, request: web.Request, target: Target) -> web.StreamResponse:
        pod = self._store.require(target.kind, target.namespace, target.name)
        container = request.query.get("container") or pod["spec"]["containers"][0]["name"]
        path = self._logs(target.key, container)
        if path is None:
            message = f'container "{container}" in pod "{target.name}" is waiting to start'
            raise ApiError(400, "BadRequest", message)
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        is_following = request.query.get("follow") in {"1", "true"}
        with path.open("rb") as file:
            while True:
                is_over = not is_following or not self._is_running(target)
                if chunk := file.read():
                    await response.write(chunk)
                elif is_over:
                    return response
                else:
                    await asyncio.sleep(FOLLOW_S)

    def _is_running(self, target: Target) -> bool:
        pod = self._store.get(*target.key)
        return pod is not None and (pod.get("status") or {}).get("phase") not in {"Succeeded", "Failed"}


def admit_to_namespace(store: Store, value: Object) -> None:
    """Raise ApiError when the object's namespace is missing, or does not take such pods."""
    namespace = value["metadata"].get("namespace")
    if not namespace:
        return
    home = store.get("Namespace", "", namespace)
    if home is None:
        raise ApiError(404, "NotFound", f'namespaces "{namespace}" not found')
    if value["kind"] == "Pod":
        pod_security.admit(value, (home["metadata"].get("labels") or {}).get(pod_security.LABEL, "privileged"))


def scale_of(value: Object) -> Object:
    meta = value["metadata"]
    kept = {name: meta[name] for name in ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")}
    labels = (value["spec"].get("selector") or {}).get("matchLabels") or {}
    selector = ",".join(f"{key}={text}" for key, text in labels.items())
    status = {"replicas": (value.get("status") or {}).get("replicas", 0), "selector": selector}
    spec = {"replicas": value["spec"].get("replicas", 1)}
    return {"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": kept, "spec": spec, "status": status}


def _target(parts: list[str]) -> Target:
    match parts:
        case ["api", version, *rest]:
            group = ""
        case ["apis", group, version, *rest]:
            pass
        case _:
            raise no_such_resource()
    namespace = ""
    if rest[:1] == ["namespaces"] and len(rest) >= 3 and (group, version, rest[2]) in BY_PATH:
        namespace, rest = rest[1], rest[2:]
    plural, name, subresource = [*rest, "", "", ""][:3]
    kind = BY_PATH.get((group, version, plural))
    if kind is None or (subresource and subresource not in {*kind.subresources, "log"}):
        raise no_such_resource()
    return Target(kind, namespace, name, subresource)


def _asked(request: web.Request, target: Target) -> Request:
    verb = _VERBS.get(request.method, request.method.lower())
    if verb == "get" and not target.name:
        verb = "watch" if "watch" in request.query else "list"
    if verb == "delete" and not target.name:
        verb = "deletecollection"
    resource = target.kind.plural + (f"/{target.subresource}" if target.subresource else "")
    return Request(verb, target.kind.group, resource, target.namespace, target.name)


async def _body(request: web.Request) -> Any:
    raw = await request.read()
    if not raw:
        return {}
    if raw.startswith(protobuf.MAGIC):
        return protobuf.decode(raw)
    try:
        return yaml.safe_load(raw) if "yaml" in request.content_type else json.loads(raw)
    except (ValueError, yaml.YAMLError) as e:
        raise ApiError(400, "BadRequest", f"the body cannot be read: {e}") from e


def _patched(request: web.Request, current: Object, body: Any) -> Object:
    if "json-patch" in request.content_type:
        return merge.patch_json(current, body)
    return merge.merge(current, body, is_strategic="strategic" in request.content_type)


def _check_revision(target: Target, body: Object, current: Object) -> None:
    revision = (body.get("metadata") or {}).get("resourceVersion")
    if revision and revision != current["metadata"]["resourceVersion"]:
        raise conflict(target.kind.resource, target.name)


def _is_dry(request: web.Request) -> bool:
    return "All" in request.query.getall("dryRun", [])


def _bookmark(target: Target, revision: int) -> Object:
    meta = {"resourceVersion": str(revision), "annotations": {"k8s.io/initial-events-end": "true"}}
    return {"kind": target.kind.name, "apiVersion": target.kind.api_version, "metadata": meta}


def _encoded(texts: dict[str, str]) -> dict[str, str]:
    return {key: base64.b64encode(text.encode()).decode() for key, text in texts.items()}
