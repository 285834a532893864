from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from inferflux.engine.options import auto_dtype
from inferflux.engine.reference import NumericsReference, load, save
from inferflux.errors import ConfigError

REFERENCE = NumericsReference("d", (1, 2, 3), (2, 3, 4), (-0.1, -0.2, -0.3), (-0.1, -0.2), (4, 5), "test")


def test_a_reference_survives_its_file(tmp_path):
    """What is saved is loaded, bit for bit."""
    save(REFERENCE, tmp_path / "r.json")

    assert load(tmp_path / "r.json") == REFERENCE


@pytest.mark.parametrize("field", ["top1_ids", "top1_logprobs", "next_logprobs", "greedy_ids"])
def test_lists_must_fit_together(field):
    """A reference with missing values can't be made."""
    with pytest.raises(ConfigError):
        replace(REFERENCE, **{field: ()})


@pytest.mark.parametrize("change", [{"format": 2}, {"extra": 1}, {"top1_ids": None}, {"next_logprobs": []}])
def test_foreign_files_are_refused(tmp_path, change):
    """Another format, unknown or missing fields are a ConfigError that names the file."""
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"format": 1, **asdict(REFERENCE), **change}))

    with pytest.raises(ConfigError):
        load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_torn_files_are_refused(tmp_path, text):
    """A file that is no reference is a ConfigError, as is no file."""
    path = tmp_path / "r.json"
    with pytest.raises(ConfigError):
        load(path)
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"r\.json"):
        load(path)


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("sse avx2", "float32"), ("avx2 avx512_bf16", "bfloat16"), ("amx_bf16 avx2", "bfloat16"), ("avx512f", "float32")],
)
def test_auto_is_what_the_cpu_computes_in(tmp_path, flags, dtype):
    """Bfloat16 needs an instruction set that has it."""
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\n")

    assert auto_dtype(tmp_path / "cpuinfo") == dtype
    assert auto_dtype(tmp_path / "none") == "float32"
