"""What operators write, read strictly: every unknown, missing or ill-typed key is named, and all at once. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from inferflux.errors import InvalidRequest

Reader = Callable[[object], Any]
"""Takes a value of a document and returns that of a field. Raises ValueError that says what it must be."""


def read(
    kind: type[Any], document: object, readers: Mapping[str, Reader], *, what: str, param: str, prefix: str = ""
) -> dict[str, Any]:
    """Read a document into the fields of a dataclass. Raises InvalidRequest.

    `readers`: by name of the field. `what`: for messages, with its article; `prefix`: before what is wrong.
    """
    if not isinstance(document, dict):
        raise InvalidRequest(f"{what} must be an object", param=param)
    known = {f.name: f for f in fields(kind)}
    problems = [f"unknown key {str(key)[:64]!r}" for key in document if key not in known]
    problems += [f"{f.name}: missing" for f in known.values() if _is_required(f) and f.name not in document]
    values: dict[str, Any] = {}
    for key, value in document.items():
        if key in known:
            try:
                values[key] = readers[key](value)
            except ValueError as e:
                problems.append(f"{key}: {e}")
    if problems:
        raise InvalidRequest(prefix + "; ".join(problems), param=param)
    return values


def text(value: object) -> str:
    """Text."""
    if not isinstance(value, str):
        raise ValueError("must be text")  # noqa: TRY004 - the document's fault, not the code's
    return value


def flag(value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")  # noqa: TRY004
    return value


def integer(value: object) -> int:
    """A whole number; true and false are none."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("must be a whole number")  # noqa: TRY004
    return value


def number(value: object) -> float:
    """A number, not NaN."""
    if not isinstance(value, int | float) or isinstance(value, bool) or value != value:  # noqa: PLR0124 - NaN
        raise ValueError("must be a number")
    return float(value)


def _is_required(f: Field[Any]) -> bool:
    return f.default is MISSING and f.default_factory is MISSING
