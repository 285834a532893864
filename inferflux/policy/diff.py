"""What one JSON value changes in another, place by place. Lists are compared by position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from inferflux.policy.document import path

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Change:
    """One difference. `kind`: added, removed or changed; `before`, `after`: None where there is nothing."""

    path: str
    kind: str
    before: Any = None
    after: Any = None


def diff(before: Any, after: Any) -> list[Change]:
    """List all differences, in the order of the documents."""
    return list(_diff((), before, after))


def _diff(place: tuple[str | int, ...], before: Any, after: Any) -> Iterator[Change]:
    if before is _ABSENT:
        yield Change(path(place), "added", after=after)
    elif after is _ABSENT:
        yield Change(path(place), "removed", before=before)
    elif isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys((*before, *after)):
            yield from _diff((*place, name), before.get(name, _ABSENT), after.get(name, _ABSENT))
    elif isinstance(before, list) and isinstance(after, list):
        for index in range(max(len(before), len(after))):
            yield from _diff((*place, index), _item(before, index), _item(after, index))
    elif type(before) is not type(after) or before != after:
        yield Change(path(place), "changed", before, after)


def _item(items: list[Any], index: int) -> Any:
    return items[index] if index < len(items) else _ABSENT
