"""Differences are listed place by place."""

from __future__ import annotations

from inferflux.policy.diff import Change, diff


def test_values_are_added_removed_and_changed():
    """Nested, in lists, of other types."""
    before = {"a": {"x": 1, "y": [1, 2, {"z": True}]}, "b": 1}
    after = {"a": {"x": 1.5, "y": [1, 3, {"z": 1}, 4]}, "c": {"d": []}}

    assert diff(before, after) == [
        Change("$.a.x", "changed", 1, 1.5),
        Change("$.a.y[1]", "changed", 2, 3),
        Change("$.a.y[2].z", "changed", True, 1),
        Change("$.a.y[3]", "added", after=4),
        Change("$.b", "removed", before=1),
        Change("$.c", "added", after={"d": []}),
    ]
    assert diff(before, before) == []
