from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inferflux.engine.sim import tokenizer
from inferflux.engine.sim.sequence import StopGuard

ALPHABET = [tokenizer.FIRST_WORD, tokenizer.FIRST_WORD + 1, ord("b"), ord(" ")]
TOKENS = st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=20)
STOPS = st.lists(st.text("ba d", min_size=1, max_size=8), max_size=3)


@given(TOKENS, STOPS)
def test_text_before_the_first_stop_string_comes_out_whole_and_nothing_after_it(
    token_ids: list[int], stops: list[str]
) -> None:
    guard, out, seen = StopGuard(stops), "", ""
    hit = None
    for token_id in token_ids:
        seen += tokenizer.decode([token_id])
        _, text, hit = guard.push(token_id)
        out += text
        if hit is not None:
            break
    else:
        out += guard.flush()[1]

    ends = [seen.find(stop) for stop in stops if stop in seen]
    assert (hit is not None) == bool(ends)
    assert out == (seen[: min(ends)] if ends else seen)


@given(TOKENS, STOPS)
def test_settled_tokens_are_never_taken_back(token_ids: list[int], stops: list[str]) -> None:
    """What a client was told can be resumed elsewhere: ids and text that are out belong together."""
    guard = StopGuard(stops)
    for token_id in token_ids:
        settled, text, hit = guard.push(token_id)
        if hit is not None:
            return
        assert tokenizer.decode(settled) == text


def test_without_stop_strings_nothing_is_held() -> None:
    guard = StopGuard(())

    assert guard.push(ord("x")) == ((ord("x"),), "x", None)
    assert not guard.is_holding
