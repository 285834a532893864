"""The two engines that the engine contract is tested on, started once for all its tests."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest

from inferflux.cli import models
from inferflux.engine.options import MIB, EngineOptions
from inferflux.paths import models_dir
from inferflux.types import Role
from tests.support.engine_calls import Engines, settle
from tests.support.engine_host import hosted


@pytest.fixture(
    scope="session", params=["sim", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.timeout(600)])]
)
def engines(request: pytest.FixtureRequest) -> Iterator[Engines]:
    options = EngineOptions("m", Role.PREFILL, kv_cache_bytes=96 * MIB, max_model_len=1024, max_num_seqs=8)
    if request.param == "vllm":
        options = replace(options, **real_model(), dtype="float32")
    with hosted(request.param, options, replace(options, role=Role.DECODE)) as (prefill, decode):
        yield Engines(request.param, "m", prefill, decode)


def real_model() -> dict[str, Any]:
    """The model of real engines: a given folder, or the default one, built when it is missing."""
    name = os.environ.get("INFERFLUX_TEST_MODEL_DIR", models.DEFAULT)
    model = models.prepare(name, models_dir(os.environ), lambda *_: None, available_bytes=1 << 34)
    return {"model_dir": model.folder, "model_digest": model.weights_digest, "numerics_reference": model.reference}


@pytest.fixture
async def nothing_is_left(engines: Engines) -> AsyncIterator[None]:
    """After every test nothing runs, and all blocks and slots are free again."""
    yield

    for engine in (engines.prefill, engines.decode):
        await settle(engine)
    assert await engines.prefill.num_free_slots() == await engines.prefill.num_slots()
