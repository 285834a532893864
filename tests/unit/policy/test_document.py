"""Documents are strict, name all their problems at once, and have one canonical form."""

from __future__ import annotations

import json

import pytest

from inferflux.errors import PolicyInvalid
from inferflux.policy.document import MAX_BYTES, PolicyDocument, canonical, parse
from inferflux.policy.signature import Signer, Verifier, public_key


def test_a_document_without_sections_restricts_nothing():
    """Absent and null are the same."""
    assert parse(b"{}") == parse(b'{"audit": null, "limits": null}') == PolicyDocument()


def test_the_canonical_form_is_the_same_for_every_spelling_and_stays_as_it_is():
    """Order, white space and null sections do not count; what the author left out stays out."""
    one = canonical(b'{"audit": {"sample": 0.5, "debug_mode": true}, "limits": null}')
    two = canonical(b'  {"audit":{"debug_mode":true,"sample":0.5}}\n')

    assert one == two == canonical(one) == b'{"audit":{"debug_mode":true,"sample":0.5}}'
    assert canonical(b'{"audit": {}}') == b'{"audit":{}}'


def test_all_problems_are_named_at_once_with_their_places_and_without_values():
    """One line each."""
    with pytest.raises(PolicyInvalid) as caught:
        parse(b'{"audit": {"sample": "hunter2", "debug_mode": 1, "more": 2}, "limit": {}, "identity": []}')

    lines = caught.value.message.splitlines()
    assert {line.partition(":")[0] for line in lines} == {
        "$.audit.sample",
        "$.audit.debug_mode",
        "$.audit.more",
        "$.limit",
        "$.identity",
    }
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff",
        b'{"audit": {"sample": NaN}}',
        b'{"audit": {"sample": Infinity}}',
        b'{"audit": {"sample": 2}}',
        b'{"audit": {}, "audit": {}}',
        b'{"audit": {"sample": 0, "sample": 1}}',
        b'{"audit": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"audit": {"sample": ' + b"9" * 5000 + b"}}",
        b'{"audit": {"sample": 1e999}}',
        json.dumps({"x": "a" * MAX_BYTES}).encode(),
    ],
)
def test_what_is_no_document_is_refused_and_nothing_else_happens(data):
    """Garbage, NaN, keys that come twice, depth, numbers, size."""
    for read in (parse, canonical):
        with pytest.raises(PolicyInvalid):
            read(data)


def test_a_signature_fits_one_payload_and_the_keys_that_are_known():
    """A verifier may know several keys, so that they can be changed."""
    old, new = (Signer(bytes([n]) * 32) for n in (1, 2))
    verifier = Verifier(old.public_key + new.public_key)
    signature = new.sign(b"payload")

    assert verifier.is_valid(signature, b"payload")
    assert verifier.is_valid(old.sign(b"payload"), b"payload")
    assert not verifier.is_valid(signature, b"payload.")
    assert not verifier.is_valid(b"", b"payload")
    assert not verifier.is_valid(signature[:-1] + bytes([signature[-1] ^ 1]), b"payload")
    assert not Verifier(public_key(b"\3" * 32)).is_valid(signature, b"payload")
