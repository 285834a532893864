"""`inferctl pull` as people call it, against a real S3 server and with the real pip."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from inferflux.cli.failure import Exit
from tests.support import s3_server
from tests.support.cluster import inferctl, new_home
from tests.support.models import make_folder, make_keys, sign


@pytest.fixture
def home() -> Iterator[Path]:
    home = new_home()
    yield home
    shutil.rmtree(home)


def pull(home: Path, *words: str, **environ: str):
    return inferctl(home, "pull", *words, "-o", "json", INFERFLUX_MODELS=str(home / "models"), **environ)


def make_wheel(directory: Path, folder: Path) -> None:
    """A package of one model, as pip takes it."""
    directory.mkdir()
    info = "tiny_model-1.2.dist-info"
    with zipfile.ZipFile(directory / "tiny_model-1.2-py3-none-any.whl", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, f"tiny_model/data/{path.name}")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_a_wheel(home, tmp_path):
    """With pip, so that its indexes and mirrors count; what is not there is pip's complaint, in one line."""
    make_wheel(tmp_path / "index", make_folder(tmp_path / "m"))
    environ = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "index")}
    document = json.loads(pull(home, "pypi:tiny-model", "--name", "tiny", **environ).stdout)
    missing = pull(home, "pypi:no-such-model", **environ)

    assert document["source"] == "pkg:pypi/tiny-model@1.2"
    assert sorted(document["files"]) == sorted(path.name for path in (home / "models" / "tiny").iterdir())
    assert missing.returncode == Exit.FAILED
    assert "No matching distribution found for no-such-model" in missing.stderr


def test_a_signed_model_from_a_bucket(home, tmp_path):
    """All of it, so that it verifies here; then room is made again."""
    keys = make_keys(tmp_path)
    folder = make_folder(tmp_path / "m", weights=bytes(2_000_000))
    sign(folder, tmp_path / "private" / "release.key")
    with s3_server.running() as server:
        server.put("models", {f"team/m/{path.name}": path for path in folder.iterdir()})
        result = pull(home, "s3://models/team/m", **server.environ)
        nothing = pull(home, "s3://no-such-bucket/m", **server.environ)
        stranger = pull(home, "s3://models/team/other", **server.environ)
    document = json.loads(result.stdout)
    models = {"INFERFLUX_MODELS": str(home / "models")}

    assert document["source"] == "s3://models/team/m"
    assert inferctl(home, "registry", "verify", document["folder"], "--keys", str(keys)).returncode == 0
    assert nothing.returncode == stranger.returncode == Exit.FAILED
    assert "NoSuchBucket" in nothing.stderr
    assert "neither safetensors" in stranger.stderr
    collected = json.loads(inferctl(home, "models", "gc", "--quota-gb", "0.001", "-o", "json", **models).stdout)
    assert (collected["models"], collected["kept_bytes"]) == (["m"], 0)
    assert not (home / "models" / "m").exists()
