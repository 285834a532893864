"""No address in a body reaches anything that would open it."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from inferflux.errors import InvalidRequest
from services.gateway.envelope import BodyLimits, parse
from tests.support.pictures import data_url, picture

ADDRESSES = (
    "http://127.0.0.1/",
    "HTTP://127.0.0.1/",
    "https://example.com/a.png",
    "file:///etc/passwd",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "//example.com/a.png",
    " data:image/png;base64,AAAA",
    "dataa:x",
    "",
)
EMBEDDED = data_url(picture(1, 1, 1))


def shapes(url: str) -> list[dict[str, Any]]:
    """Every way in which the dialects that we serve put a URL into a call."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"image_url": url},
        {"image_url": {"url": url, "detail": "auto"}},
        {"type": "audio_url", "audio_url": {"url": url}},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "input_image", "image_url": url},
        {"type": "input_file", "file_url": url},
        {"type": "image", "source": {"type": "url", "url": url}},
        {"type": "document", "source": {"type": "url", "url": url}},
        {"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": url}}]},
    ]
    calls = [{"messages": [{"role": "user", "content": [part]}]} for part in parts]
    calls += [{"input": [{"role": "user", "content": [part]}]} for part in parts]
    return [*calls, {"images": [url]}, {"inputs": [{"content": [parts[0]]}]}, {"documents": [{"content": [parts[0]]}]}]


@pytest.mark.parametrize("url", ADDRESSES)
def test_addresses_are_refused_wherever_they_are(url):
    """In every shape, with the name of the field, and without the address."""
    for call in shapes(url):
        with pytest.raises(InvalidRequest, match="data: URL") as raised:
            parse(orjson.dumps(call), BodyLimits())
        assert "127.0.0.1" not in raised.value.message


def test_embedded_media_are_the_workers_business():
    """In any spelling of `data:`."""
    for url in (EMBEDDED, EMBEDDED.replace("data", "DATA")):
        for call in shapes(url):
            assert parse(orjson.dumps(call), BodyLimits())


def test_a_name_written_with_escapes_is_that_name():
    """As it will be for the worker."""
    with pytest.raises(InvalidRequest, match="image_url"):
        parse(rb'{"messages": [{"content": [{"\u0069mage_\u0075rl": "http://10.0.0.1/"}]}]}', BodyLimits())


def test_media_of_earlier_requests_cannot_be_named():
    """They may be another tenant's."""
    part = {"type": "image_url", "image_url": None, "uuid": "somebody-elses"}
    with pytest.raises(InvalidRequest, match="uuid"):
        parse(orjson.dumps({"messages": [{"content": [part]}]}), BodyLimits())


@pytest.mark.parametrize(
    "call",
    [
        {"messages": [{"role": "user", "content": "see http://example.com/image_url"}]},
        {"tools": [{"function": {"parameters": {"properties": {"image_url": {"type": "string"}}}}}]},
        {"tools": [{"function": {"parameters": {"examples": [{"image_url": "https://example.com/a.png"}]}}}]},
        {"messages": [{"content": [{"type": "tool_use", "input": {"image_url": "https://example.com/a.png"}}]}]},
        {"messages": [{"content": [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]}]},
        {"metadata": {"image_url": "https://example.com/a.png"}},
        {"prompt": "url"},
    ],
)
def test_text_and_tools_may_speak_of_addresses(call):
    """Nobody fetches those."""
    assert parse(orjson.dumps(call), BodyLimits())
