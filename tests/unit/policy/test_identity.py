"""The section of the policy that says who is who: strict when it is read, generous with nothing when it is asked."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from inferflux.policy.identity import Allowance, IdentitySection, Scope, compile_identity

ISSUER: dict[str, Any] = {
    "issuer": "https://idp.example.com",
    "audiences": ["inferflux"],
    "tenant": {"default": "acme"},
    "roles": {"claim": "groups", "values": {"users": "generate"}},
}


def section(**fields: Any) -> IdentitySection:
    return IdentitySection.model_validate_json(json.dumps(fields))


def test_an_absent_section_restricts_nothing_and_takes_no_tokens():
    """As does an empty one."""
    for identity in (compile_identity(None), compile_identity(section())):
        assert identity.allowance("acme", "red").permits("anything")
        assert not identity.issuers
        assert identity.scopes(["admin"]) == {Scope.ADMIN}
        assert identity.scopes(["boss"]) == frozenset()


def test_roles_are_sets_of_scopes():
    """They add up; what nobody defined grants nothing."""
    identity = compile_identity(section(roles={"dev": ["generate", "read"], "empty": []}))

    assert identity.scopes(["dev", "empty", "nobody"]) == {Scope.GENERATE, Scope.READ}


@pytest.mark.parametrize(
    ("lists", "permitted"),
    [
        ((), ["a", "b", "ab"]),
        ((None, None), ["a", "b", "ab"]),
        ((["a"],), ["a"]),
        ((["a*"],), ["a", "ab"]),
        ((["*"], ["b"]), ["b"]),
        ((["a", "b"], ["b", "ab"], None), ["b"]),
        (([],), []),
        ((["A"],), []),
    ],
)
def test_a_model_must_be_on_every_list(lists, permitted):
    """An empty list permits nothing, a missing one everything."""
    allowance = Allowance.of(*lists)

    assert [name for name in ("a", "b", "ab") if allowance.permits(name)] == permitted


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"tenant": {}}, "extra"),
        ({"tenants": {"no spaces": {}}}, "pattern"),
        ({"tenants": {"acme": {"models": [""]}}}, "at least 1"),
        ({"tenants": {"acme": {"models": "tiny"}}}, "list"),
        ({"roles": {"boss": ["root"]}}, "generate"),
        ({"roles": {"admin": ["read"]}}, "cannot be another"),
        ({"issuers": [ISSUER, ISSUER]}, "more than once"),
        ({"issuers": [ISSUER | {"audiences": []}]}, "at least 1"),
        ({"issuers": [ISSUER | {"algorithms": ["none"]}]}, "RS256"),
        ({"issuers": [ISSUER | {"algorithms": ["HS256"]}]}, "RS256"),
        ({"issuers": [ISSUER | {"algorithms": []}]}, "at least 1"),
        ({"issuers": [ISSUER | {"roles": {"default": "boss"}}]}, "not defined"),
        ({"issuers": [ISSUER | {"roles": {}}]}, "needs a claim"),
        ({"issuers": [ISSUER | {"tenant": {"claim": "org"}}]}, "belong together"),
        ({"issuers": [ISSUER | {"tenant": {"values": {"a": "b"}, "default": "c"}}]}, "belong together"),
        ({"issuers": [ISSUER | {"issuer": "http://idp.example.com"}]}, "https"),
        ({"issuers": [ISSUER | {"issuer": "ftp://idp.example.com"}]}, "https"),
        ({"issuers": [ISSUER | {"jwks_url": "https://user@idp.example.com/"}]}, "plain URL"),
        ({"issuers": [ISSUER | {"jwks_url": "https://idp.example.com\\@10.0.0.1/"}]}, "plain URL"),
        ({"issuers": [ISSUER | {"jwks_url": "https:///keys"}]}, "https"),
        ({"issuers": [ISSUER | {"network": "everywhere"}]}, "loopback"),
    ],
)
def test_what_is_wrong_is_refused_with_its_reason(fields, problem):
    """Before anything of it is in force."""
    with pytest.raises(ValidationError, match=problem):
        section(**fields)


def test_plain_http_is_for_this_machine_only():
    """And only where somebody has said so."""
    assert section(issuers=[ISSUER | {"issuer": "http://127.0.0.1:9000", "network": "loopback"}])
