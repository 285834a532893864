"""How many images a request may bring, and how big: known from their first bytes, before anything decodes one.

A few kilobytes of a compressed image can be gigabytes of pixels. Sizes are read by the library with which workers
decode the image later, so that both see the same one; no pixel is decoded here. It is imported with the first image.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from inferflux.errors import InvalidRequest
from inferflux.policy.identity import Network
from inferflux.telemetry import metrics
from services.gateway import media

FORMATS = ("PNG", "JPEG", "GIF", "WEBP")
ADDRESS, MAX_SCHEME = ("https://", "http://"), 8
_PARTS = ("image_url", "input_image")
_HINTS = (b"image", b"\\u")
"""A body without any of these, letter for letter or escaped, has no images."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """`max_images`: of one request. `max_bytes` and `max_pixels`: of one image, as it comes and when it is decoded.

    `hosts`: where images may be fetched from, by their address in a request; all of their addresses are in `network`.
    """

    max_images: int = 16
    max_bytes: int = 8 << 20
    max_pixels: int = 1 << 24
    hosts: frozenset[str] = frozenset()
    network: Network = "public"


def check(body: bytes, document: Mapping[str, Any], limits: ImageLimits) -> None:
    """Raise InvalidRequest if the document, which is the body's, brings images beyond the limits."""
    if not any(hint in body for hint in _HINTS):
        return
    for number, (name, url) in enumerate(found(document), 1):
        if number > limits.max_images:
            raise _refused(name, f"the request has more than {limits.max_images} images, which is the limit")
        if url[:MAX_SCHEME].lower().startswith(ADDRESS):
            continue  # of a listed host, or it had been refused: fetched later, and looked at then
        _check(name, payload(name, url), limits)


def found(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the images of all dialects: the field, and the image's URL."""
    images = document.get("images")
    for url in images if isinstance(images, list) else ():
        if isinstance(url, str):
            yield "images", url
    for node in media.parts(document):
        for name in _PARTS:
            value = node.get(name)
            url = value.get("url") if isinstance(value, dict) else value
            if isinstance(url, str):
                yield name, url
        source = node.get("source")
        if node.get("type") == "image" and isinstance(source, dict) and isinstance(data := source.get("data"), str):
            yield "source.data", f"data:;base64,{data}"


def payload(name: str, url: str) -> str:
    """Return what a data: URL has in base64. Raises InvalidRequest."""
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise _refused(name, f"{name} must be data:image/...;base64,... with the image in base64")
    return data


def look(name: str, image: bytes, limits: ImageLimits) -> str:
    """Check an image and count it; returns its format in lower case. Raises InvalidRequest."""
    if len(image) > limits.max_bytes:
        raise _refused(name, f"{name}: the image has {len(image)} bytes, the limit is {limits.max_bytes}")
    kind, (width, height), is_animated = _read(name, image)
    if width * height > limits.max_pixels:
        size = f"{width} x {height} = {width * height} pixels"
        raise _refused(name, f"{name}: the image has {size}, the limit is {limits.max_pixels}")
    if is_animated:
        raise _refused(name, f"{name}: the image is animated, the limit is 1 frame")
    metrics.IMAGES.labels("accepted").inc()
    metrics.IMAGE_BYTES.observe(len(image))
    metrics.IMAGE_PIXELS.observe(width * height)
    return kind


def _check(name: str, data: str, limits: ImageLimits) -> None:
    num_bytes = len(data) * 3 // 4 - data[-2:].count("=")
    if num_bytes > limits.max_bytes:  # not worth decoding
        raise _refused(name, f"{name}: the image has {num_bytes} bytes, the limit is {limits.max_bytes}")
    try:
        image = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as e:
        raise _refused(name, f"{name}: the image is not valid base64") from e
    look(name, image, limits)


def _read(name: str, image: bytes) -> tuple[str, tuple[int, int], bool]:
    """Read the format, width and height, and whether there is more than one frame."""
    from PIL import GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401, PLC0415

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has an opinion of its own on sizes; ours is the stricter one
            with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
                return str(opened.format).lower(), opened.size, bool(getattr(opened, "is_animated", False))
    except (Image.DecompressionBombError, OSError, ValueError, SyntaxError, EOFError) as e:
        raise _refused(name, f"{name} is not an image of a known format: {', '.join(FORMATS)}") from e


def _refused(name: str, message: str) -> InvalidRequest:
    metrics.IMAGES.labels("refused").inc()
    return InvalidRequest(message, param=name)
