"""The objects of a cluster, their revisions, and what has happened to them."""

from __future__ import annotations

import asyncio
import copy
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tests.support.fake_kube.errors import ApiError, not_found
from tests.support.fake_kube.kinds import BY_NAME, Kind

Object = dict[str, Any]
Key = tuple[str, str, str]
"""Name of the kind, namespace (empty where there is none), name."""
IDENTITY = ("uid", "creationTimestamp", "name", "namespace", "deletionTimestamp", "deletionGracePeriodSeconds")


@dataclass(frozen=True, slots=True)
class Event:
    """One change; `object` is never changed afterwards."""

    revision: int
    type: str
    key: Key
    object: Object


class Store:
    """All objects. Used from one event loop; what it gives out must be copied before it is changed."""

    def __init__(self) -> None:
        self.revision = 1
        self.events: list[Event] = []
        self._objects: dict[Key, Object] = {}
        self._changed = asyncio.Event()

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        return self._objects.get((kind, namespace, name))

    def require(self, kind: Kind, namespace: str, name: str) -> Object:
        found = self.get(kind.name, namespace, name)
        if found is None:
            raise not_found(kind.resource, name)
        return found

    def list(self, kind: str, namespace: str = "") -> list[Object]:
        """All of a kind, in one namespace or in all of them, by name."""
        keys = sorted(k for k in self._objects if k[0] == kind and namespace in {"", k[1]})
        return [self._objects[key] for key in keys]

    def all(self) -> Iterator[Object]:
        yield from tuple(self._objects.values())

    def create(self, body: Object) -> Object:
        """Add an object. Raises ApiError when there is one of its name."""
        kind = BY_NAME[body["kind"]]
        new = copy.deepcopy(body)
        meta = new["metadata"]
        key = key_of(new)
        if key in self._objects:
            details = {"name": meta["name"], "group": kind.group, "kind": kind.plural}
            raise ApiError(409, "AlreadyExists", f'{kind.resource} "{meta["name"]}" already exists', details)
        meta |= {"uid": str(uuid.uuid4()), "creationTimestamp": now(), "generation": 1}
        return self._put("ADDED", key, new)

    def replace(self, new: Object) -> Object:
        """Change an object whose identity stays; the same again is no change."""
        key = key_of(new)
        current = self._objects[key]
        new = copy.deepcopy(new)
        meta = new["metadata"]
        meta |= {name: current["metadata"][name] for name in IDENTITY if name in current["metadata"]}
        meta["resourceVersion"] = current["metadata"]["resourceVersion"]
        meta["generation"] = current["metadata"]["generation"] + (new.get("spec") != current.get("spec"))
        return current if new == current else self._put("MODIFIED", key, new)

    def set_status(self, key: Key, status: Object) -> None:
        """Change an object's status, if it is still there."""
        if (current := self._objects.get(key)) is not None and current.get("status") != status:
            self._put("MODIFIED", key, copy.deepcopy(current) | {"status": copy.deepcopy(status)})

    def set_scale(self, key: Key, replicas: int) -> None:
        current = self._objects[key]
        if current["spec"].get("replicas") != replicas:
            self.replace(current | {"spec": current["spec"] | {"replicas": replicas}})

    def begin_delete(self, key: Key, grace_s: int) -> Object:
        """Mark a pod as going away; a second call may only shorten its grace."""
        current = copy.deepcopy(self._objects[key])
        meta = current["metadata"]
        grace_s = min(grace_s, meta.get("deletionGracePeriodSeconds", grace_s))
        meta |= {"deletionTimestamp": meta.get("deletionTimestamp", now()), "deletionGracePeriodSeconds": grace_s}
        return self._put("MODIFIED", key, current)

    def remove(self, key: Key) -> None:
        """Forget an object; nothing happens when it is gone."""
        if (current := self._objects.pop(key, None)) is not None:
            self._note("DELETED", key, copy.deepcopy(current))

    async def wait(self, revision: int) -> None:
        """Wait until there is something newer."""
        while self.revision <= revision:
            await self._changed.wait()

    def _put(self, type_: str, key: Key, new: Object) -> Object:
        self._objects[key] = new
        self._note(type_, key, new)
        return new

    def _note(self, type_: str, key: Key, value: Object) -> None:
        self.revision += 1
        value["metadata"]["resourceVersion"] = str(self.revision)
        self.events.append(Event(self.revision, type_, key, value))
        self._changed.set()
        self._changed = asyncio.Event()


def key_of(value: Object) -> Key:
    meta = value["metadata"]
    return value["kind"], meta.get("namespace", ""), meta["name"]


def owner(value: Object) -> str:
    """The uid of the controller that made the object; empty: nobody's."""
    references = value["metadata"].get("ownerReferences", ())
    return next((reference["uid"] for reference in references if reference.get("controller")), "")


def owned_by(parent: Object) -> list[Object]:
    """Make the reference that a child carries."""
    meta = parent["metadata"]
    reference = {"apiVersion": parent["apiVersion"], "kind": parent["kind"], "name": meta["name"], "uid": meta["uid"]}
    return [reference | {"controller": True, "blockOwnerDeletion": True}]


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
