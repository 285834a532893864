from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from inferflux.policy.guardrails import AnyRule
from services.gateway.endpoints import ENDPOINTS, Kind
from services.gateway.guardrails.events import CHOICES
from services.gateway.guardrails.screen import compile_screen
from services.gateway.guardrails.stream import StreamScreen

RULES = [
    {"name": "cards", "kind": "pii", "types": ["credit_card", "email"], "action": "redact"},
    {"name": "words", "kind": "blocklist", "phrases": ["secret plan"], "action": "redact"},
]
SCREEN = compile_screen([TypeAdapter(AnyRule).validate_python(rule, strict=False) for rule in RULES])
TEXT = "Send 4111 1111 1111 1111 to a.b@example.org: the secret plan, not the secret planet. "


def events(chunks: list[str], *, has_ids: bool = True) -> list[bytes]:
    """One event a chunk, and the end."""
    made = []
    for chunk in chunks:
        choice = {"index": 0, "delta": {"content": chunk}, "finish_reason": None}
        made.append(b"data: " + json.dumps({"object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n")
    made.append(b"data: [DONE]\n\n")
    return [b"id: %d\n%b" % (number, event) for number, event in enumerate(made)] if has_ids else made


def content(data: bytes) -> str:
    lines = [line.removeprefix(b"data: ") for line in data.split(b"\n") if line.startswith(b"data: {")]
    return "".join(json.loads(line)["choices"][0]["delta"]["content"] for line in lines)


def cut(text: str, places: list[int]) -> list[str]:
    bounds = sorted({0, len(text), *(place % len(text) for place in places)})
    return [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]  # noqa: RUF007


def read(pieces: list[bytes], num_seen: int = 0) -> bytes:
    stream = StreamScreen(SCREEN, CHOICES, num_seen)
    return b"".join(stream.feed(piece) for piece in pieces) + stream.finish()


@settings(max_examples=100, deadline=None)
@given(places=st.lists(st.integers(0, 10_000), max_size=30), cuts=st.lists(st.integers(0, 10_000), max_size=10))
def test_any_way_of_coming_has_the_same_text(places: list[int], cuts: list[int]):
    """However text falls into events, and events into pieces of the connection; no event is lost or joined."""
    said = events(cut(TEXT, places))
    whole = b"".join(said)
    bounds = sorted({0, len(whole), *(place % len(whole) for place in cuts)})
    pieces = [whole[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]  # noqa: RUF007

    shown = read(pieces)

    assert content(shown) == "Send [CREDIT_CARD] to [EMAIL]: the [REDACTED], not the secret planet. "
    assert shown.count(b"id: ") == len(said)
    assert shown == read(said)


@settings(max_examples=50, deadline=None)
@given(places=st.lists(st.integers(0, 10_000), max_size=30), num_seen=st.integers(0, 40))
def test_who_has_the_beginning_gets_the_rest(places: list[int], num_seen: int):
    """The same bytes that would have come without the break."""
    said = events(cut(TEXT, places))
    whole = read(said)
    blocks = [block + b"\n\n" for block in whole.split(b"\n\n")[:-1]]

    assert read(said, num_seen) == b"".join(blocks[num_seen:])


def test_clean_events_are_not_touched():
    """They go on as the very bytes that came, spaces and all."""
    said = b'data: {"choices" : [ {"index":0, "delta":{"content":"it is fine. "}} ] }\n\n: a comment\n\n'

    assert read([said]) == said


def test_every_generating_path_has_a_shape_of_stream():
    """A path can't be in the table without saying where its text is."""
    assert all(endpoint.texts.stream for endpoint in ENDPOINTS.values() if endpoint.kind is Kind.GENERATE)
