from __future__ import annotations

from pathlib import Path

import pytest

from inferflux.types import Role
from services.registry.planner import book
from services.registry.planner.book import PoolBook
from services.registry.planner.spec import PoolSpec
from services.registry.planner.specs import Specs

PREFILL, DECODE = (PoolSpec(model="m", role=role) for role in (Role.PREFILL, Role.DECODE))


class Store:
    """What operators put."""

    def __init__(self, *specs: PoolSpec) -> None:
        self.book = PoolBook(7, {spec.name: spec for spec in specs})

    async def read(self) -> PoolBook:
        return self.book


def write(file: Path, text: str | None) -> None:
    """Replace the file; None: remove it."""
    if text is None:
        file.unlink()
    else:
        file.write_text(text)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "pools.json"
    file.write_text(book.encode([PREFILL, DECODE]))
    return file


async def test_what_was_put_wins_over_the_file(file: Path) -> None:
    put = PoolSpec(model="m", role=Role.DECODE, max_replicas=3)

    known = await Specs(Store(put), file).read()

    assert known.revision == 7
    assert known.pools == {PREFILL.name: PREFILL, put.name: put}


async def test_a_changed_file_is_in_force_at_the_next_look(file: Path) -> None:
    """One that cannot be read, or is gone for a moment, leaves the last in force."""
    specs = Specs(Store(), file)
    assert set((await specs.read()).pools) == {PREFILL.name, DECODE.name}

    write(file, book.encode([DECODE]))
    assert set((await specs.read()).pools) == {DECODE.name}
    write(file, '[{"model": 1}]')
    assert set((await specs.read()).pools) == {DECODE.name}
    write(file, None)
    assert set((await specs.read()).pools) == {DECODE.name}


async def test_there_need_be_no_file() -> None:
    assert (await Specs(Store(), None).read()).pools == {}
