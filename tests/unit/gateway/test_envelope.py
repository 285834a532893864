"""What the gateway reads of a body: within limits, and without trusting any of it."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferflux.errors import BodyTooLarge, InvalidRequest, RequestTimeout
from services.gateway.asgi import ClientGone
from services.gateway.envelope import MAX_MODEL_NAME, BodyLimits, Envelope, parse, parse_object, read_body

LIMITS = BodyLimits(max_bytes=1000, max_depth=8, grace_s=0.1)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text("ab[{", max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab[{", max_size=3), inner, max_size=4),
    max_leaves=30,
)


def nested(depth: int, opening: str = "[", closing: str = "]") -> bytes:
    """An object in which lists (or objects) are nested so that the whole has `depth` levels."""
    return b'{"a": ' + (opening * (depth - 1)).encode() + b"1" + (closing * (depth - 1)).encode() + b"}"


def depth_of(value: object) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if children is None else 1 + max(map(depth_of, children), default=0)


class Body:
    """An ASGI `receive` that gives chunks and then what `last` says: the end, a disconnect, or nothing ever."""

    def __init__(self, *chunks: bytes, last: str = "end") -> None:
        self._messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
        self._messages[-1]["more_body"] = last != "end"
        self._last = last

    async def __call__(self):
        if self._messages:
            return self._messages.pop(0)
        if self._last == "silence":
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}


# --- the envelope


@pytest.mark.parametrize("stream", [b"true", b"false", b"null", b'"yes"', b"1"])
def test_the_stream_flag_is_the_workers_business(stream):
    """The response says whether it streams; the gateway reads no flag that two readers could read differently."""
    assert parse(b'{"model": "m", "stream": ' + stream + b"}", LIMITS) == Envelope("m")


@pytest.mark.parametrize("body", [b"{}", b'{"model": null}', b'{"messages": []}'])
def test_a_missing_model_means_the_default(body):
    """As does null."""
    assert parse(body, LIMITS).model is None


@pytest.mark.parametrize("model", [1, 1.5, True, [], ["m"], {}, "", "m" * (MAX_MODEL_NAME + 1)])
def test_a_model_of_the_wrong_type_or_size_is_refused(model):
    """The error names the field."""
    with pytest.raises(InvalidRequest) as raised:
        parse(json.dumps({"model": model}).encode(), LIMITS)

    assert raised.value.param == "model"


def test_the_longest_model_name_is_accepted():
    """The limit itself is allowed."""
    name = "m" * MAX_MODEL_NAME

    assert parse(json.dumps({"model": name}).encode(), LIMITS).model == name


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"hello",
        b"{",
        b'{"a": 1',
        b'{"a": 1}}',
        b'{"a": NaN}',
        b"{'a': 1}",
        b'{"a": 1,}',
        b'\xef\xbb\xbf{"a": 1}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b'{"a": 1}\x00',
        b"\x00",
    ],
)
def test_what_is_not_json_is_refused(body):
    """With 400, whatever it is."""
    with pytest.raises(InvalidRequest):
        parse(body, LIMITS)


@pytest.mark.parametrize("body", [b"[]", b'"text"', b"1", b"null", b"true", b'[{"model": "m"}]'])
def test_json_that_is_no_object_is_refused(body):
    """All endpoints take objects."""
    with pytest.raises(InvalidRequest, match="must be a JSON object"):
        parse(body, LIMITS)


def test_the_refusal_of_bad_json_does_not_repeat_it():
    """Error messages are logged, prompts are not."""
    with pytest.raises(InvalidRequest) as raised:
        parse(b'{"prompt": "my secret" oops', LIMITS)

    assert "secret" not in raised.value.message
    assert "byte" in raised.value.message


@given(st.binary(max_size=100))
def test_any_bytes_are_parsed_or_refused(body):
    """There is no third outcome."""
    with contextlib.suppress(InvalidRequest):
        assert isinstance(parse(body, LIMITS), Envelope)


# --- depth


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_depth_is_limited_exactly(opening, closing):
    """As deep as the limit is fine, one more is not, in lists as in objects."""
    parse_object(nested(LIMITS.max_depth, opening, closing), LIMITS)

    with pytest.raises(InvalidRequest, match="deeper than 8"):
        parse_object(nested(LIMITS.max_depth + 1, opening, closing), LIMITS)


@pytest.mark.parametrize("depth", [1_000, 1_025, 100_000])
def test_absurd_depth_is_refused_too(depth):
    """Also beyond what the parser itself can take."""
    with pytest.raises(InvalidRequest):
        parse_object(nested(depth), BodyLimits())


def test_wide_bodies_and_brackets_in_text_are_not_deep():
    """Only nesting counts."""
    parse_object(json.dumps({"a": [[i] for i in range(100)], "b": "[{" * 100}).encode(), LIMITS)


@given(st.dictionaries(st.text(max_size=3), JSON, max_size=4), st.integers(1, 6))
def test_depth_is_what_is_limited(document, max_depth):
    """A body is refused exactly when it is deeper than the limit."""
    body, limits = json.dumps(document).encode(), BodyLimits(max_depth=max_depth)
    if depth_of(document) <= max_depth:
        assert parse_object(body, limits) == document
    else:
        with pytest.raises(InvalidRequest, match="deeper"):
            parse_object(body, limits)


# --- the body on its way


async def test_chunks_are_joined():
    """And empty ones are nothing."""
    assert await read_body(Body(b"ab", b"", b"c"), {}, LIMITS) == b"abc"


async def test_the_largest_body_is_accepted():
    """The limit itself is allowed."""
    assert len(await read_body(Body(b"x" * 600, b"x" * 400), {b"content-length": b"1000"}, LIMITS)) == 1000


async def test_a_body_that_grows_too_large_is_refused_while_it_comes():
    """Before its end, which may never come."""
    with pytest.raises(BodyTooLarge, match="limit is 1000"):
        await read_body(Body(b"x" * 600, b"x" * 401, last="silence"), {}, LIMITS)


@pytest.mark.parametrize("declared", [b"1001", b"9" * 30])
async def test_a_body_declared_too_large_is_refused_unread(declared):
    """Nothing of it is waited for."""

    async def receive():
        pytest.fail("the body was asked for")

    with pytest.raises(BodyTooLarge):
        await read_body(receive, {b"content-length": declared}, LIMITS)


@pytest.mark.parametrize("encoding", [b"gzip", b"br", b"gzip, identity"])
async def test_compressed_bodies_are_refused(encoding):
    """A small body could become a large one."""
    with pytest.raises(InvalidRequest) as raised:
        await read_body(Body(b"{}"), {b"content-encoding": encoding}, LIMITS)

    assert raised.value.param == "content-encoding"


async def test_identity_is_no_compression():
    """In any spelling."""
    assert await read_body(Body(b"{}"), {b"content-encoding": b"Identity"}, LIMITS) == b"{}"


@pytest.mark.parametrize("chunks", [(b"",), (b"ab",), (b"a", b"b")])
async def test_a_body_that_stops_coming_is_refused(chunks):
    """After the grace time, with what came so far."""
    with pytest.raises(RequestTimeout, match=f"{len(b''.join(chunks))} bytes"):
        await read_body(Body(*chunks, last="silence"), {}, LIMITS)


async def test_a_client_that_leaves_ends_the_reading():
    """Nobody is there to be answered."""
    with pytest.raises(ClientGone):
        await read_body(Body(b"ab", last="disconnect"), {}, LIMITS)
