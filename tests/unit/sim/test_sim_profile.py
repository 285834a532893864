from __future__ import annotations

import json
from pathlib import Path

import pytest

from inferflux.engine.sim import profile
from inferflux.errors import ConfigError


def write(path: Path, values: object) -> Path:
    path.write_text(json.dumps(values))
    return path


def test_the_shipped_profiles_load() -> None:
    assert profile.load(None).step_ms > 0
    assert profile.load(profile.INSTANT).step_s(64, 1000) == 0


def test_a_profile_says_only_what_differs(tmp_path: Path) -> None:
    path = write(tmp_path / "p.json", {"step_ms": 5, "step_ms_per_sequence": 1, "prefill_ms_per_token": 0.5})

    loaded = profile.load(path)

    assert loaded.block_size == profile.load(None).block_size
    assert loaded.step_s(num_sequences=3, num_prompt_tokens=4) == pytest.approx(0.010)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"step": 5}, "unknown keys step"),
        ({"step_ms": -1}, "0 or more"),
        ({"step_ms": "fast"}, "0 or more"),
        ({"slot_bytes": 1000}, "no multiple"),
        ([], "not an object"),
    ],
)
def test_a_bad_profile_is_refused_with_its_reason(tmp_path: Path, values: object, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        profile.load(write(tmp_path / "p.json", values))


def test_a_missing_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="FileNotFoundError"):
        profile.load(tmp_path / "none.json")
