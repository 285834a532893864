"""Bodies that two readers could read differently, or that cost more to read than they are worth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferflux.errors import InvalidRequest
from services.gateway import strict_json
from services.gateway.strict_json import MAX_MEMBERS, MAX_STRINGS, MAX_VALUES, parse_object

TEXT = st.text('ab\\":{[,\n\u00e9', max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 10**19 - 1) | st.floats(-1e9, 1e9, width=32) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=30,
)


class Pairs(list[tuple[str, Any]]):
    """An object as it was written, members that come twice included."""


def has_twins(node: Any) -> bool:
    if isinstance(node, Pairs):
        names = [name for name, _ in node]
        return len(set(names)) < len(names) or any(has_twins(value) for _, value in node)
    return isinstance(node, list) and any(map(has_twins, node))


def written(node: Any) -> str:
    if isinstance(node, Pairs):
        return "{" + ", ".join(f"{json.dumps(name)} : {written(value)}" for name, value in node) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(written, node)) + "]"
    return json.dumps(node)


def pairs(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(st.tuples(st.sampled_from(("a", "b", '"', "\\", "\u00e9")), values), max_size=3).map(Pairs)


@given(st.dictionaries(TEXT, JSON, max_size=4), st.booleans())
def test_what_is_well_formed_is_read_as_it_is(document, is_compact):
    """Whatever is in its texts: quotes, backslashes, colons and brackets."""
    separators = (",", ":") if is_compact else (" , ", " : ")
    body = json.dumps(document, separators=separators, ensure_ascii=is_compact).encode()

    assert parse_object(body, 64) == document


@given(pairs(st.recursive(TEXT, lambda inner: st.lists(inner, max_size=3) | pairs(inner), max_leaves=8)))
def test_exactly_the_bodies_with_twins_are_refused(node):
    """At every depth, however the twins are written."""
    body = written(node).encode()
    if has_twins(node):
        with pytest.raises(InvalidRequest, match="more than once"):
            parse_object(body, 64)
    else:
        assert parse_object(body, 64) == json.loads(body)


@pytest.mark.parametrize(
    "body",
    [
        rb'{"a": 1, "a": 2}',
        rb'{"a": 1, "\u0061": 2}',
        rb'{"a": 1,"b":"\\","a" : 2}',
        rb'{"a": "\"", "a": "\\\""}',
        rb'{"x": [{"y": {"a": 1, "a": 1}}]}',
    ],
)
def test_twins_are_found_in_all_their_disguises(body):
    """Escapes in a name make no other name."""
    with pytest.raises(InvalidRequest, match="more than once"):
        parse_object(body, 64)


@pytest.mark.parametrize("number", ["1" * 20, "-" + "1" * 20, "1" * 5000, "9" * 30 + ".0", "1" * 20 + "e1"])
def test_numbers_that_readers_round_differently_are_refused(number):
    """An integer of 20 digits is one for Python, a float for others, and too long for some from 4300 digits on."""
    with pytest.raises(InvalidRequest, match="more than 19 digits"):
        parse_object(b'{"seed": %s}' % number.encode(), 64)


@pytest.mark.parametrize("number", ["9" * 19, str(-(2**63)), "0." + "3" * 40, "1.5e300", "1e-400"])
def test_numbers_that_all_read_alike_are_fine(number):
    """Also with many digits behind the point."""
    assert parse_object(b'{"seed": %s}' % number.encode(), 64) == {"seed": json.loads(number)}


def test_digits_in_text_are_no_number():
    """Nor are those of a hash."""
    assert parse_object(b'{"id": "%s"}' % (b"7" * 64), 64)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "01", "+1", "0x10", "1_000"])
def test_numbers_that_are_none_in_json_are_refused(number):
    """Python's own parser would take the first three."""
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        parse_object(b'{"temperature": %s}' % number.encode(), 64)


def bombs() -> Iterator[Any]:
    yield pytest.param(json.dumps({str(i): 1 for i in range(1_000_000)}).encode(), "strings", id="a million members")
    yield pytest.param(b'{"a":[%s1]}' % (b"{}," * (MAX_VALUES + 1)), "values", id="many objects")
    yield pytest.param(b'{"a":[%s1]}' % (b"1," * (MAX_VALUES + 1)), "values", id="many numbers")
    yield pytest.param(b'{"a":[%s""]}' % (b'"",' * (MAX_STRINGS + 1)), "strings", id="many strings")
    yield pytest.param(b'{"a":%s}' % (b"[" * 1_000_000), "JSON", id="deep")
    yield pytest.param(b'{"a":"%s' % (rb"\"" * 1_000_000), "JSON", id="many quotes in an open string")
    yield pytest.param(b'{"a":%s}' % (b"9" * 1_000_000), "digits", id="a long number")
    yield pytest.param(b"{%s}" % (b":" * (MAX_MEMBERS + 1)), "members", id="many colons")


@pytest.mark.parametrize(("body", "why"), list(bombs()))
def test_bombs_are_refused_before_they_are_built(body, why, monkeypatch):
    """What exceeds a limit is never given to the parser; what is no JSON fails in it."""
    if why != "JSON":
        monkeypatch.setattr(strict_json, "_loads", lambda _: pytest.fail("parsed"))
    with pytest.raises(InvalidRequest, match=why):
        parse_object(body, 64)
