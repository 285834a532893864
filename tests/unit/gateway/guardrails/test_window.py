from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from inferflux.policy.guardrails import AnyRule
from services.gateway.guardrails.screen import Screen, compile_screen
from services.gateway.guardrails.window import Window, edited

RULE = TypeAdapter(AnyRule)


def screen(*rules: dict) -> Screen:
    named = [{"name": f"rule-{i}", "action": "redact"} | rule for i, rule in enumerate(rules)]
    return compile_screen([RULE.validate_python(rule, strict=False) for rule in named])


EVERYTHING = screen(
    {"kind": "pii"},
    {"kind": "secrets"},
    {"kind": "urls", "allow": ["*.example.com"]},
    {"kind": "blocklist", "phrases": ["secret", "secret plan", "plan b", "b c"]},
    {"kind": "blocklist", "phrases": ["Top Secret", "x"], "is_case_sensitive": True, "is_whole_words": False},
    {
        "kind": "pattern",
        "patterns": [r"(?i)ignore (?:all|any)? ?instr\w{0,8}\b", r"a(?:bbb|)c{0,3}", r"\bend$", "^start"],
    },
    {"kind": "pattern", "patterns": [r"\bb[a-z]{1,6}d\b"], "action": "flag"},
    {"kind": "pattern", "patterns": [r"help@example\.com"], "action": "allow"},
)
BLOCKING = screen(
    {"kind": "pii", "action": "block"},
    {"kind": "blocklist", "phrases": ["secret plan"], "action": "block"},
    {"kind": "pattern", "patterns": [r"plan [a-z]{1,5}"]},
)
WORDS = (
    "secret", "plan", "b", "c", "Top", "Secret", "abbbcc", "ab", "bad", "balanced", "start", "end", "ignore", "all",
    "instructions", "4111 1111 1111 1111", "4111111111111112", "DE89 3704 0044 0532 0130 00",
    "078-05-1120", "078-05-11",
    "a.b@example.org", "help@example.com", "https://evil.test/x?y", "www.example.com", "https://a.example.com/",
    "+49 30 901820", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2ln", "AKIAIOSFODNN7EXAMPLE", "10.0.0.256", "10.0.0.25",
    "-----BEGIN PRIVATE KEY-----\nMIIB\n-----END PRIVATE KEY-----", "é", "İ", "😀", ".", "-", "x", "@", "1",
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=12).flatmap(
    lambda words: st.lists(st.sampled_from([" ", "", "\n"]), min_size=len(words), max_size=len(words)).map(
        lambda gaps: "".join(a for pair in zip(words, gaps, strict=True) for a in pair)
    )
)


def read(rules: Screen, chunks: list[str]) -> tuple[str, list, object]:
    """Read a text in chunks: what it becomes, what was found, what it was blocked by."""
    window = rules.window()
    for chunk in chunks:
        window.feed(chunk)
    window.finish()
    text = "".join(chunks)[: window.cleared]
    return edited(text, window.edits), window.found, window.blocked


def cut(text: str, places: list[int]) -> list[str]:
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("rules", [EVERYTHING, BLOCKING], ids=["redacting", "blocking"])
@settings(max_examples=120, deadline=None)
@given(text=TEXTS, places=st.lists(st.integers(0, 10_000), max_size=12))
def test_any_chunking_has_the_outcome_of_the_whole(rules: Screen, text: str, places: list[int]):
    """However a text is cut, it becomes the same."""
    assert read(rules, cut(text, places)) == read(rules, [text])


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_character_by_character(text: str):
    """One character at a time is a chunking too."""
    assert read(EVERYTHING, list(text)) == read(EVERYTHING, [text])


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, places=st.lists(st.integers(0, 10_000), max_size=12))
def test_what_was_cleared_is_never_judged_otherwise(text: str, places: list[int]):
    """What may have gone to the client stays right, whatever comes after it."""
    window, whole = EVERYTHING.window(), EVERYTHING.window()
    whole.feed(text)
    whole.finish()
    done = ""
    for chunk in cut(text, places):
        window.feed(chunk)
        done += chunk
        so_far = [edit for edit in whole.edits if edit.start < window.cleared]
        assert so_far == window.edits
        assert edited(done[: window.cleared], window.edits) == edited(text[: window.cleared], so_far)


def test_clean_text_waits_for_nothing():
    """At the end of a sentence nothing is held back."""
    window = EVERYTHING.window()
    window.feed("The weather is fine today, and so it was yesterday. ")

    assert window.cleared == 52


def test_the_beginning_of_a_match_waits():
    """What may become a match is held back, and nothing before it."""
    window = EVERYTHING.window()
    window.feed("my card is 4111 1111 1")

    assert window.cleared == len("my card is ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("card 4111 1111 1111 1111.", "card [CREDIT_CARD]."),
        ("card 4111 1111 1111 1112.", "card 4111 1111 1111 1112."),
        ("card 4111111111111111 2024", "card [CREDIT_CARD] 2024"),
        ("iban DE89 3704 0044 0532 0130 00 AND MORE", "iban [IBAN] AND MORE"),
        ("iban DE89 3704 0044 0532 0130 01 AND", "iban DE89 3704 0044 0532 0130 01 AND"),
        ("ssn 078-05-1120, 000-12-3456, 900-12-3456", "ssn [SSN], 000-12-3456, 900-12-3456"),
        ("to jane.doe@corp.example.org!", "to [EMAIL]!"),
        ("to help@example.com!", "to help@example.com!"),
        ("call +49 30 901820 now", "call [PHONE] now"),
        ("call (212) 555-0100", "call [PHONE]"),
        ("host 10.1.2.3 and 10.1.2.300", "host [IP_ADDRESS] and 10.1.2.300"),
        ("key AKIAIOSFODNN7EXAMPLE", "key [AWS_ACCESS_KEY]"),
        ("see https://evil.test/a?b#c and https://www.example.com/x", "see [URL] and https://www.example.com/x"),
        ("see https://www.example.com@evil.test/", "see [URL]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE+/=\n-----END RSA PRIVATE KEY-----\n", "[PRIVATE_KEY]\n"),
        ("SECRET PLAN b", "[REDACTED]"),
        ("secretly", "secretly"),
        ("a top secret", "a top [REDACTED]"),
        ("aTop Secrets", "a[REDACTED]s"),
    ],
)
def test_what_becomes_of_texts(text: str, expected: str):
    """Forms with a checksum need it, phrases need their word boundaries, exempt texts stay."""
    rules = screen(
        {"kind": "pii"},
        {"kind": "secrets"},
        {"kind": "urls", "allow": ["*.example.com"]},
        {"kind": "blocklist", "phrases": ["secret", "secret plan", "plan b"]},
        {"kind": "blocklist", "phrases": ["Top Secret"], "is_case_sensitive": True, "is_whole_words": False},
        {"kind": "pattern", "patterns": [r"help@example\.com"], "action": "allow"},
    )

    assert read(rules, [text])[0] == expected


def test_a_block_ends_the_text_before_it():
    """Nothing of what is blocked, and nothing after it, is ever cleared."""
    window = BLOCKING.window()
    window.feed("this is the secret plan for all")
    window.feed(" of us")

    assert window.blocked is not None
    assert window.cleared == len("this is the ")


def test_an_endless_beginning_is_a_match():
    """Nobody can make a window hold back without bound."""
    window: Window = EVERYTHING.window()
    window.feed("-----BEGIN PRIVATE KEY-----" + "A" * 200_000)

    assert len(window._text) < 80_000
    assert window.cleared > 60_000


def test_reading_is_linear():
    """Digits that are no card numbers don't make a long text slow."""
    import time

    def seconds(num: int) -> float:
        begin = time.process_time()
        read(EVERYTHING, ["4111 1111 1111 1112 and " * num])
        return time.process_time() - begin

    seconds(100)
    # 5 if it is linear, 25 if it is not; the least of some, since other load only ever adds.
    assert min(seconds(4000) for _ in range(3)) < 15 * max(seconds(800) for _ in range(3))
