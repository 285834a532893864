"""Rego modules of guardrails, compiled. An engine serves only the thread that has made it."""

from __future__ import annotations

from typing import Any

import orjson

QUERY = "data.inferflux.guardrails.deny"
UNDEFINED = '"<undefined>"'


def load_module(module: str) -> Any:
    """Compile a module. Raises ValueError, which says where it is wrong."""
    import regorus  # noqa: PLC0415 - 11 MB, and few policies are code

    engine = regorus.Engine()
    try:
        engine.add_policy("policy.rego", module)
        denies(engine, {})
    except RuntimeError as e:
        why = str(e).partition("Stack backtrace")[0].strip()
        raise ValueError(f"is no module of the package inferflux.guardrails with a rule deny:\n{why[:500]}") from e
    return engine


def denies(engine: Any, document: dict[str, Any]) -> bool:
    """Ask a compiled module. Raises RuntimeError or TypeError when it gives no answer."""
    engine.set_input_json(orjson.dumps(document).decode())
    answer = engine.eval_rule_as_json(QUERY)
    return False if answer == UNDEFINED else is_denied(orjson.loads(answer))


def is_denied(deny: object) -> bool:
    """Read `deny`: a set of reasons, or a boolean; None: undefined, which denies nothing. Raises TypeError."""
    if deny is None or isinstance(deny, (bool, list)):
        return bool(deny)
    raise TypeError("deny is neither a set nor a boolean")
