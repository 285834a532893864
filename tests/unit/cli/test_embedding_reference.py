"""How an embedding model's folder says that its tokens become one vector; what is not understood is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inferflux.cli.jobs.embedding_reference import pooled, pooling
from inferflux.engine.reference import EmbeddingReference, load, load_embedding, save
from inferflux.errors import ConfigError

PREFIX = "sentence_transformers.models."


def make(folder: Path, how: dict[str, bool], *kinds: str) -> Path:
    modules = [{"type": PREFIX + kind, "path": f"{i}_{kind}" if i else ""} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(how))
    return folder


class States(list[float]):
    """As much of a tensor as is asked for."""

    def mean(self, _: int) -> float:
        return sum(self) / len(self)


@pytest.mark.parametrize(("mode", "expected"), [("mean_tokens", 2.0), ("cls_token", 1.0), ("lasttoken", 4.0)])
def test_known_ways_of_pooling(tmp_path: Path, mode: str, expected: float) -> None:
    folder = make(tmp_path, {f"pooling_mode_{mode}": True}, "Transformer", "Pooling", "Normalize")

    assert pooled(States([1.0, 1.0, 4.0]), folder) == expected


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    """A guess gives vectors that look fine and compare badly."""
    folder = make(tmp_path, {"pooling_mode_weightedmean_tokens": True}, "Transformer", "Pooling", "Dense")
    with pytest.raises(ValueError, match="Dense"):
        pooling(folder)
    (folder / "modules.json").write_text(json.dumps([{"type": f"{PREFIX}Pooling", "path": "1_Pooling"}]))
    with pytest.raises(ValueError, match="weightedmean"):
        pooled(States([1.0]), folder)


def test_a_reference_of_the_other_kind_is_none(tmp_path: Path) -> None:
    """A model's vector proves nothing of its tokens."""
    path, reference = tmp_path / "reference.json", EmbeddingReference("d", (1, 2), (0.5, -0.5), "by hand")
    save(reference, path)

    assert load_embedding(path) == reference
    with pytest.raises(ConfigError):
        load(path)
    with pytest.raises(ConfigError, match="no prompt tokens or no embedding"):
        EmbeddingReference("d", (), (0.5,))
