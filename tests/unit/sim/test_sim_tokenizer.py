from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inferflux.engine.sim import tokenizer

IDS = st.lists(st.integers(0, tokenizer.VOCABULARY_SIZE - 1))
WORDS = st.lists(st.integers(tokenizer.FIRST_WORD, tokenizer.FIRST_MARK - 1))


@given(st.text())
def test_decoding_reverses_encoding(text: str) -> None:
    """Any text survives."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(WORDS)
def test_encoding_reverses_decoding_of_what_the_engine_generates(ids: list[int]) -> None:
    """The next turn's prompt holds the very tokens of the last turn's answer."""
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


@given(st.text())
def test_no_text_encodes_to_marks(text: str) -> None:
    """Users can't forge a turn of the chat."""
    assert all(token_id < tokenizer.FIRST_MARK for token_id in tokenizer.encode(text))


@given(IDS)
def test_any_ids_decode(ids: list[int]) -> None:
    assert isinstance(tokenizer.decode(ids), str)


def test_roles_are_marked_and_the_assistant_goes_next() -> None:
    ids = tokenizer.render_chat([{"role": "developer", "content": "be"}, {"role": "user", "content": "hi"}])

    marks = tokenizer.MARKS
    assert ids == [marks["system"], 98, 101, marks["end"], marks["user"], 104, 105, marks["end"], marks["assistant"]]
