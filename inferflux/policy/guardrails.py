"""The section `guardrails` of the policy document: what may be said.

    {"rules": [{"name": "cards", "kind": "pii", "types": ["credit_card"], "action": "redact"}, ...]}

Tier 1 (`blocklist`, `pattern`, `pii`, `secrets`, `urls`, `length`) is decided in the gateway, tier 2 (`entities`,
`injection`, `profanity`) by guardrail workers, tier 3 (`rego`, `opa`) by policies as code. Every rule says where it
looks and for whom; what it does when it matches is its action.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

import re2
from pydantic import AfterValidator, Field, model_validator

from inferflux.policy import patterns, rego
from inferflux.policy.section import Section

MAX_RULES = 200
MAX_PHRASES = 20_000
MAX_HELD_CHARS = 1000
"""Longest match of a pattern on output: so much of a stream may have to wait for the end of one."""


class Action(StrEnum):
    """What a match means. ALLOW exempts the text it matches from all other rules of tier 1."""

    ALLOW = "allow"
    FLAG = "flag"
    REDACT = "redact"
    BLOCK = "block"


class Side(StrEnum):
    """Which way a text goes: to the model, or back."""

    INPUT = "input"
    OUTPUT = "output"


class Pii(StrEnum):
    """Personal data that can be told by its form, most of it by a checksum too."""

    EMAIL = "email"
    PHONE = "phone"
    CREDIT_CARD = "credit_card"
    IBAN = "iban"
    SSN = "ssn"
    IP_ADDRESS = "ip_address"


class Secret(StrEnum):
    """Credentials that can be told by their form."""

    AWS_ACCESS_KEY = "aws_access_key"
    GITHUB_TOKEN = "github_token"  # noqa: S105 - a name
    GOOGLE_API_KEY = "google_api_key"
    SLACK_TOKEN = "slack_token"  # noqa: S105 - a name
    STRIPE_KEY = "stripe_key"
    OPENAI_KEY = "openai_key"
    AZURE_KEY = "azure_key"
    PRIVATE_KEY = "private_key"
    JWT = "jwt"


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
Matcher = Annotated[str, Field(min_length=1, max_length=256)]
Host = Annotated[str, Field(pattern=r"^(\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)*$", max_length=253)]
Phrase = Annotated[str, Field(min_length=1, max_length=200)]
Share = Annotated[float, Field(gt=0, le=1)]


def _check_pattern(pattern: str) -> str:
    options = re2.Options()
    options.log_errors = False
    try:
        known = patterns.read(pattern)
        for source in (known.full, known.partial):
            re2.compile(source, options)
    except re2.error as e:
        raise ValueError("is too large for RE2, or repeats something more than 1000 times") from e
    return pattern


Regex = Annotated[str, Field(min_length=1, max_length=patterns.MAX_PATTERN), AfterValidator(_check_pattern)]


def _check_module(module: str) -> str:
    rego.load_module(module)
    return module


class Rule(Section):
    """What all rules have. Empty `models` and `tenants`: all of them."""

    name: Name
    """Named in refusals, metrics and the audit log."""
    action: Action
    scope: Annotated[tuple[Side, ...], Field(min_length=1)] = (Side.INPUT, Side.OUTPUT)
    """Which texts it looks at."""
    models: tuple[Matcher, ...] = ()
    tenants: tuple[Matcher, ...] = ()


class BlocklistRule(Rule):
    """Phrases, whatever their case unless `is_case_sensitive`; parts of words only if not `is_whole_words`."""

    kind: Literal["blocklist"]
    phrases: Annotated[tuple[Phrase, ...], Field(min_length=1, max_length=MAX_PHRASES)]
    is_case_sensitive: bool = False
    is_whole_words: bool = True


class PatternRule(Rule):
    """Regular expressions: what Python's syntax and RE2's have in common."""

    kind: Literal["pattern"]
    patterns: Annotated[tuple[Regex, ...], Field(min_length=1, max_length=200)]

    @model_validator(mode="after")
    def _is_bounded(self) -> PatternRule:
        """Refuse patterns that could hold back a stream for ever."""
        for number, pattern in enumerate(self.patterns if Side.OUTPUT in self.scope else ()):
            longest = patterns.read(pattern).max_chars
            if longest is None or longest > MAX_HELD_CHARS:
                size = "any number of" if longest is None else f"up to {longest}"
                raise ValueError(
                    f"patterns[{number}] matches {size} characters; on output the limit is {MAX_HELD_CHARS}: "
                    "bound it, as in .{0,80}"
                )
        return self


class PiiRule(Rule):
    """Personal data, of the listed kinds."""

    kind: Literal["pii"]
    types: Annotated[tuple[Pii, ...], Field(min_length=1)] = tuple(Pii)


class SecretsRule(Rule):
    """Credentials, of the listed kinds."""

    kind: Literal["secrets"]
    types: Annotated[tuple[Secret, ...], Field(min_length=1)] = tuple(Secret)


class UrlsRule(Rule):
    """URLs whose host is in `deny`, or, if there is an `allow`, not in that; `*.example.com` means all below it."""

    kind: Literal["urls"]
    allow: Annotated[tuple[Host, ...], Field(max_length=1000)] = ()
    deny: Annotated[tuple[Host, ...], Field(max_length=1000)] = ()


class LengthRule(Rule):
    """Texts longer than `max_chars`, all of a request's input, or all of one choice of its output."""

    kind: Literal["length"]
    action: Literal[Action.BLOCK, Action.FLAG]
    max_chars: Annotated[int, Field(gt=0, lt=2**31)]


class JudgedRule(Rule):
    """Rules whose verdict comes from outside the gateway and may fail to come. No verdict in time: `on_failure`."""

    deadline_ms: Annotated[int, Field(gt=0, le=10_000)] = 200
    on_failure: Literal["allow", "block"] = "block"


class DecidedRule(JudgedRule):
    """Rules that say yes or no to a whole text."""

    action: Literal[Action.BLOCK, Action.FLAG]


class EntitiesRule(JudgedRule):
    """Names of people, places and the like, found by presidio; `types` are presidio's names."""

    kind: Literal["entities"]
    action: Literal[Action.BLOCK, Action.FLAG, Action.REDACT]
    types: Annotated[tuple[Literal["PERSON", "LOCATION", "NRP", "ORGANIZATION", "DATE_TIME"], ...], Field(min_length=1)]
    threshold: Share = 0.5

    @model_validator(mode="after")
    def _redacts_input_only(self) -> EntitiesRule:
        if self.action is Action.REDACT and Side.OUTPUT in self.scope:
            raise ValueError("entities can be redacted in the input only; in the output, block or flag")
        return self


class InjectionRule(DecidedRule):
    """Texts that mean what known prompt injections mean: by the similarity of their embeddings."""

    kind: Literal["injection"]
    threshold: Share = 0.6
    examples: Annotated[tuple[Phrase, ...], Field(max_length=200)] = ()
    """Texts to recognise besides the built-in ones."""


class ProfanityRule(DecidedRule):
    """Texts that a classifier takes for offensive."""

    kind: Literal["profanity"]
    threshold: Share = 0.8


class RegoRule(DecidedRule):
    """A Rego module of the package `inferflux.guardrails`; a non-empty set `deny` is a match."""

    kind: Literal["rego"]
    module: Annotated[str, Field(min_length=1, max_length=64 * 1024), AfterValidator(_check_module)]


class OpaRule(DecidedRule):
    """A decision of the OPA server that the gateway knows: the document at `path` has `deny` as a Rego rule's."""

    kind: Literal["opa"]
    path: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(/[A-Za-z0-9_]+)*$", max_length=256)]


TextRule = BlocklistRule | PatternRule | PiiRule | SecretsRule | UrlsRule
ModelRule = EntitiesRule | InjectionRule | ProfanityRule
CodeRule = RegoRule | OpaRule
AnyRule = Annotated[
    BlocklistRule
    | PatternRule
    | PiiRule
    | SecretsRule
    | UrlsRule
    | LengthRule
    | EntitiesRule
    | InjectionRule
    | ProfanityRule
    | RegoRule
    | OpaRule,
    Field(discriminator="kind"),
]


class GuardrailsSection(Section):
    """Absent: nothing is looked at."""

    rules: Annotated[tuple[AnyRule, ...], Field(max_length=MAX_RULES)] = ()

    @model_validator(mode="after")
    def _has_one_rule_a_name(self) -> GuardrailsSection:
        names = [rule.name for rule in self.rules]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"there are {names.count(name)} rules named {name!r}")
        return self
