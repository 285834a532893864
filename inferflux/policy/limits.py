"""The section `limits` of the policy document: how much anybody may ask for.

    {"rate_limit": {"defaults": {"key": {"requests_per_minute": 60}}, "tenants": {"acme": {"tokens_per_minute": 9000}}},
     "budgets": {"teams": {"acme/research": {"usd_per_month": 250}}, "prices": {"*": {"input": 0.4, "output": 1.6}}},
     "when_store_is_away": "local_shares"}

A request is counted against all limits of its key, of the key's team and of its tenant. An entry for a name takes the
place of the default of its scope as a whole; what an entry leaves out is not limited. Money is counted in millionths of
a dollar, so that everything that is counted is an integer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import Field, StringConstraints

from inferflux.policy.section import Section

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
MICRO = 1_000_000
MAX_COUNT = 10**12
MAX_USD = 10**9
MAX_ENTRIES = 10_000
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)] | None
Usd = Annotated[float, Field(gt=0, le=MAX_USD)] | None
Dollars = Annotated[float, Field(ge=0, le=MAX_USD)]
TenantName = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
TeamName = Annotated[str, StringConstraints(pattern=f"^{NAME}/{NAME}$")]
KeyName = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Scope(StrEnum):
    """Whose requests are counted together."""

    KEY = "key"
    TEAM = "team"
    TENANT = "tenant"


class Unit(StrEnum):
    """What is counted."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    MICRO_USD = "micro_usd"
    SLOTS = "slots"


class Span(StrEnum):
    """How long it counts: for the 60 s after it, until a day or a month of UTC is over, or while it runs."""

    MINUTE = "minute"
    DAY = "day"
    MONTH = "month"
    RUNNING = "running"


class Kind(StrEnum):
    """A limit of one unit and span; named as in the document."""

    REQUESTS_PER_MINUTE = "requests_per_minute"
    TOKENS_PER_MINUTE = "tokens_per_minute"
    CONCURRENT_REQUESTS = "concurrent_requests"
    TOKENS_PER_DAY = "tokens_per_day"
    TOKENS_PER_MONTH = "tokens_per_month"
    USD_PER_DAY = "usd_per_day"
    USD_PER_MONTH = "usd_per_month"

    @property
    def unit(self) -> Unit:
        return _UNITS[self]

    @property
    def span(self) -> Span:
        return _SPANS[self]


_UNITS = {
    Kind.REQUESTS_PER_MINUTE: Unit.REQUESTS,
    Kind.TOKENS_PER_MINUTE: Unit.TOKENS,
    Kind.CONCURRENT_REQUESTS: Unit.SLOTS,
    Kind.TOKENS_PER_DAY: Unit.TOKENS,
    Kind.TOKENS_PER_MONTH: Unit.TOKENS,
    Kind.USD_PER_DAY: Unit.MICRO_USD,
    Kind.USD_PER_MONTH: Unit.MICRO_USD,
}
_SPANS = {
    Kind.REQUESTS_PER_MINUTE: Span.MINUTE,
    Kind.TOKENS_PER_MINUTE: Span.MINUTE,
    Kind.CONCURRENT_REQUESTS: Span.RUNNING,
    Kind.TOKENS_PER_DAY: Span.DAY,
    Kind.TOKENS_PER_MONTH: Span.MONTH,
    Kind.USD_PER_DAY: Span.DAY,
    Kind.USD_PER_MONTH: Span.MONTH,
}


class Rates(Section):
    """How fast, and how much at a time. Tokens are those of prompt and response together."""

    requests_per_minute: Count = None
    tokens_per_minute: Count = None
    concurrent_requests: Count = None


class Budget(Section):
    """How much in all, by calendar days and months of UTC."""

    tokens_per_day: Count = None
    tokens_per_month: Count = None
    usd_per_day: Usd = None
    usd_per_month: Usd = None


A = TypeVar("A", Rates, Budget)


class ByScope(Section, Generic[A]):
    """What each key, team or tenant has that has no entry of its own."""

    key: A | None = None
    team: A | None = None
    tenant: A | None = None


class Entries(Section, Generic[A]):
    """Limits by name. A team is named with its tenant: `acme/research`."""

    defaults: ByScope[A] | None = None
    keys: dict[KeyName, A] = Field(default_factory=dict, max_length=MAX_ENTRIES)
    teams: dict[TeamName, A] = Field(default_factory=dict, max_length=MAX_ENTRIES)
    tenants: dict[TenantName, A] = Field(default_factory=dict, max_length=MAX_ENTRIES)

    def amounts(self, scope: Scope, owner: str) -> A | None:
        """Find what an owner has: its entry, or the default of its scope."""
        named: Mapping[str, A] = {Scope.KEY: self.keys, Scope.TEAM: self.teams, Scope.TENANT: self.tenants}[scope]
        default = getattr(self.defaults, scope) if self.defaults is not None else None
        return named.get(owner, default)


class Price(Section):
    """Dollars for a million tokens."""

    input: Dollars
    output: Dollars


class RateLimitSection(Entries[Rates]):
    """Rates and concurrency."""


class BudgetsSection(Entries[Budget]):
    """Budgets, and what tokens cost.

    `prices` by model; a `*` at the end of a name stands for anything, the longest name that fits counts. A model
    without a price is free.
    """

    prices: dict[Pattern, Price] = Field(default_factory=dict, max_length=1000)


class LimitsSection(Section):
    """Absent: nothing is limited.

    `assumed_output_tokens`: what a request that sets no maximum is taken to produce, until it is over.
    `when_store_is_away`: what happens while nobody can say what other gateways have spent. `local_shares`: each gateway
    lets through up to `away_share` of each limit by itself; `fail_closed`: limited requests are answered 503.
    """

    rate_limit: RateLimitSection | None = None
    budgets: BudgetsSection | None = None
    assumed_output_tokens: Annotated[int, Field(ge=1, le=10**6)] = 1024
    when_store_is_away: Literal["local_shares", "fail_closed"] = "local_shares"
    away_share: Annotated[float, Field(gt=0, le=1)] = 0.25


@dataclass(frozen=True, slots=True)
class Name:
    """Of a counter. `owner`: a key's id, tenant/team, or a tenant. Hashed once: requests look up several."""

    scope: Scope
    owner: str
    kind: Kind
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.scope.value, self.owner, self.kind.value)))

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True, slots=True)
class Limit:
    """What a counter must not exceed: `most` in the kind's unit."""

    name: Name
    most: int

    @property
    def kind(self) -> Kind:
        return self.name.kind


@dataclass(slots=True)
class Limits:
    """The section, ready for requests."""

    section: LimitsSection
    _found: dict[tuple[str, str, str], tuple[Limit, ...]] = field(default_factory=dict)

    @property
    def is_fail_closed(self) -> bool:
        """Whether limited requests are refused while nobody can count them."""
        return self.section.when_store_is_away == "fail_closed"

    def of(self, tenant: str, team: str, key_id: str) -> tuple[Limit, ...]:
        """List the limits that a request of this key is counted against; `team` empty: none."""
        name = (tenant, team, key_id)
        if name not in self._found:
            if len(self._found) >= MAX_ENTRIES:
                self._found.clear()
            self._found[name] = tuple(self._find(*name))
        return self._found[name]

    def micro_usd(self, model: str, prompt_tokens: int, completion_tokens: int) -> int:
        """Say what tokens cost, in millionths of a dollar, rounded up."""
        price = self._price(model)
        return math.ceil(round(price.input * prompt_tokens + price.output * completion_tokens, 6)) if price else 0

    def amounts(self, scope: Scope, owner: str) -> Iterator[Limit]:
        """Yield the limits of one owner."""
        for section in (self.section.rate_limit, self.section.budgets):
            found: Section | None = section.amounts(scope, owner) if section is not None else None
            for kind, amount in found or ():
                if amount is not None:
                    most = round(amount * MICRO) if Kind(kind).unit is Unit.MICRO_USD else amount
                    yield Limit(Name(scope, owner, Kind(kind)), max(1, most))

    def _find(self, tenant: str, team: str, key_id: str) -> Iterator[Limit]:
        yield from self.amounts(Scope.KEY, key_id)
        if team:
            yield from self.amounts(Scope.TEAM, f"{tenant}/{team}")
        yield from self.amounts(Scope.TENANT, tenant)

    def _price(self, model: str) -> Price | None:
        prices = self.section.budgets.prices if self.section.budgets is not None else {}
        fitting = (name for name in prices if name == model or (name.endswith("*") and model.startswith(name[:-1])))
        return prices.get(max(fitting, key=len, default=""))


def compile_limits(section: LimitsSection | None) -> Limits | None:
    """Make the section ready for requests; None: nothing is limited."""
    return Limits(section) if section is not None else None
