"""Adapters of a worker, on the simulated engine: versions come and go with the requests that use them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from inferflux.config import load
from inferflux.engine import create
from inferflux.errors import Conflict, ModelRefused, Unavailable
from inferflux.models import signing
from inferflux.types import RequestContext, Role
from inferflux.worker.adapters import Adapters, salted
from inferflux.worker.model import LoadableModel
from inferflux.worker.settings import WorkerSettings

CONTEXT = RequestContext("r", cache_salt="5a17", adapter="sql")


def folder(home: Path, name: str, weights: bytes = b"w") -> Path:
    (made := home / name).mkdir(exist_ok=True)
    (made / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (made / "adapter_model.safetensors").write_bytes(weights)
    return made


def adapters(home: Path, signature: str = "off", limit: int = 1) -> Adapters:
    environ = {
        "MODEL": "m",
        "ENGINE": "sim",
        "HOME": str(home),
        "MAX_ADAPTERS": str(limit),
        "MODEL_SIGNATURE": signature,
    }
    environ["INSTANCE_ID"] = "decode-0"
    settings = load(WorkerSettings, {f"INFERFLUX_{name}": value for name, value in environ.items()})
    engine = create("sim", settings.engine_options(Role.DECODE, LoadableModel()), None, None)
    return Adapters(engine, settings, Role.DECODE)


async def until_one_version(held: Adapters) -> None:
    async with asyncio.timeout(5):
        while held._dropping:
            await asyncio.gather(*held._dropping)
    assert len(held._versions) == 1


async def test_a_request_keeps_its_version_and_the_next_gets_the_new_one(tmp_path: Path) -> None:
    """Also when the first one comes back meanwhile; what nobody uses is gone, files included."""
    held, source = adapters(tmp_path), folder(tmp_path, "sql", b"1")
    first = await held.load("sql", source, 1)

    with held.using(CONTEXT) as old:
        second = await held.load("sql", folder(tmp_path, "sql", b"2"), 2)
        with held.using(CONTEXT) as new:
            assert (old.adapter_digest, new.adapter_digest) == (first, second)
        assert len({old.cache_salt, new.cache_salt, CONTEXT.cache_salt}) == 3
        assert await held.load("sql", folder(tmp_path, "sql", b"1"), 3) == first
    await until_one_version(held)

    assert [(h.name, h.revision, h.digest) for h in held.held] == [("sql", 3, first)]
    assert len(list(held._directory.iterdir())) == 1
    await held.unload("sql")
    assert (held.held, held._versions) == ([], [])
    with pytest.raises(Unavailable, match="is not on this worker"), held.using(CONTEXT):
        pass
    held.close()
    assert not held._directory.exists()


async def test_who_names_no_adapter_is_left_alone_and_room_is_limited(tmp_path: Path) -> None:
    """The salt of an adapter is nobody else's."""
    held, plain = adapters(tmp_path), replace(CONTEXT, adapter="")
    await held.load("sql", folder(tmp_path, "sql"), 1)

    with held.using(plain) as same:
        assert same is plain
    with pytest.raises(Conflict, match="INFERFLUX_MAX_ADAPTERS is 1"):
        await held.load("other", folder(tmp_path, "other"), 1)
    assert salted("a", "00" * 32) != salted("b", "00" * 32) != salted("b", "01" * 32)
    held.close()


async def test_files_must_be_an_adapters_and_signed_where_that_is_required(tmp_path: Path) -> None:
    """What was refused changes nothing."""
    held, source = adapters(tmp_path, "require"), folder(tmp_path, "sql")
    (tmp_path / "model-keys").mkdir()
    private = tmp_path / "private"
    private.mkdir()
    signing.make_key(private, "release")
    with pytest.raises(ModelRefused, match="missing, the model is not signed"):
        await held.load("sql", source, 1)
    (private / "release.pub").rename(tmp_path / "model-keys" / "release.pub")
    signing.sign(source, private / "release.key")
    digest = await held.load("sql", source, 1)

    (source / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelRefused, match=r"adapter_model.safetensors: not the file that was signed"):
        await held.load("sql", source, 2)
    (source / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelRefused, match=r"adapter_model.safetensors: missing"):
        await held.load("sql", source, 3)
    assert [(h.revision, h.digest) for h in held.held] == [(1, digest)]
    held.close()
