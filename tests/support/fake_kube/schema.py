"""Whether an object has the form that Kubernetes' published schema asks for."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from tests.support.fake_kube.errors import ApiError, invalid

VERSION = "1.37.0"


def check(value: dict[str, Any], *, is_strict: bool) -> None:
    """Raise ApiError: 400 for unknown fields when `is_strict`, 422 for missing and wrong ones."""
    validator = _validator(value["kind"], value["apiVersion"])
    if validator is None:
        return  # a custom resource: its own chart brings the schema
    errors = list(validator.iter_errors(value))
    unknown = [f"{_path(e)}: {e.message}" for e in errors if e.validator == "additionalProperties"]
    if unknown and is_strict:
        raise ApiError(400, "BadRequest", f"strict decoding error: {'; '.join(unknown)}")
    wrong = [(_path(e), e.message) for e in errors if e.validator != "additionalProperties"]
    if wrong:
        raise invalid(value["kind"], value["metadata"].get("name", ""), wrong)


def _path(error: Any) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path).lstrip(".")


@cache
def _validator(kind: str, api_version: str) -> Draft202012Validator | None:
    group, _, version = api_version.rpartition("/")
    name = "-".join(part for part in (kind.lower(), group.partition(".")[0], version) if part)
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{VERSION}-local-strict"
    file = folder / f"{name}.json"
    if not file.is_file():
        return None
    schema = Resource.from_contents(json.loads(file.read_text()))
    return Draft202012Validator(schema.contents, registry=schema @ _definitions())


@cache
def _definitions() -> Registry:
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{VERSION}-local-strict"
    return Resource.from_contents(json.loads((folder / "_definitions.json").read_text())) @ Registry()
