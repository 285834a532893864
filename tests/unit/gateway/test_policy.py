"""What a gateway makes of documents: compiled once, the last good one kept, clients split as the canary says."""

from __future__ import annotations

import pytest

from inferflux.errors import PolicyInvalid
from services.gateway.auth import KeyRing
from services.gateway.policy import Compiler, Policies, Policy, Source

AUDIT = b'{"audit":{"sample":0.5}}'
KEYS = KeyRing(1, {})
OTHER_KEYS = KeyRing(2, {})


def test_a_document_is_compiled_once_for_all_snapshots_that_have_it():
    """Most snapshots change keys only."""
    compiler = Compiler()
    one = compiler.compile(1, KEYS, Source(1, AUDIT))
    two = compiler.compile(2, OTHER_KEYS, Source(1, AUDIT))

    assert two.live is one.live
    assert (two.revision, two.keys) == (2, OTHER_KEYS)
    assert one.live.audit is not None
    assert one.live.audit.sample == 0.5
    assert one.live.limits is None


def test_a_promoted_candidate_is_not_compiled_again():
    """It has another revision then, but a revision that is known as a candidate may be live next."""
    compiler = Compiler()
    tried = compiler.compile(2, KEYS, Source(1), Source(2, AUDIT, 0.0)).candidate

    assert compiler.compile(3, KEYS, Source(2, AUDIT)).live is tried


def test_a_document_that_cannot_be_read_leaves_the_last_good_one_but_changes_keys():
    """Revocations must get through to a gateway that is older than its policy service."""
    compiler = Compiler()
    good = compiler.compile(1, KEYS, Source(1, AUDIT))
    kept = compiler.compile(2, OTHER_KEYS, Source(2, b'{"of the future":{}}'))

    assert kept.live is good.live
    assert (kept.revision, kept.keys) == (2, OTHER_KEYS)


def test_without_a_last_good_one_a_document_that_cannot_be_read_is_refused():
    """An empty policy would allow everything."""
    with pytest.raises(PolicyInvalid):
        Compiler().compile(1, KEYS, Source(1, b"["))


def test_a_candidate_that_cannot_be_read_decides_for_nobody():
    """The live policy does."""
    policies = Compiler().compile(2, KEYS, Source(1, AUDIT), Source(2, b"[", 0.5))

    assert policies.candidate is None
    assert policies.choose(b"x") is policies.live


def test_a_canary_decides_for_its_share_and_always_for_the_same_clients():
    """Within what chance allows; another candidate has others."""
    clients = [f"Bearer key-{n}".encode() for n in range(10_000)]
    policies = Policies(1, KEYS, Policy(1), Policy(2), 0.1)
    chosen = {client for client in clients if policies.choose(client).revision == 2}
    again = {client for client in clients if policies.choose(client).revision == 2}
    next_one = Policies(1, KEYS, Policy(1), Policy(3), 0.1)
    others = {client for client in clients if next_one.choose(client).revision == 3}

    assert chosen == again
    assert 850 < len(chosen) < 1150
    assert len(chosen & others) < 200


def test_a_policy_in_shadow_decides_for_nobody():
    """It is only reported on."""
    policies = Policies(1, KEYS, Policy(1), Policy(2), 0.0)

    assert {policies.choose(f"{n}".encode()).revision for n in range(100)} == {1}
    assert policies.shadow == Policy(2)
