"""Images through prefill and decode, on vLLM with a small random model that sees: exact, and never another's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence

import pytest

from inferflux.engine.base import Prefilled
from inferflux.engine.options import MIB, EngineOptions
from inferflux.types import HttpCall, Role
from tests.support.engine_calls import Engines, ask, chat, context, settle, streamed, ticketed
from tests.support.engine_host import hosted
from tests.support.pictures import data_url, picture
from tests.support.tiny_models import IDEFICS, tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
BEFORE, AFTER = "Look at this: ", " and say what you see, " + "word by word, " * 16


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    own = {**tiny_model(IDEFICS), "dtype": "float32", "block_size": 32, "max_model_len": 512}
    options = [
        EngineOptions("m", role, kv_cache_bytes=64 * MIB, max_num_seqs=8, **own) for role in (Role.PREFILL, Role.DECODE)
    ]
    with hosted("vllm", *options) as (prefill, decode):
        yield Engines("vllm", "m", prefill, decode)


@pytest.fixture(autouse=True)
async def nothing_is_left(engines: Engines) -> AsyncIterator[None]:
    """After every test nothing runs, and all blocks and slots are free again."""
    yield

    for engine in (engines.prefill, engines.decode):
        await settle(engine)
    assert await engines.prefill.num_free_slots() == await engines.prefill.num_slots()


def seen(*images: bytes) -> HttpCall:
    """A question about images, the same for all."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return chat([{"type": "text", "text": BEFORE}, *parts, {"type": "text", "text": AFTER}], max_tokens=8)  # type: ignore[arg-type]


async def prefilled(engines: Engines, call: HttpCall) -> Prefilled:
    """Compute a prompt whose blocks nobody reads."""
    result = await engines.prefill.prefill(context(), call)
    assert isinstance(result, Prefilled)
    await engines.prefill.free([slot for prompt in result.prompts if prompt.kv for slot in prompt.kv.slots])
    return result


async def test_it_says_that_it_sees(engines: Engines) -> None:
    assert "vision" in (await engines.prefill.info()).capabilities
    await engines.decode.check_numerics()


@pytest.mark.parametrize(
    "images",
    [[picture(1)], [picture(2, 200, 90)], [picture(3), picture(4, 64, 64)]],
    ids=["one", "resized", "two"],
)
async def test_a_response_from_a_ticket_equals_one_of_a_single_engine(
    engines: Engines, images: Sequence[bytes]
) -> None:
    """Decode reads the blocks, those of image tokens among them."""
    call = seen(*images)

    async with ticketed(engines, call) as sources:
        disaggregated = await ask(engines.decode, call, sources)
        alone = await ask(engines.prefill, call)
    async with ticketed(engines, call) as sources:
        stream = await ask(engines.decode, streamed(call), sources)

    assert disaggregated.report.result == stream.report.result == "committed"
    assert disaggregated.token_ids() == alone.token_ids() == stream.token_ids()
    assert len(alone.token_ids()) == 8


async def test_images_matter(engines: Engines) -> None:
    """The control: under one text, another image gives other tokens."""
    answers = [(await ask(engines.decode, seen(picture(number)))).token_ids() for number in range(10, 14)]

    assert len({tuple(answer) for answer in answers}) > 1


async def test_a_ticket_is_good_for_its_own_image_only(engines: Engines) -> None:
    """The ids are equal, the digests are not: the blocks of one are never read for the other."""
    one, other = seen(picture(20)), seen(picture(21))

    async with ticketed(engines, one) as (source,), ticketed(engines, other) as (theirs,):
        assert source.num_tokens == theirs.num_tokens
        assert source.prompt_digest != theirs.prompt_digest
        mixed = await ask(engines.decode, other, [source])
        right = await ask(engines.decode, other, [theirs])

    assert mixed.report.result == "unneeded"
    assert mixed.token_ids() == right.token_ids() == (await ask(engines.prefill, other)).token_ids()


async def test_prefixes_are_shared_by_equal_images_alone(engines: Engines) -> None:
    """From the arena, when the engine's own cache has lost them."""
    one, other = seen(picture(30)), seen(picture(31))
    expected = (await ask(engines.decode, one)).token_ids(), (await ask(engines.decode, other)).token_ids()
    await prefilled(engines, one)
    await engines.prefill.lose_cache()

    (of_other,) = (await prefilled(engines, other)).prompts
    assert of_other.num_read_tokens == of_other.num_cached_tokens == 0
    await engines.prefill.lose_cache()
    (again,) = (await prefilled(engines, one)).prompts
    assert again.num_read_tokens > 0
    assert (again.token_ids[0], of_other.token_ids[0]) == (expected[0][0], expected[1][0])
    for call, tokens in zip((one, other), expected, strict=True):
        async with ticketed(engines, call) as sources:
            assert (await ask(engines.decode, call, sources)).token_ids() == tokens


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "http://127.0.0.1:9/a.png"])
async def test_what_is_no_image_is_refused(engines: Engines, url: str) -> None:
    """Should it get past the gateway: nothing is fetched, and the next call is fine."""
    part = {"type": "image_url", "image_url": {"url": url}}
    response = await ask(engines.decode, chat([part]))  # type: ignore[arg-type]

    assert response.head is not None
    assert 400 <= response.head.status < 500
    assert len((await ask(engines.decode, seen(picture(40)))).token_ids()) == 8
