"""Who is who: tenants and their teams, roles, and the issuers whose tokens are taken.

`IdentitySection` is a part of the policy document; `Identity` is what a gateway asks for each key and token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, StringConstraints, model_validator

from inferflux.policy.section import Section

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, StringConstraints(pattern=NAME)]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]
"""Of a model or an adapter; a `*` at its end stands for anything."""
Models = Annotated[list[ModelName], Field(max_length=256)] | None
Text = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Url = Annotated[str, StringConstraints(min_length=1, max_length=512)]
ScopeName = Literal["generate", "read", "admin"]
Network = Literal["public", "private", "loopback"]


class Scope(StrEnum):
    """What a key may do. `ADMIN` includes the others."""

    GENERATE = "generate"
    READ = "read"
    ADMIN = "admin"


def key_id(secret_hash: bytes) -> str:
    """Name the key whose first secret has this hash."""
    return f"key_{secret_hash[:8].hex()}"


class Team(Section):
    """A part of a tenant. `models`: all that its keys may use; None: no restriction."""

    models: Models = None


class Tenant(Section):
    """Somebody whose data nobody else sees."""

    models: Models = None
    teams: dict[Name, Team] = Field(default_factory=dict, max_length=1024)


class ClaimMap(Section):
    """How a claim of a token becomes a name of ours. Only what is listed in `values` is taken over.

    `claim`: a member of the token, or a path of members joined by dots; its value is a text or a list of texts.
    """

    claim: Text | None = None
    values: dict[Text, Name] = Field(default_factory=dict, max_length=4096)
    default: Name | None = None

    @model_validator(mode="after")
    def _leads_somewhere(self) -> Self:
        if bool(self.values) != (self.claim is not None):
            raise ValueError("claim and values belong together")
        if self.claim is None and self.default is None:
            raise ValueError("needs a claim with values, or a default")
        return self

    @property
    def targets(self) -> set[str]:
        """All names that may come out."""
        return {*self.values.values(), *([self.default] if self.default else [])}


class Issuer(Section):
    """An OpenID Connect provider whose tokens are taken.

    `jwks_url` None: as the issuer's own discovery document says. `network`: where its keys may be fetched from: the
    public internet, also private networks, or (with plain HTTP, too) only this machine. `stale_s`: how long keys are
    used when fetching them fails. `max_age_s`: longest time between issue and expiry. `not_before`: tokens issued
    earlier (seconds since the epoch) are refused, as are those of `blocked_subjects`.
    """

    issuer: Url
    audiences: Annotated[list[Text], Field(min_length=1, max_length=16)]
    algorithms: tuple[Literal["RS256", "ES256"], ...] = Field(default=("RS256", "ES256"), min_length=1)
    jwks_url: Url | None = None
    network: Network = "public"
    stale_s: Annotated[int, Field(ge=60, le=86_400)] = 3600
    max_age_s: Annotated[int, Field(ge=60, le=31 * 86_400)] = 86_400
    tenant: ClaimMap
    team: ClaimMap | None = None
    roles: ClaimMap
    not_before: Annotated[int, Field(ge=0)] = 0
    blocked_subjects: list[Text] = Field(default_factory=list, max_length=4096)

    @model_validator(mode="after")
    def _is_reachable_safely(self) -> Self:
        for url in (self.issuer, self.jwks_url):
            if url is not None:
                _check_url(url, is_loopback=self.network == "loopback")
        return self


class IdentitySection(Section):
    """The section `identity` of the policy document. Tenants that are not listed have no restrictions."""

    tenants: dict[Name, Tenant] = Field(default_factory=dict, max_length=4096)
    roles: dict[Name, list[ScopeName]] = Field(default_factory=dict, max_length=256)
    issuers: list[Issuer] = Field(default_factory=list, max_length=16)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if taken := self.roles.keys() & set(Scope):
            raise ValueError(f"the role {min(taken)!r} is the scope of that name and cannot be another")
        names = [issuer.issuer for issuer in self.issuers]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"the issuer {min(twice)!r} is there more than once")
        for issuer in self.issuers:
            if unknown := issuer.roles.targets - self.roles.keys() - set(Scope):
                raise ValueError(f"issuer {issuer.issuer!r} gives a role that is not defined: {min(unknown)!r}")
        return self


@dataclass(frozen=True, slots=True)
class Allowance:
    """Which models and adapters may be used: those that are on every list. No lists: all."""

    lists: tuple[tuple[str, ...], ...] = ()

    def permits(self, name: str) -> bool:
        """Tell whether a model may be used."""
        return all(any(_matches(pattern, name) for pattern in patterns) for patterns in self.lists)

    @classmethod
    def of(cls, *lists: Iterable[str] | None) -> Allowance:
        """Join lists; None restricts nothing."""
        return cls(tuple(tuple(names) for names in lists if names is not None))


EVERYTHING = Allowance()


@dataclass(frozen=True, slots=True)
class Identity:
    """The section, ready for questions."""

    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    roles: Mapping[str, frozenset[Scope]] = field(default_factory=dict)
    issuers: Mapping[str, Issuer] = field(default_factory=dict)

    def scopes(self, roles: Iterable[str]) -> frozenset[Scope]:
        """Return what roles grant together; a role that is not known grants nothing."""
        return frozenset(scope for role in roles for scope in self.roles.get(role, ()))

    def allowance(self, tenant: str, team: str, models: Iterable[str] | None = None) -> Allowance:
        """Join what a tenant, its team and a key may use."""
        owner = self.tenants.get(tenant, Tenant())
        return Allowance.of(owner.models, owner.teams.get(team, Team()).models, models)


def compile_identity(section: IdentitySection | None) -> Identity:
    """Make the section ready for questions; None: nothing is restricted, and no tokens are taken."""
    section = section or IdentitySection()
    roles = {scope.value: frozenset({scope}) for scope in Scope}
    roles |= {name: frozenset(map(Scope, scopes)) for name, scopes in section.roles.items()}
    return Identity(section.tenants, roles, {issuer.issuer: issuer for issuer in section.issuers})


def _matches(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _check_url(url: str, *, is_loopback: bool) -> None:
    parts = urlsplit(url)
    schemes = ("https", "http") if is_loopback else ("https",)
    if parts.scheme not in schemes or not parts.hostname:
        raise ValueError(f"{url!r} must be a URL with {' or '.join(schemes)}")
    if "@" in parts.netloc or "\\" in url or parts.fragment or not url.isascii() or not url.isprintable():
        raise ValueError(f"{url!r} must be a plain URL, without a user, fragment or special characters")
