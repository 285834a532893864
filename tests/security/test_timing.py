"""How long a refusal takes says nothing about why: not which keys there are, nor which there were."""

from __future__ import annotations

import random
import secrets
import statistics
import time

import pytest

from inferflux.errors import Unauthenticated
from services.gateway.auth import Authenticator, Key, KeyRing, Principal, hash_secret, read_credential

PEPPER = secrets.token_bytes(32)
NUM_BLOCKS, NUM_PAIRS = 200, 500
NUM_KEYS = 1000
LIMIT = 4.5
Headers = dict[bytes, bytes]


def secret() -> bytes:
    return b"ifx_" + secrets.token_urlsafe(32).encode()


def record(value: bytes, expires_at: float | None = None) -> Key:
    return Key(hash_secret(PEPPER, value), Principal("key", "acme", frozenset()), expires_at)


def headers(value: bytes) -> Headers:
    return {b"authorization": b"Bearer " + value}


def twisted(value: bytes) -> bytes:
    """Another secret that begins with almost all of a good one."""
    return value[:-1] + (b"A" if value[-1:] != b"A" else b"B")


LIVE, EXPIRED, REVOKED = ([secret() for _ in range(NUM_KEYS)] for _ in range(3))
RING = {key.secret_hash: key for key in (*map(record, LIVE), *(record(value, 1.0) for value in EXPIRED))}


def refusal_ns(auth: Authenticator, asked: Headers) -> int:
    started_at = time.perf_counter_ns()
    try:
        auth.authenticate(read_credential(asked))
    except Unauthenticated:
        return time.perf_counter_ns() - started_at
    raise AssertionError("let in")


def difference(auth: Authenticator, pairs: list[tuple[Headers, Headers]]) -> float:
    """How much longer the first of a pair takes, in one block, in nanoseconds.

    By turns in random order, and without the slowest tenth of both together: what else the machine does is in there.
    """
    times: tuple[list[int], list[int]] = ([], [])
    for _ in range(NUM_PAIRS):
        pair, first = random.choice(pairs), random.getrandbits(1)
        for which in (first, 1 - first):
            times[which].append(refusal_ns(auth, pair[which]))
    limit = sorted([*times[0], *times[1]])[NUM_PAIRS * 18 // 10]
    means = [statistics.fmean(value for value in values if value < limit) for values in times]
    return means[0] - means[1]


def paired(value: bytes) -> tuple[Headers, Headers]:
    """Make the headers of a secret and of an unknown one in random order: where they lie in memory says nothing."""
    made: dict[bool, Headers] = {}
    for is_unknown in random.sample((False, True), 2):
        made[is_unknown] = headers(secret() if is_unknown else value)
    return made[False], made[True]


def t_of(auth: Authenticator, values: list[bytes]) -> float:
    """Student's t of the differences between these secrets and unknown ones, block by block.

    Blocks, since neighbouring samples share what disturbs them, and are not independent.
    """
    pairs = list(map(paired, values))
    differences = [difference(auth, pairs) for _ in range(NUM_BLOCKS)]
    return statistics.fmean(differences) / (statistics.stdev(differences) / NUM_BLOCKS**0.5)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["revoked", "expired", "almost good"])
def test_a_refusal_takes_as_long_for_any_reason(kind):
    """Revoked keys, expired ones, and ones that differ from a good one in their last character, beside unknown ones."""
    values = {"revoked": REVOKED, "expired": EXPIRED, "almost good": list(map(twisted, LIVE))}[kind]
    ring = KeyRing(1, dict(RING))

    assert abs(t := t_of(Authenticator(PEPPER, lambda: ring), values)) < LIMIT, f"t = {t:.1f}"


class Leaky(Authenticator):
    """Takes one look more at a key that is there."""

    def authenticate(self, credential: bytes) -> Principal:
        if (digest := hash_secret(PEPPER, credential)) in RING:
            RING[digest].secret_hash.hex()
        return super().authenticate(credential)


@pytest.mark.timeout(300)
def test_a_leak_of_a_fraction_of_a_microsecond_is_seen():
    """Or the other test would prove nothing."""
    ring = KeyRing(1, dict(RING))

    assert t_of(Leaky(PEPPER, lambda: ring), EXPIRED) > LIMIT
