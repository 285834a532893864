"""What images a request may bring; what it says of itself counts for nothing."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import orjson
import pytest

from inferflux.errors import InvalidRequest
from services.gateway.images import ImageLimits, check, found
from tests.support.pictures import data_url, picture

LIMITS = ImageLimits(max_images=2, max_bytes=20_000, max_pixels=64 * 64)


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def chat(*urls: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "what is this?"}, *parts]}]}


def shapes(image: bytes) -> list[dict[str, Any]]:
    """Every way in which the dialects that we serve put an image into a call."""
    url, data = data_url(image), base64.b64encode(image).decode()
    source = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url},
        {"image_url": {"url": url, "detail": "auto"}},
        source,
        {"type": "tool_result", "content": [source]},
    ]
    return [{"messages": [{"role": "user", "content": [part]}]} for part in parts] + [{"images": [url]}]


def run(document: dict[str, Any]) -> None:
    check(orjson.dumps(document), document, LIMITS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_images_within_the_limits_pass(kind: str) -> None:
    """All formats that workers read, at the limit."""
    run(chat(*[data_url(picture(i, 64, 64, kind), kind.lower()) for i in range(2)]))


@pytest.mark.parametrize("shape", range(6))
def test_images_are_found_in_all_dialects(shape: int) -> None:
    """Wherever an image is, its size is known."""
    run(shapes(picture(1))[shape])
    with pytest.raises(InvalidRequest, match="the limit is 4096"):
        run(shapes(picture(1, 65, 64))[shape])


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (chat(*[data_url(picture(i)) for i in range(3)]), "more than 2 images"),
        (chat(data_url(b"\0" * 21_000)), "has 21000 bytes, the limit is 20000"),
        (chat(data_url(bomb(65, 64))), "65 x 64 = 4160 pixels, the limit is 4096"),
        (chat(data_url(bomb(1 << 30, 1 << 30))), "is not an image|pixels, the limit"),
        (chat(data_url(picture(1, kind="GIF", width=16, height=16, num_frames=3))), "animated, the limit is 1 frame"),
        (chat(data_url(picture(1, kind="PNG", width=16, height=16, num_frames=3))), "animated, the limit is 1 frame"),
        (chat(data_url(picture(1, kind="WEBP", width=16, height=16, num_frames=3))), "animated, the limit is 1 frame"),
        (chat(data_url(picture(1, kind="TIFF"))), "not an image of a known format"),
        (chat(data_url(picture(1)[:20])), "not an image of a known format"),
        (chat(data_url(b"")), "not an image of a known format"),
        (chat(data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>")), "not an image of a known format"),
        (chat("data:image/png;base64,%%%"), "not valid base64"),
        (chat("data:image/png,AAAA"), "must be data:image"),
        (chat("data:image/png"), "must be data:image"),
    ],
)
def test_what_is_beyond_them_is_refused(document: dict[str, Any], message: str) -> None:
    """With the limit and the actual value, and without a word of the image."""
    with pytest.raises(InvalidRequest, match=message) as caught:
        run(document)

    assert caught.value.param == "image_url"
    assert len(str(caught.value)) < 200


def test_other_strings_are_not_images() -> None:
    """Schemas, arguments of tools and documents may say what they want."""
    schema = {"image_url": data_url(b"no image")}
    document = {"tools": [schema], "response_format": schema, "messages": [{"role": "user", "content": "image"}]}
    pdf = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AAAA"}}

    assert not list(found({**document, "messages": [{"content": [pdf]}]}))
    run(document)
