"""Images by address: of the hosts that the operator has listed, fetched by the gateway and put into the body.

From there on the request is like any other: no worker opens a connection, and another worker gets the same bytes. It is
done when a request has passed guardrails and limits, so that nobody can make the gateway fetch for nothing.
"""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Any

import orjson

from inferflux.errors import BodyTooLarge, InvalidRequest, Unavailable
from inferflux.telemetry import metrics
from services.gateway import fetch, images, media
from services.gateway.images import ImageLimits

ACCEPT = "image/png, image/jpeg, image/gif, image/webp"


async def inlined(body: bytes, limits: ImageLimits, max_bytes: int) -> bytes:
    """Return the body with all images of listed hosts in it. Raises InvalidRequest, naming the address.

    Raises BodyTooLarge when it gets more than `max_bytes`.
    """
    document = orjson.loads(body)
    found = ((part, media.listed_address(part, limits.hosts)) for part in media.parts(document))
    listed = [(part, url) for part, url in found if url is not None]
    fetched = await _fetch_all(sorted({url for _, url in listed}), limits)
    if (num_bytes := len(body) + sum(map(len, fetched.values()))) > max_bytes:
        raise BodyTooLarge(f"the body with its images has {num_bytes} bytes, the limit is {max_bytes}")
    for part, url in listed:
        _put(part, fetched[url])
    return orjson.dumps(document)


async def _fetch_all(addresses: list[str], limits: ImageLimits) -> dict[str, str]:
    try:
        async with asyncio.TaskGroup() as group:
            tasks = {url: group.create_task(_data_url(url, limits)) for url in addresses}
    except ExceptionGroup as e:
        raise e.exceptions[0] from None
    return {url: task.result() for url, task in tasks.items()}


async def _data_url(url: str, limits: ImageLimits) -> str:
    began_at = time.monotonic()
    try:
        image = await fetch.fetch_bytes(url, limits.network, limits.max_bytes, ACCEPT)
    except Unavailable as e:
        raise InvalidRequest(e.message, param="image_url") from e
    finally:
        metrics.IMAGE_FETCH_SECONDS.observe(time.monotonic() - began_at)
    kind = images.look("image_url", image, limits)
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _put(part: dict[str, Any], url: str) -> None:
    if isinstance(part["image_url"], dict):
        part["image_url"]["url"] = url
    else:
        part["image_url"] = url
