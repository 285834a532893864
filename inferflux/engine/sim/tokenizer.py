"""A reversible tokenizer without files: single bytes, words of two syllables, and marks of the chat template.

    0..255                    the byte itself
    256..256+NUM_WORDS-1      " badu", " lozi"...: all that the engine ever generates
    MARKS                     roles and ends; text never encodes to them, so users can't forge a turn

All words have five bytes, so none is a prefix of another and decode(encode(text)) == text and the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

SYLLABLES = tuple(c + v for c in "bdfghjklmnprstvz" for v in "aeiou")
FIRST_WORD = 256
WORDS = tuple(f" {a}{b}" for a in SYLLABLES for b in SYLLABLES)
NUM_WORDS = len(WORDS)
FIRST_MARK = FIRST_WORD + NUM_WORDS
MARKS = {name: FIRST_MARK + i for i, name in enumerate(("end_of_text", "end", "system", "user", "assistant", "tool"))}
END_OF_TEXT = MARKS["end_of_text"]
VOCABULARY_SIZE = FIRST_MARK + len(MARKS)

_IDS = {word.encode(): FIRST_WORD + i for i, word in enumerate(WORDS)}
_PIECES = re.compile(rb" (?:[bdfghjklmnprstvz][aeiou]){2}|.", re.DOTALL)
_ROLES = {"developer": "system", "function": "tool"}


def encode(text: str) -> list[int]:
    """Text to ids; never yields marks."""
    pieces = _PIECES.findall(text.encode("utf-8", "surrogatepass"))
    return [piece[0] if len(piece) == 1 else _IDS[piece] for piece in pieces]


def decode(token_ids: Iterable[int]) -> str:
    """Ids to text; marks and unknown ids have none, broken UTF-8 becomes replacement characters."""
    return b"".join(map(_piece, token_ids)).decode("utf-8", "replace")


def render_chat(messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Messages with `role` and `content` to the ids of a prompt that ends where the assistant begins."""
    ids: list[int] = []
    for message in messages:
        role = _ROLES.get(message["role"], message["role"])
        ids += [MARKS[role], *encode(message["content"]), MARKS["end"]]
    return [*ids, MARKS["assistant"]]


def _piece(token_id: int) -> bytes:
    if token_id < FIRST_WORD:
        return bytes((token_id,))
    if token_id < FIRST_MARK:
        return WORDS[token_id - FIRST_WORD].encode()
    return b""
