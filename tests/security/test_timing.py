"""How long a refusal takes says nothing about why: not which keys there are, nor which there were."""

from __future__ import annotations

import random
import secrets
import statistics
import time

import pytest

from inferflux.errors import Unauthenticated
from services.gateway.auth import Authenticator, Key, KeyRing, Principal, hash_secret

PEPPER = secrets.token_bytes(32)
NUM_SAMPLES = 100_000
NUM_KEYS = 1000
LIMIT = 4.5


def secret() -> bytes:
    return b"ifx_" + secrets.token_urlsafe(32).encode()


def record(value: bytes, expires_at: float | None = None) -> Key:
    return Key(hash_secret(PEPPER, value), Principal("key", "acme", frozenset()), expires_at)


LIVE = [secret() for _ in range(NUM_KEYS)]
EXPIRED = [secret() for _ in range(NUM_KEYS)]
REVOKED = [secret() for _ in range(NUM_KEYS)]
UNKNOWN = [secret() for _ in range(NUM_KEYS)]
RING = {key.secret_hash: key for key in (*map(record, LIVE), *(record(value, 1.0) for value in EXPIRED))}


def refusal_ns(auth: Authenticator, headers: dict[bytes, bytes]) -> int:
    started_at = time.perf_counter_ns()
    try:
        auth.authenticate(headers)
    except Unauthenticated:
        return time.perf_counter_ns() - started_at
    raise AssertionError("let in")


def welch(one: list[int], other: list[int]) -> float:
    """Welch's t of two samples, without the slowest tenth of both together: what else the machine does is in there."""
    limit = sorted([*one, *other])[(len(one) + len(other)) * 9 // 10]
    samples = [[value for value in values if value < limit] for values in (one, other)]
    means = [statistics.fmean(values) for values in samples]
    errors = [
        sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)
        for values, mean in zip(samples, means, strict=True)
    ]
    return float((means[0] - means[1]) / sum(errors) ** 0.5)


def twisted(value: bytes) -> bytes:
    """Another secret that begins with almost all of a good one."""
    return value[:-1] + (b"A" if value[-1:] != b"A" else b"B")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["revoked", "expired", "almost good"])
def test_a_refusal_takes_as_long_for_any_reason(kind):
    """Unknown keys against revoked ones, expired ones, and ones that differ from a good one in their last character."""
    others = {"revoked": REVOKED, "expired": EXPIRED, "almost good": list(map(twisted, LIVE))}[kind]
    ring = KeyRing(1, dict(RING))
    auth = Authenticator(PEPPER, lambda: ring)
    groups = [[{b"authorization": b"Bearer " + value} for value in values] for values in (others, UNKNOWN)]
    times: tuple[list[int], list[int]] = ([], [])
    for headers in (*groups[0], *groups[1]):  # an expired key is forgotten when it is seen: there is no second look
        refusal_ns(auth, headers)
    for _ in range(2 * NUM_SAMPLES):
        group = random.getrandbits(1)
        times[group].append(refusal_ns(auth, random.choice(groups[group])))

    assert abs(t := welch(*times)) < LIMIT, f"t = {t:.1f}"
