from __future__ import annotations

import pytest

from inferflux.errors import Conflict, InvalidRequest
from inferflux.types import Role
from services.registry.planner import book
from services.registry.planner.book import PoolBook
from services.registry.planner.spec import Mode, PoolSpec

SPEC = PoolSpec(model="org/tiny", role=Role.DECODE, max_replicas=3, target="statefulset/decode")


def test_specs_survive_being_written() -> None:
    assert book.decode(book.encode([SPEC])) == {"decode/org/tiny": SPEC}


def test_only_model_and_role_must_be_said() -> None:
    spec = PoolSpec.from_json({"model": "m", "role": "prefill"})

    assert (spec.mode, spec.name, spec.min_replicas) == (Mode.ADVISE, "prefill/m", 1)
    assert (spec.slo.latency_s, SPEC.slo.latency_s) == (2.0, 0.1)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"min_replicas": 9}, "min_replicas 9 is more than max_replicas 3"),
        ({"min_replicas": 0}, "min_replicas 0 is not from 1"),
        ({"max_replicas": 5000}, "max_replicas 5000 is not from 1 to 4096"),
        ({"max_replicas": True}, "max_replicas: must be a whole number"),
        ({"hold_s": "long"}, "hold_s: must be a number"),
        ({"hold_s": -1}, "hold_s -1 is not from 0"),
        ({"hold_s": float("nan")}, "hold_s: must be a number"),
        ({"utilization": 1.5}, "utilization 1.5 is not above 0"),
        ({"role": "gateway"}, "role: must be one of prefill, decode"),
        ({"mode": "yes"}, "mode: must be one of advise, act"),
        ({"model": "../x"}, "is not a model's name"),
        ({"target": "job/x"}, "is neither deployment/NAME nor statefulset/NAME"),
        ({"max_cost_per_hour": 5}, "need cost_per_hour"),
        ({"colour": "red"}, "unknown key 'colour'"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(InvalidRequest, match="pool") as refusal:
        PoolSpec.from_json(SPEC.to_json() | change)

    assert complaint in refusal.value.message


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        PoolSpec.from_json({"colour": 1, "min_replicas": "x"})

    for word in ("colour", "min_replicas", "model: missing", "role: missing"):
        assert word in refusal.value.message


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[[", "[" * 100_000, book.encode([SPEC, SPEC])])
def test_a_list_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        book.decode(text)


def test_a_change_to_an_old_revision_is_refused() -> None:
    first = PoolBook().put({}, 0, now_ms=100)
    second = first.put({SPEC.name: SPEC}, first.revision, now_ms=50)

    assert (first.revision, second.revision) == (100, 101)
    with pytest.raises(Conflict, match="revision 101"):
        second.put({}, first.revision, now_ms=200)
    assert second.put({}, 0, now_ms=200).revision == 200
