"""Tokens are taken from whom the policy says, for whom it says, and never because of what they say of themselves."""

from __future__ import annotations

import time
from typing import Any

import pytest

from inferflux.clock import ManualClock
from inferflux.errors import PermissionDenied, Unauthenticated, Unavailable
from inferflux.policy.identity import Identity, IdentitySection, Scope, compile_identity
from services.gateway import jwks
from services.gateway.auth import BAD_CREDENTIAL, Authenticator, KeyRing, read_credential
from services.gateway.jwks import KeySource, parse_keys, place_of
from services.gateway.tokens import MAX_REMEMBERED, TokenVerifier
from tests.support.issuer import TokenIssuer, ec_key, forgeries, rsa_key, sign, stranger

ISSUER = TokenIssuer()
RULES: dict[str, Any] = {
    "issuer": ISSUER.url,
    "audiences": ["inferflux", "other-api"],
    "tenant": {"claim": "org.id", "values": {"o-1": "acme", "o-2": "globex"}, "default": "acme"},
    "team": {"claim": "https://example.com/team", "values": {"r": "red", "b": "blue"}},
    "roles": {"claim": "groups", "values": {"users": "generate", "watchers": "watcher", "admins": "admin"}},
    "blocked_subjects": ["mallory"],
}


def identity(**rules: Any) -> Identity:
    tenants = {"acme": {"models": ["tiny", "big"], "teams": {"red": {"models": ["tiny"]}}}}
    document = {"tenants": tenants, "roles": {"watcher": ["read"]}, "issuers": [RULES | rules]}
    return compile_identity(IdentitySection.model_validate(document))


IDENTITY = identity()


class Sources:
    """The one source of our issuer, filled by hand."""

    def __init__(self, clock: ManualClock | None = None) -> None:
        self.clock = clock or ManualClock()
        self.published = ISSUER.jwks()
        self.num_fetches = 0
        self.source = KeySource(place_of(IDENTITY.issuers[ISSUER.url]), self.fetch, self.clock)

    async def fetch(self, url: str, network: str) -> dict[str, Any]:
        self.num_fetches += 1
        return {"issuer": ISSUER.url, "jwks_uri": "x", **self.published}

    def of(self, issuer: object) -> KeySource:
        return self.source


@pytest.fixture
async def sources() -> Sources:
    sources = Sources()
    await sources.source.refresh()
    return sources


def verifier(sources: Sources, now: float | None = None) -> TokenVerifier:
    return TokenVerifier(sources, lambda tenant: f"salt of {tenant}", lambda: now or time.time())


def why(verifier: TokenVerifier, token: str) -> str:
    with pytest.raises(Unauthenticated) as raised:
        verifier.verify(token.encode(), IDENTITY)
    return raised.value.message


@pytest.mark.parametrize("key", [rsa_key(), ec_key()], ids=["RS256", "ES256"])
def test_a_good_token_is_a_principal(sources, key):
    """With what the policy makes of its claims."""
    claims = {"groups": ["users", "watchers", "unknown"], "org": {"id": "o-1"}, "https://example.com/team": "r"}
    found = verifier(sources).verify(ISSUER.token(key, **claims).encode(), IDENTITY)

    assert (found.tenant, found.team, found.cache_salt) == ("acme", "red", "salt of acme")
    assert found.scopes == {Scope.GENERATE, Scope.READ}
    assert (found.allowance.permits("tiny"), found.allowance.permits("big")) == (True, False)
    assert found.key_id.startswith("oidc_")


def test_a_subject_has_one_name_whatever_token_it_brings(sources):
    """And no other subject has it, nor has the same one in another tenant."""
    people = [{"sub": sub, "org": {"id": org}} for sub in ("ann", "bob") for org in ("o-1", "o-2")]
    tokens = [ISSUER.token(jti=str(i), **claims) for claims in people for i in range(2)]
    ids = [verifier(sources).verify(token.encode(), IDENTITY).key_id for token in tokens]

    assert ids[::2] == ids[1::2]
    assert len(set(ids)) == len(people)


FORGERIES = forgeries(ISSUER)


@pytest.mark.parametrize("token", FORGERIES.values(), ids=FORGERIES.keys())
def test_forgeries_are_refused_in_the_same_words(sources, token):
    """Whatever is wrong with them, through the whole of authentication."""
    auth = Authenticator(b"p", lambda: KeyRing(1), identity=lambda _: IDENTITY, tokens=verifier(sources))
    with pytest.raises(Unauthenticated) as raised:
        auth.authenticate(read_credential({b"authorization": b"Bearer " + token.encode()}))

    assert raised.value.message == BAD_CREDENTIAL


NOW = int(time.time())


@pytest.mark.parametrize(
    ("claims", "is_good"),
    [
        ({"iat": NOW - 600, "exp": NOW - 59}, True),
        ({"iat": NOW - 600, "exp": NOW - 60}, False),
        ({"nbf": NOW + 60}, True),
        ({"nbf": NOW + 61}, False),
        ({"iat": NOW + 60}, True),
        ({"iat": NOW + 61}, False),
        ({"iat": NOW, "exp": NOW + 86_400}, True),
        ({"iat": NOW, "exp": NOW + 86_401}, False),
        ({"aud": ["x", "other-api"]}, True),
        ({"aud": ["x"]}, False),
        ({"exp": NOW + 100.5}, True),
    ],
)
def test_times_have_a_leeway_of_a_minute(sources, claims, is_good):
    """To the second, on both sides."""
    token = ISSUER.token(**({"iat": NOW, "exp": NOW + 600} | claims))
    if is_good:
        assert verifier(sources, NOW).verify(token.encode(), IDENTITY)
    else:
        assert why(verifier(sources, NOW), token) == BAD_CREDENTIAL


@pytest.mark.parametrize(
    "claims",
    [{"org": {"id": ["o-1", "o-2"]}}, {"https://example.com/team": ["r", "b"]}],
)
def test_a_token_of_two_tenants_or_teams_is_refused(sources, claims):
    """Nobody can tell whose request it is."""
    with pytest.raises(PermissionDenied):
        verifier(sources).verify(ISSUER.token(**claims).encode(), IDENTITY)


def test_claims_become_only_names_that_the_policy_lists(sources):
    """A claim that names our tenant, or a scope, is nothing by itself."""
    claims = {"groups": ["admin", "generate"], "org": {"id": "globex"}, "tenant": "globex", "scope": "admin"}
    found = verifier(sources).verify(ISSUER.token(**claims).encode(), IDENTITY)

    assert (found.tenant, found.scopes) == ("acme", frozenset())


def test_a_token_without_a_tenant_is_refused(sources):
    """Where the policy has no default."""
    strict = identity(tenant={"claim": "org", "values": {"o-1": "acme"}})
    with pytest.raises(PermissionDenied, match="no tenant"):
        verifier(sources).verify(ISSUER.token().encode(), strict)


def test_an_issuer_can_be_told_to_begin_anew(sources):
    """Tokens from before are dead at once, also those that are remembered."""
    now, checks = int(time.time()), verifier(sources)
    token = ISSUER.token(iat=now - 10).encode()
    assert checks.verify(token, IDENTITY)

    with pytest.raises(Unauthenticated):
        checks.verify(token, identity(not_before=now - 9))
    assert checks.verify(token, identity(not_before=now - 10))


def test_a_blocked_subject_is_out_at_once(sources):
    """Also with a token that is remembered."""
    checks, token = verifier(sources), ISSUER.token().encode()
    assert checks.verify(token, IDENTITY)

    with pytest.raises(Unauthenticated):
        checks.verify(token, identity(blocked_subjects=["ann"]))


# --- what is remembered


def test_a_verified_token_is_remembered(sources, monkeypatch):
    """Its signature is computed once."""
    checks, token = verifier(sources), ISSUER.token().encode()
    first = checks.verify(token, IDENTITY)
    monkeypatch.setattr(TokenVerifier, "_verify", lambda *_: pytest.fail("verified again"))

    assert checks.verify(token, IDENTITY) is first


def test_it_is_remembered_under_all_of_its_bytes(sources):
    """A token that begins and ends like another one is another one."""
    checks = verifier(sources)
    token = ISSUER.token()
    assert checks.verify(token.encode(), IDENTITY)
    head, body, signature = token.split(".")
    middle = len(body) // 2
    twisted = body[:middle] + ("A" if body[middle] != "A" else "B") + body[middle + 1 :]

    assert why(checks, f"{head}.{twisted}.{signature}") == BAD_CREDENTIAL


def test_it_is_remembered_until_it_expires(sources):
    """With the leeway, not longer."""
    now = float(NOW)
    checks = TokenVerifier(sources, str, lambda: now)
    token = ISSUER.token(iat=NOW, exp=NOW + 10).encode()
    assert checks.verify(token, IDENTITY)

    now = NOW + 69.9
    assert checks.verify(token, IDENTITY)
    now = NOW + 70.0
    with pytest.raises(Unauthenticated):
        checks.verify(token, IDENTITY)


async def test_it_is_forgotten_with_the_key_that_signed_it(sources):
    """As soon as the issuer does not publish it any more."""
    checks, token = verifier(sources), ISSUER.token().encode()
    assert checks.verify(token, IDENTITY)
    sources.published = TokenIssuer(keys=[ec_key()]).jwks()
    await sources.source.refresh()

    with pytest.raises(Unauthenticated):
        checks.verify(token, IDENTITY)


def test_as_many_are_remembered_as_there_is_room_for(sources, monkeypatch):
    """Then the one that was not seen for longest goes."""
    monkeypatch.setattr("services.gateway.tokens.MAX_REMEMBERED", 2)
    assert MAX_REMEMBERED > 2
    checks, tokens = verifier(sources), [ISSUER.token(jti=str(i)).encode() for i in range(3)]
    for token in (tokens[0], tokens[1], tokens[0], tokens[2]):
        checks.verify(token, IDENTITY)
    monkeypatch.setattr(TokenVerifier, "_verify", lambda *_: pytest.fail("verified again"))

    assert checks.verify(tokens[0], IDENTITY)
    with pytest.raises(pytest.fail.Exception):
        checks.verify(tokens[1], IDENTITY)


# --- the keys behind it


async def test_new_keys_are_asked_for_once_and_the_request_waits():
    """A token signed by a key from a moment ago is good, after one more fetch."""
    sources = Sources()
    await sources.source.refresh()
    sources.clock.advance(jwks.MIN_INTERVAL_S)
    fresh = stranger("rsa-fresh")
    sources.published = TokenIssuer(keys=[rsa_key(), fresh]).jwks()
    auth = Authenticator(b"p", lambda: KeyRing(1), identity=lambda _: IDENTITY, tokens=verifier(sources))

    async def fetched() -> None:
        await sources.source.refresh()

    sources.source.refreshed = fetched
    headers = {b"authorization": b"Bearer " + ISSUER.token(fresh).encode()}
    assert (await auth.authorize(headers, Scope.GENERATE)).tenant == "acme"


async def test_no_token_is_taken_by_keys_that_are_too_old():
    """When the issuer can't be asked for longer than the policy says: 503, since the token may be good."""
    sources = Sources()
    with pytest.raises(Unavailable):
        verifier(sources).verify(ISSUER.token().encode(), IDENTITY)
    await sources.source.refresh()
    checks, token = verifier(sources), ISSUER.token().encode()

    sources.clock.advance(3600)
    assert checks.verify(token, IDENTITY)
    sources.clock.advance(1)
    with pytest.raises(Unavailable):
        checks.verify(token, IDENTITY)


async def test_a_token_without_an_id_needs_an_issuer_with_one_key():
    """Then there is nothing to choose."""
    sources = Sources()
    token = sign({"alg": "RS256"}, ISSUER.claims(), rsa_key()).encode()
    sources.published = TokenIssuer(keys=[rsa_key()]).jwks()
    await sources.source.refresh()
    assert verifier(sources).verify(token, IDENTITY)

    sources.published = ISSUER.jwks()
    await sources.source.refresh()
    with pytest.raises(Unauthenticated):
        verifier(sources).verify(token, IDENTITY)


async def test_a_key_without_an_id_verifies_tokens_with_and_without_one():
    """If it is the only one."""
    sources = Sources()
    nameless = rsa_key().as_dict(private=False)
    del nameless["kid"]
    sources.published = {"keys": [nameless]}
    await sources.source.refresh()

    assert verifier(sources).verify(ISSUER.token().encode(), IDENTITY)
    assert verifier(sources).verify(sign({"alg": "RS256"}, ISSUER.claims(), rsa_key()).encode(), IDENTITY)


def test_without_issuers_nothing_is_a_token(sources):
    """It is a key then, and no good one."""
    auth = Authenticator(b"p", lambda: KeyRing(1), tokens=verifier(sources))
    with pytest.raises(Unauthenticated):
        auth.authenticate(read_credential({b"authorization": b"Bearer " + ISSUER.token().encode()}))


def test_parsed_keys_of_the_same_set_are_equal():
    """So that fetching them again changes nothing."""
    assert parse_keys(ISSUER.jwks()) == parse_keys(ISSUER.jwks())
