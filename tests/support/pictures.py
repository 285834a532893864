"""Images for tests, made from a number: different numbers, different images."""

from __future__ import annotations

import base64
import io
import random

from PIL import Image


def picture(number: int, width: int = 48, height: int = 48, kind: str = "PNG", num_frames: int = 1) -> bytes:
    """Encode noise."""
    frames = [_noise(number + i, width, height) for i in range(num_frames)]
    more = {"save_all": True, "append_images": frames[1:]} if num_frames > 1 else {}
    file = io.BytesIO()
    frames[0].save(file, kind, **more)
    return file.getvalue()


def data_url(image: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _noise(number: int, width: int, height: int) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(number).randbytes(3 * width * height))
