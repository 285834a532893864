"""The rules of tier 1 for one side of one kind of request, compiled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from inferflux.policy import patterns
from inferflux.policy.guardrails import (
    AnyRule,
    BlocklistRule,
    LengthRule,
    PatternRule,
    PiiRule,
    SecretsRule,
    UrlsRule,
)
from services.gateway.guardrails import forms
from services.gateway.guardrails.detectors import Detector, Expression, Expressions, Phrases, Urls
from services.gateway.guardrails.forms import Form
from services.gateway.guardrails.window import Window


@dataclass(frozen=True, slots=True)
class Screen:
    """What texts are held against. `lengths` are in the order of the document."""

    detectors: tuple[Detector, ...]
    lengths: tuple[LengthRule, ...]

    def window(self) -> Window:
        """Begin with a text."""
        return Window(self.detectors)

    def too_long(self, num_chars: int) -> list[LengthRule]:
        """Return the rules that so many characters are too many for."""
        return [rule for rule in self.lengths if num_chars > rule.max_chars]


def compile_screen(rules: Iterable[AnyRule]) -> Screen:
    """Compile the rules of tier 1 among `rules`; the others are not its business."""
    rules = list(rules)
    expressions = [e for rule in rules for e in _expressions(rule)]
    detectors: list[Detector] = [Expressions(expressions)] if expressions else []
    for is_case_sensitive in (True, False):
        lists = [r for r in rules if isinstance(r, BlocklistRule) and r.is_case_sensitive is is_case_sensitive]
        if lists:
            detectors.append(Phrases(lists))
    return Screen(tuple(detectors), tuple(rule for rule in rules if isinstance(rule, LengthRule)))


def _expressions(rule: AnyRule) -> list[Expression]:
    if isinstance(rule, PatternRule):
        return [Expression(patterns.read(pattern), rule, "REDACTED") for pattern in rule.patterns]
    if isinstance(rule, PiiRule):
        return [_expression(forms.PII[kind], rule) for kind in rule.types]
    if isinstance(rule, SecretsRule):
        return [_expression(forms.SECRETS[kind], rule) for kind in rule.types]
    if isinstance(rule, UrlsRule):
        return [Expression(patterns.read(forms.URL), rule, "URL", Urls(rule.allow, rule.deny).check)]
    return []


def _expression(form: Form, rule: PiiRule | SecretsRule) -> Expression:
    return Expression(patterns.read(form.pattern), rule, form.label, form.check)
