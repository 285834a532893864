"""The section `guardrails` of the policy, compiled: which rules look at what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from inferflux.policy.guardrails import (
    AnyRule,
    CodeRule,
    EntitiesRule,
    GuardrailsSection,
    InjectionRule,
    ModelRule,
    OpaRule,
    ProfanityRule,
    RegoRule,
    Side,
)
from services.gateway.guardrails.code import RegoCode
from services.gateway.guardrails.screen import Screen, compile_screen

MAX_KNOWN = 1024
"""Tenants times models whose rules are remembered."""


@dataclass(frozen=True)
class Checks:
    """The rules for one side of some requests; at least one."""

    rules: tuple[AnyRule, ...]

    @cached_property
    def screen(self) -> Screen:
        """Those of tier 1."""
        return compile_screen(self.rules)

    @cached_property
    def judged(self) -> tuple[ModelRule, ...]:
        """Those of tier 2."""
        return tuple(rule for rule in self.rules if isinstance(rule, (EntitiesRule, InjectionRule, ProfanityRule)))

    @cached_property
    def code(self) -> tuple[CodeRule, ...]:
        """Those of tier 3."""
        return tuple(rule for rule in self.rules if isinstance(rule, (RegoRule, OpaRule)))


class Guardrails:
    """All rules of one revision of the policy. Requests with the same rules share what is compiled of them."""

    def __init__(self, section: GuardrailsSection) -> None:
        self._rules = section.rules
        self._known: dict[tuple[Side, str, str], Checks | None] = {}
        self._compiled: dict[tuple[str, ...], Checks] = {}
        self._rego = {rule.name: RegoCode(rule.module) for rule in section.rules if isinstance(rule, RegoRule)}
        for side in Side:  # now, and not at the cost of the first request
            if checks := self._checks(tuple(r for r in self._rules if side in r.scope and not (r.models or r.tenants))):
                _ = checks.screen

    def checks(self, side: Side, tenant: str, model: str) -> Checks | None:
        """Return what looks at one side of a tenant's requests to a model; None: nothing."""
        who = (side, tenant, model)
        if who not in self._known:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[who] = self._checks(tuple(r for r in self._rules if _is_for(r, side, tenant, model)))
        return self._known[who]

    def rego(self, rule: RegoRule) -> RegoCode:
        """Return a rule's module."""
        return self._rego[rule.name]

    def _checks(self, rules: tuple[AnyRule, ...]) -> Checks | None:
        if not rules:
            return None
        return self._compiled.setdefault(tuple(rule.name for rule in rules), Checks(rules))


def compile_guardrails(section: GuardrailsSection | None) -> Guardrails | None:
    """Prepare a section for requests; None: nothing is looked at."""
    return Guardrails(section) if section is not None and section.rules else None


def _is_for(rule: AnyRule, side: Side, tenant: str, model: str) -> bool:
    is_theirs = (not rule.tenants or tenant in rule.tenants) and (not rule.models or model in rule.models)
    return side in rule.scope and is_theirs
