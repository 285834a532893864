"""What guardrails say of a request, and to its client. Never the text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from inferflux.errors import ContentPolicyViolation, GuardrailUnavailable
from inferflux.policy.guardrails import (
    Action,
    EntitiesRule,
    InjectionRule,
    OpaRule,
    ProfanityRule,
    RegoRule,
    Rule,
    Side,
)
from inferflux.telemetry import metrics


@dataclass(frozen=True, slots=True)
class Verdict:
    """A rule that matched. `label`: what it found, by the name of its kind."""

    rule: Rule
    side: Side
    label: str

    def document(self) -> dict[str, Any]:
        """Describe the verdict for policies as code and for dry runs."""
        return {
            "rule": self.rule.name,
            "tier": tier(self.rule),
            "side": self.side.value,
            "action": self.rule.action.value,
            "label": self.label,
        }


class Verdicts:
    """All verdicts on one request: each rule counts once a side."""

    def __init__(self, *, is_counted: bool = True) -> None:
        self._is_counted = is_counted
        self._all: dict[tuple[str, Side], Verdict] = {}

    def add(self, rule: Rule, side: Side, label: str) -> bool:
        """Take a verdict; tells whether it is news."""
        if (rule.name, side) in self._all:
            return False
        self._all[rule.name, side] = Verdict(rule, side, label)
        if self._is_counted:
            _counter(rule.name, rule.action, side).inc()
        return True

    def documents(self) -> list[dict[str, Any]]:
        """Describe all verdicts."""
        return [verdict.document() for verdict in self._all.values()]

    def names(self) -> list[str]:
        """Return the names of the rules that matched."""
        return list(dict.fromkeys(name for name, _ in self._all))


def tier(rule: Rule) -> int:
    """Say where a rule is decided: 1 gateway, 2 guardrail worker, 3 policy as code."""
    if isinstance(rule, (RegoRule, OpaRule)):
        return 3
    return 2 if isinstance(rule, (EntitiesRule, InjectionRule, ProfanityRule)) else 1


def violation(rule: Rule, side: Side) -> ContentPolicyViolation:
    """Make the refusal of a text."""
    return ContentPolicyViolation(f"the {side.value} is against the rule {rule.name!r}", param=rule.name)


def unavailable(rule: Rule) -> GuardrailUnavailable:
    """Make the refusal of a request whose rule could not be asked."""
    return GuardrailUnavailable(f"the rule {rule.name!r} could not be asked in time", retry_after_s=1)


@cache
def _counter(rule: str, action: Action, side: Side) -> Any:
    return metrics.GUARDRAIL_VERDICTS.labels(rule, action.value, side.value)


@cache
def seconds(number: int, side: Side) -> Any:
    """Return the histogram of the verdicts of a tier."""
    return metrics.GUARDRAIL_SECONDS.labels(str(number), side.value)
