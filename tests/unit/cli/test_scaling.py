"""What `inferctl pools scale` changes, and how `explain` puts a plan into words."""

from __future__ import annotations

from typing import Any

import pytest

from inferflux.cli import scaling
from inferflux.cli.failure import CliError, Exit

SPEC = {"model": "m", "role": "decode", "mode": "act", "min_replicas": 1, "max_replicas": 4, "hold_s": 600.0}
PLAN = {
    "at": 1000.0,
    "planner": "registry-1",
    "current": 3,
    "target": 3,
    "needed": 2,
    "bound": "",
    "terms": [
        {"name": "kv", "replicas": 0.5, "why": "room"},
        {"name": "sequences", "replicas": 1.5, "why": "12 requests"},
    ],
}


def pool(**changes: Any) -> dict[str, Any]:
    return {
        "id": "decode/m",
        "role": "decode",
        "model": "m",
        "workers": {"ready": 3},
        "spec": SPEC,
        "plan": PLAN,
    } | changes


def test_a_size_is_both_bounds() -> None:
    assert scaling.changes(3, None, None, None, []) == {"min_replicas": 3, "max_replicas": 3}


def test_bounds_mode_and_fields() -> None:
    changed = scaling.changes(None, 1, 4, "act", ["hold_s=30", "target=statefulset/decode"])

    assert changed == {
        "min_replicas": 1,
        "max_replicas": 4,
        "mode": "act",
        "hold_s": 30,
        "target": "statefulset/decode",
    }


@pytest.mark.parametrize(
    "given", [(3, 1, None, None, []), (None, None, None, None, []), (None, None, None, None, ["hold_s"])]
)
def test_what_makes_no_sense_is_wrong_usage(given: tuple[Any, ...]) -> None:
    with pytest.raises(CliError) as error:
        scaling.changes(*given)

    assert error.value.code is Exit.USAGE


def test_a_plan_in_words() -> None:
    """The largest term first, and why more is kept than is needed now."""
    lines = "\n".join(scaling.reasons(pool(), now=1002.0))

    assert "decode/m, 2 s ago by registry-1, mode act" in lines
    assert "it has 3 workers and should have 3" in lines
    assert lines.index("sequences asks for 1.50: 12 requests") < lines.index("kv asks for 0.50: room")
    assert "needed now: 2, between 1 and 4" in lines
    assert "more was needed within the last 600 s" in lines


def test_what_stands_in_the_way_is_said() -> None:
    failed = {"at": 1000.0, "planner": "registry-0", "error": "Kubernetes knows no statefulset/decode"}

    assert "Kubernetes knows no statefulset/decode" in "\n".join(scaling.reasons(pool(plan=failed), now=1001.0))
    assert "no planner leads" in "\n".join(scaling.reasons(pool(), now=1100.0))
    assert "not looked at yet" in "\n".join(scaling.reasons(pool(plan=None), now=0.0))
    assert "has no spec" in "\n".join(scaling.reasons(pool(spec=None, plan=None), now=0.0))


def test_a_role_names_a_pool_where_there_is_one() -> None:
    pools = [pool(), pool(id="decode/n", model="n"), pool(id="prefill/m", role="prefill")]

    assert scaling.find("prefill", pools)["id"] == "prefill/m"
    assert scaling.find("decode/n", pools)["id"] == "decode/n"
    with pytest.raises(CliError, match="which one: decode/m, decode/n"):
        scaling.find("decode", pools)
    with pytest.raises(CliError, match="there is no pool 'x'; there are decode/m"):
        scaling.find("x", pools)
