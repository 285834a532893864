"""Keys are checked from memory, and the answer to a bad one says nothing about why it is bad."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferflux.errors import InvalidRequest, PermissionDenied, Unauthenticated, Unavailable
from inferflux.policy.identity import IdentitySection, compile_identity
from services.gateway.asgi import header_map
from services.gateway.auth import Authenticator, Key, KeyRing, Principal, cache_salt, hash_secret, read_credential
from services.gateway.endpoints import Scope

PEPPER = b"p" * 32
NOW = 1000.0
SECRET = b"ifx_0123456789"


def bearer(secret: bytes) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + secret}


def key(secret: bytes = SECRET, *scopes: Scope, expires_at: float | None = None) -> Key:
    principal = Principal("key_1", "acme", frozenset(scopes or {Scope.GENERATE}))
    return Key(hash_secret(PEPPER, secret), principal, expires_at)


def authenticator(*keys: Key, now: float = NOW) -> Authenticator:
    ring = KeyRing(1, {key.secret_hash: key for key in keys})
    return Authenticator(PEPPER, lambda: ring, lambda: now)


def refusal(auth: Authenticator, headers: dict[bytes, bytes]) -> tuple[str, int, str, str | None]:
    """All that a client can see of a refusal."""
    with pytest.raises(Unauthenticated) as raised:
        auth.authenticate(read_credential(headers))
    return raised.value.reason, raised.value.http_status, raised.value.message, raised.value.param


@pytest.mark.parametrize(
    "headers",
    [
        {b"authorization": b"Bearer " + SECRET},
        {b"authorization": b"bearer " + SECRET},
        {b"authorization": b"BEARER " + SECRET},
        {b"x-api-key": SECRET},
    ],
)
def test_a_key_comes_as_bearer_or_x_api_key(headers):
    """As clients of OpenAI and Anthropic send it; the scheme in any case."""
    assert authenticator(key()).authenticate(read_credential(headers)).tenant == "acme"


def test_authorization_decides_when_both_are_there():
    """A bad one is not rescued by a good x-api-key."""
    auth = authenticator(key())

    assert auth.authenticate(read_credential(bearer(SECRET) | {b"x-api-key": b"something-else"}))
    with pytest.raises(Unauthenticated):
        auth.authenticate(read_credential(bearer(b"something-else") | {b"x-api-key": SECRET}))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"authorization": b""},
        {b"authorization": b"Bearer"},
        {b"authorization": b"Bearer "},
        {b"authorization": b"Basic " + SECRET},
        {b"authorization": SECRET},
        {b"authorization": b"Bearer\t" + SECRET},
        {b"authorization": b"Bearer  " + SECRET},
        {b"x-api-key": b""},
        {b"cookie": b"authorization=" + SECRET},
    ],
)
def test_anything_else_is_no_key(headers):
    """401, also when the secret is somewhere in it."""
    with pytest.raises(Unauthenticated):
        authenticator(key()).authenticate(read_credential(headers))


@pytest.mark.parametrize("secret", [b"!" * 8, b"~" * 256, bytes(range(0x21, 0x7F))])
def test_keys_of_8_to_256_visible_characters_are_well_formed(secret):
    """The limits themselves are allowed."""
    assert authenticator(key(secret)).authenticate(read_credential(bearer(secret)))


@pytest.mark.parametrize(
    "secret",
    [
        b"7 chars"[:7],
        b"a" * 7,
        b"a" * 257,
        b"a" * 100_000,
        b"with blank",
        b"12345678\n",
        b"12345678\x7f",
        b"caf\xc3\xa9" * 4,
    ],
)
def test_ill_formed_keys_are_refused_before_anything_is_done_with_them(secret):
    """With the answer that an unknown key gets."""
    ill_formed, unknown = (refusal(authenticator(key()), bearer(s)) for s in (secret, b"unknown-key"))

    assert ill_formed == unknown


@given(st.binary(max_size=300))
def test_any_bytes_are_a_key_or_refused(secret):
    """And what is accepted came through unchanged."""
    try:
        assert read_credential({b"x-api-key": secret}) == secret
    except Unauthenticated:
        assert not (8 <= len(secret) <= 256 and all(0x21 <= byte <= 0x7E for byte in secret))


def test_unknown_revoked_and_expired_keys_get_the_same_answer():
    """Nobody learns that a key once worked."""
    expired = authenticator(key(expires_at=NOW))

    answers = {refusal(auth, bearer(SECRET)) for auth in (authenticator(), authenticator(key(b"another")), expired)}

    assert len(answers) == 1


@pytest.mark.parametrize(("expires_at", "is_good"), [(None, True), (NOW + 0.001, True), (NOW, False), (NOW - 1, False)])
def test_a_key_works_until_it_expires(expires_at, is_good):
    """Not at that instant any more."""
    auth = authenticator(key(expires_at=expires_at))
    if is_good:
        assert auth.authenticate(read_credential(bearer(SECRET)))
    else:
        refusal(auth, bearer(SECRET))


def test_expiry_needs_no_new_key_ring():
    """The clock is read for each request."""
    now = NOW
    ring = KeyRing(1, {(k := key(expires_at=NOW + 1)).secret_hash: k})
    auth = Authenticator(PEPPER, lambda: ring, lambda: now)

    assert auth.authenticate(read_credential(bearer(SECRET)))
    now += 1
    refusal(auth, bearer(SECRET))


def test_the_newest_key_ring_counts():
    """Revoking works without a restart."""
    ring = KeyRing(1, {key().secret_hash: key()})
    auth = Authenticator(PEPPER, lambda: ring)

    assert auth.authenticate(read_credential(bearer(SECRET)))
    ring = KeyRing(2, {})
    refusal(auth, bearer(SECRET))


def test_without_a_policy_nobody_is_let_in():
    """Nor told that the key is bad: it may be good, later."""
    auth = Authenticator(PEPPER, lambda: None)

    with pytest.raises(Unavailable) as raised:
        auth.authenticate(read_credential(bearer(SECRET)))
    assert raised.value.is_retryable
    with pytest.raises(Unauthenticated):
        auth.authenticate(read_credential({}))


def test_another_pepper_makes_another_hash():
    """A stolen snapshot can't be used with another cluster."""
    ring = KeyRing(1, {key().secret_hash: key()})

    refusal(Authenticator(b"q" * 32, lambda: ring), bearer(SECRET))


@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize("has", Scope)
async def test_a_scope_is_needed_and_admin_has_all(has, scope):
    """403, not 401, with the scope's name: the key is good, just not for this."""
    auth = authenticator(key(SECRET, has))
    if has in (scope, Scope.ADMIN):
        assert (await auth.authorize(bearer(SECRET), scope)).key_id == "key_1"
    else:
        with pytest.raises(PermissionDenied, match=scope) as raised:
            await auth.authorize(bearer(SECRET), scope)
        assert raised.value.http_status == 403


async def test_a_key_without_scopes_may_do_nothing():
    """Such come from a newer policy service whose scopes this gateway does not know."""
    bare = Key(hash_secret(PEPPER, SECRET), Principal("key_1", "acme", frozenset()))

    for scope in Scope:
        with pytest.raises(PermissionDenied):
            await authenticator(bare).authorize(bearer(SECRET), scope)


@pytest.mark.parametrize("name", [b"authorization", b"x-api-key", b"content-length", b"host"])
def test_two_credentials_in_one_request_are_refused(name):
    """Or two readers of it could see two different clients."""
    with pytest.raises(InvalidRequest, match="more than one") as raised:
        header_map([(name, b"a"), (b"accept", b"x"), (name, b"b")])

    assert raised.value.param == name.decode()


def test_cache_salts_separate_tenants_and_clusters():
    """The same tenant of the same cluster has the same one."""
    salts = {cache_salt(k, tenant) for k in (b"1" * 32, b"2" * 32) for tenant in ("", "acme", "other")}

    assert len(salts) == 6
    assert cache_salt(b"1" * 32, "acme") in salts


# --- what the policy adds


def test_the_policy_adds_roles_and_takes_models():
    """Without a section the key is what it says itself; with one, roles add scopes and every list counts."""
    section = {
        "tenants": {"acme": {"models": ["llama-*", "tiny"], "teams": {"red": {"models": ["tiny", "llama-8b"]}}}},
        "roles": {"watcher": ["read"]},
    }
    identity = compile_identity(IdentitySection.model_validate(section))
    principal = Principal("key_1", "acme", frozenset({Scope.GENERATE}), team="red")
    record = Key(hash_secret(PEPPER, SECRET), principal, roles=("watcher", "unknown"), models=("tiny", "big"))
    ring = KeyRing(1, {record.secret_hash: record})

    bare = Authenticator(PEPPER, lambda: ring).authenticate(read_credential(bearer(SECRET)))
    found = Authenticator(PEPPER, lambda: ring, identity=lambda _: identity).authenticate(
        read_credential(bearer(SECRET))
    )

    assert (bare.scopes, found.scopes) == ({Scope.GENERATE}, {Scope.GENERATE, Scope.READ})
    assert [name for name in ("tiny", "big", "llama-8b", "llama-70b") if bare.allowance.permits(name)] == [
        "tiny",
        "big",
    ]
    assert [name for name in ("tiny", "big", "llama-8b", "llama-70b") if found.allowance.permits(name)] == ["tiny"]


def test_looking_for_a_key_takes_the_same_steps_whatever_is_wrong():
    """An expired key is found, an unknown one is not; both are compared and dated, so that time tells nothing."""
    dates = []

    def now() -> float:
        dates.append(NOW)
        return NOW

    expired = KeyRing(1, {(k := key(expires_at=NOW)).secret_hash: k})
    for ring in (expired, KeyRing(1, {})):
        auth = Authenticator(PEPPER, lambda ring=ring: ring, now)
        refusal(auth, bearer(SECRET))

    assert len(dates) == 2
