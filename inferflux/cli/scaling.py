"""`inferctl pools get|scale|explain`: what pools have, should have, and why."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from inferflux.cli.api import Api
from inferflux.cli.failure import CliError, Exit
from inferflux.cli.output import Format, note, print_json, print_table

PATH = "/v1/admin/pools"
COLUMNS = ("pool", "workers", "size", "target", "min", "max", "mode", "reason")
STALE_S = 30.0
Document = dict[str, Any]


def get(name: str | None, output: Format) -> None:
    """Print pools."""
    with Api() as api:
        answer = api.get(PATH)
    chosen = [pool for pool in answer["data"] if name is None or name in (pool["id"], pool["role"])]
    if name is not None and not chosen:
        raise CliError(unknown(name, answer["data"]))
    if output is Format.JSON:
        print_json(answer | {"data": chosen})
        return
    print_table(COLUMNS, map(row, chosen))


def changes(
    size: int | None, at_least: int | None, at_most: int | None, mode: str | None, settings: Sequence[str]
) -> Document:
    """Collect what is to change in a spec."""
    if size is not None and (at_least is not None or at_most is not None):
        raise CliError("a size excludes --min and --max", Exit.USAGE)
    given = {
        "min_replicas": size if size is not None else at_least,
        "max_replicas": size if size is not None else at_most,
        "mode": str(mode) if mode else None,
    }
    changed = {key: value for key, value in given.items() if value is not None} | dict(map(setting, settings))
    if not changed:
        raise CliError("nothing to change: give a size, --min, --max, --mode or --set", Exit.USAGE)
    return changed


def setting(text: str) -> tuple[str, Any]:
    """Read KEY=VALUE; the value is a number where it looks like one."""
    key, separator, value = text.partition("=")
    if not separator:
        raise CliError(f"--set {text!r}: KEY=VALUE is missing its =", Exit.USAGE)
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def scale(name: str, changed: Mapping[str, Any], output: Format) -> None:
    """Change one spec and leave the others as they are; if somebody changed one meanwhile, that fails."""
    with Api() as api:
        answer = api.get(PATH)
        pool = find(name, answer["data"])
        spec = (pool["spec"] or {"model": pool["model"], "role": pool["role"]}) | dict(changed)
        if "max_replicas" not in changed and spec.get("min_replicas", 1) > spec.get("max_replicas", 8):
            spec["max_replicas"] = spec["min_replicas"]
        others = [other["spec"] for other in answer["data"] if other["is_put"] and other["id"] != pool["id"]]
        body = {"pools": [*others, spec], "expected_revision": answer["revision"]}
        revision = api.put(PATH, body)["revision"]
    if output is Format.JSON:
        print_json({"id": pool["id"], "spec": spec, "revision": revision})
        return
    note(f"{pool['id']}: {spec.get('min_replicas', 1)} to {spec.get('max_replicas', 8)} workers")
    if spec.get("mode", "advise") == "advise":
        note("  its mode is advise, so nobody acts on it: --mode act lets the planner")


def explain(name: str, output: Format) -> None:
    """Print why a pool should have its size."""
    with Api() as api:
        pool = find(name, api.get(PATH)["data"])
    if output is Format.JSON:
        print_json(pool)
        return
    for line in reasons(pool, time.time()):
        note(line)


def reasons(pool: Document, now: float) -> list[str]:
    """Put a pool's plan into words."""
    spec, plan = pool["spec"], pool["plan"]
    if spec is None:
        return [f"{pool['id']} has no spec, so nobody plans it: inferctl pools scale {pool['id']} --min 1 --max 4"]
    if plan is None:
        return [f"{pool['id']} was not looked at yet"]
    age_s = now - plan["at"]
    lines = [f"{pool['id']}, {age_s:.0f} s ago by {plan['planner']}, mode {spec['mode']}"]
    if age_s > STALE_S:
        lines.append("  nobody has looked since: no planner leads")
    if "target" in plan:
        lines += [f"  it has {plan['current']} workers and should have {plan['target']}", *steps(spec, plan)]
    if plan.get("error"):
        lines.append(f"  could not act: {plan['error']}")
    return lines


def steps(spec: Document, plan: Document) -> list[str]:
    """Put the way from the load to the target into words."""
    terms = sorted(plan["terms"], key=lambda term: -term["replicas"])
    lines = [f"  {term['name']:>9} asks for {term['replicas']:.2f}: {term['why']}" for term in terms]
    bounds = f"between {spec['min_replicas']} and {spec['max_replicas']}"
    limit = f", limited by {plan['bound']}" if plan["bound"] else ""
    lines.append(f"  needed now: {plan['needed']}, {bounds}{limit}")
    if plan["target"] > plan["needed"]:
        lines.append(f"  more was needed within the last {spec['hold_s']:g} s, and may be again")
    return lines


def find(name: str, pools: Sequence[Document]) -> Document:
    """Find the pool that is meant. Raises CliError when there is none, or several."""
    chosen = [pool for pool in pools if name in (pool["id"], pool["role"])]
    if not chosen:
        raise CliError(unknown(name, pools))
    if len(chosen) > 1:
        raise CliError(f"which one: {', '.join(pool['id'] for pool in chosen)}?", Exit.USAGE)
    return chosen[0]


def unknown(name: str, pools: Sequence[Document]) -> str:
    """Say which pools there are."""
    return f"there is no pool {name!r}; there are {', '.join(pool['id'] for pool in pools) or 'none'}"


def row(pool: Document) -> tuple[Any, ...]:
    """Render a pool for people."""
    spec, plan = pool["spec"] or {}, pool["plan"] or {}
    workers = ", ".join(f"{count} {state}" for state, count in pool["workers"].items()) or "none"
    terms = sorted(plan.get("terms", ()), key=lambda term: -term["replicas"])
    why = plan.get("error") or (plan.get("bound") or terms[0]["name"] if terms else "" if spec else "not planned")
    keys = ("min_replicas", "max_replicas", "mode")
    return pool["id"], workers, plan.get("current"), plan.get("target"), *(spec.get(key) for key in keys), why
