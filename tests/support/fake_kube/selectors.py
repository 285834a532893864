"""Which objects a label or field selector means."""

from __future__ import annotations

import re
from typing import Any

from tests.support.fake_kube.errors import ApiError

_SET = re.compile(r"^(?P<key>\S+)\s+(?P<op>in|notin)\s+\((?P<values>[^)]*)\)$")
_EQUAL = re.compile(r"^(?P<key>[^=!]+)(?P<op>==|=|!=)(?P<value>.*)$")
_TERM = re.compile(r",(?![^(]*\))")


def matches(value: dict[str, Any], labels: str, fields: str) -> bool:
    """Whether an object is meant. Raises ApiError for a selector that is none."""
    own = value["metadata"].get("labels") or {}
    return all(_has_label(own, term) for term in _terms(labels)) and all(_has_field(value, t) for t in _terms(fields))


def selects(selector: dict[str, Any] | None, labels: dict[str, str]) -> bool:
    """Whether a `matchLabels`/`matchExpressions` selector means something with these labels; an empty one means all."""
    selector = selector or {}
    equal = all(labels.get(key) == value for key, value in (selector.get("matchLabels") or {}).items())
    return equal and all(_expression(labels, item) for item in selector.get("matchExpressions") or ())


def _terms(selector: str) -> list[str]:
    return [term.strip() for term in _TERM.split(selector) if term.strip()]


def _has_label(labels: dict[str, str], term: str) -> bool:
    if found := _SET.match(term):
        values = {value.strip() for value in found["values"].split(",")}
        return (labels.get(found["key"]) in values) == (found["op"] == "in")
    if found := _EQUAL.match(term):
        return (labels.get(found["key"].strip()) == found["value"].strip()) == (found["op"] != "!=")
    return term[1:] not in labels if term.startswith("!") else term in labels


def _has_field(value: Any, term: str) -> bool:
    found = _EQUAL.match(term)
    if found is None:
        raise ApiError(400, "BadRequest", f"invalid field selector {term!r}")
    for part in found["key"].split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return (str(value or "") == found["value"]) == (found["op"] != "!=")


def _expression(labels: dict[str, str], item: dict[str, Any]) -> bool:
    own = labels.get(item["key"])
    match item["operator"]:
        case "In":
            return own in item["values"]
        case "NotIn":
            return own not in item["values"]
        case "Exists":
            return own is not None
        case _:
            return own is None
