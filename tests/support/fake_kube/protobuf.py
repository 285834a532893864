"""Reads the few objects that Kubernetes' Go clients send as protobuf: Secrets, ConfigMaps, names, options of deletion.

Field numbers: generated.proto of k8s.io/api/core/v1, k8s.io/apimachinery/pkg/apis/meta/v1 and pkg/runtime.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

from tests.support.fake_kube.errors import ApiError

MAGIC = b"k8s\0"
Fields = dict[int, list[Any]]


def decode(raw: bytes) -> dict[str, Any]:
    """Return the object as JSON would have it. Raises ApiError for other kinds."""
    unknown = _fields(raw[len(MAGIC) :])
    type_meta, body = _fields(unknown[1][0]), _fields(unknown[2][0])
    kind = type_meta[2][0].decode()
    if kind == "DeleteOptions":
        return _delete_options(body)
    if kind not in {"Secret", "ConfigMap", "Namespace", "ServiceAccount"}:
        raise ApiError(415, "UnsupportedMediaType", f"protobuf is not supported for {kind}")
    decoded = {"apiVersion": type_meta[1][0].decode(), "kind": kind, "metadata": _metadata(body[1][0])}
    if kind == "Secret":
        return decoded | _secret(body)
    return decoded | ({"data": _text_map(body.get(2, []))} if kind == "ConfigMap" else {})


def _secret(body: Fields) -> dict[str, Any]:
    data = _map(body.get(2, []), lambda value: base64.b64encode(value).decode())
    return {"data": data} | ({"type": body[3][0].decode()} if 3 in body else {})


def _delete_options(body: Fields) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if 1 in body:
        options["gracePeriodSeconds"] = body[1][0]
    if 4 in body:
        options["propagationPolicy"] = body[4][0].decode()
    return options


def _metadata(raw: bytes) -> dict[str, Any]:
    fields = _fields(raw)
    names = {1: "name", 2: "generateName", 3: "namespace", 5: "uid", 6: "resourceVersion"}
    meta: dict[str, Any] = {name: fields[i][0].decode() for i, name in names.items() if fields.get(i, [b""])[0]}
    maps = {11: "labels", 12: "annotations"}
    return meta | {name: _text_map(fields[i]) for i, name in maps.items() if i in fields}


def _text_map(entries: list[bytes]) -> dict[str, str]:
    return _map(entries, bytes.decode)


def _map(entries: list[bytes], read: Callable[[bytes], str]) -> dict[str, str]:
    pairs = [_fields(entry) for entry in entries]
    return {pair[1][0].decode(): read(pair.get(2, [b""])[0]) for pair in pairs}


def _fields(raw: bytes) -> Fields:
    """Split a message into its fields, by number."""
    fields: Fields = {}
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value: Any
            value, at = _varint(raw, at)
        else:
            size, at = _varint(raw, at) if wire == 2 else (8 if wire == 1 else 4, at)
            value, at = raw[at : at + size], at + size
        fields.setdefault(number, []).append(value)
    return fields


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
