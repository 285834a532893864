from __future__ import annotations

import json
import multiprocessing

import pytest

from inferflux.cli.digests import Digests
from inferflux.cli.models import (
    DEFAULT,
    ModelError,
    cache_dir,
    check_folder,
    check_modules,
    ensure_digests,
    known,
    locate,
    locked,
    prepare,
)
from inferflux.engine import reference
from inferflux.engine.reference import NumericsReference
from inferflux.models.manifest import NAME, REFERENCE

CONFIG = {"architectures": ["LlamaForCausalLM"]}
WORDS = NumericsReference("", (1, 2), (2, 3), (-0.1, -0.2), (-0.1,), (3, 4))


def make_model(folder, config=CONFIG, files=("tokenizer.json", "model.safetensors")):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in files:
        (folder / name).write_text("{}")
    return folder


def silent(_step, _fraction):
    pass


def test_a_name_is_looked_up_in_the_models_directory(tmp_path):
    """A bare name means the models directory; anything with a slash means itself."""
    folder = make_model(tmp_path / "models" / "tiny")

    assert locate("tiny", tmp_path / "models") == ("tiny", folder)
    assert locate(str(folder), tmp_path / "other") == ("tiny", folder)
    assert locate(DEFAULT, tmp_path / "models") == (DEFAULT, tmp_path / "models" / DEFAULT)


def test_a_hugging_face_cache_has_names_further_up(tmp_path):
    """A snapshot's folder is a hash; its model's name is two levels up."""
    folder = make_model(tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "c1899de2")

    assert locate(str(folder), tmp_path)[0] == "Qwen3-0.6B"


def test_an_unknown_model_names_those_there_are(tmp_path):
    """One line says what was looked for, where, and what there is."""
    make_model(tmp_path / "tiny")

    with pytest.raises(ModelError, match=f"no model 'huge'.*{DEFAULT}, tiny"):
        locate("huge", tmp_path)
    assert known(tmp_path) == f"{DEFAULT}, tiny"


def test_a_complete_folder_is_accepted(tmp_path):
    """The files that make the model are listed, ours are not among them."""
    folder = make_model(tmp_path / "m", files=("tokenizer.json", "model.safetensors", "chat_template.jinja", NAME))

    assert check_folder(folder) == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize(
    ("config", "files", "complaint"),
    [
        (CONFIG, ("tokenizer.json",), "no \\*.safetensors"),
        (CONFIG, ("tokenizer.json", "pytorch_model.bin"), "no \\*.safetensors"),
        (CONFIG, ("model.safetensors",), "no tokenizer"),
        ({}, ("tokenizer.json", "model.safetensors"), "architectures"),
        ({**CONFIG, "auto_map": {"AutoModel": "evil.Model"}}, ("tokenizer.json", "model.safetensors"), "auto_map"),
        ([], ("tokenizer.json", "model.safetensors"), "not a JSON object"),
    ],
)
def test_incomplete_or_unsafe_folders_are_refused(tmp_path, config, files, complaint):
    """What is missing or not run is said in one line."""
    with pytest.raises(ModelError, match=complaint):
        check_folder(make_model(tmp_path / "m", config, files))


def test_modules_of_an_embedding_model_are_its_own_folders(tmp_path):
    """How its tokens are pooled is one of its files; a path that leads elsewhere is none."""
    folder = make_model(tmp_path / "m", files=("tokenizer.json", "model.safetensors", "modules.json"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))

    assert "1_Pooling/config.json" in check_folder(folder)
    check_modules(folder)
    for strange in ([{"path": "../other"}], [{"path": "/etc"}], [{}], 3, [3]):
        (folder / "modules.json").write_text(json.dumps(strange))
        with pytest.raises(ModelError, match=r"modules\.json"):
            check_modules(folder)


def test_no_code_from_the_tokenizer_either(tmp_path):
    """auto_map in the tokenizer's config is refused too."""
    folder = make_model(tmp_path / "m")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {}}')

    with pytest.raises(ModelError, match=r"tokenizer_config\.json has auto_map"):
        check_folder(folder)


@pytest.mark.parametrize("shard", ["model-2.safetensors", "../model.safetensors"])
def test_all_shards_must_be_there(tmp_path, shard):
    """An index that names a missing shard, or one outside the folder, is refused."""
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))

    with pytest.raises(ModelError, match="misses weights"):
        check_folder(folder)


def test_digests_are_computed_once(tmp_path):
    """The second time nothing is read; a changed file is noticed."""
    folder, cache = make_model(tmp_path / "m"), tmp_path / "cache"
    files, steps = check_folder(folder), []

    def record(step, _fraction):
        steps.append(step)

    first = ensure_digests(folder, files, cache, record)
    num_steps = len(steps)
    assert ensure_digests(folder, files, cache, record) == first
    assert len(steps) == num_steps > 0
    (folder / "model.safetensors").write_text("other")
    assert ensure_digests(folder, files, cache, record).weights_digest != first.weights_digest


def test_nothing_is_written_into_the_users_folder(tmp_path):
    """What we learn about a folder lies under the models directory, beside no other folder's."""
    models = tmp_path / "models"

    assert cache_dir(tmp_path / "a", models).parent == models / ".cache"
    assert cache_dir(tmp_path / "a", models) != cache_dir(tmp_path / "b", models)


def test_a_known_model_is_ready_at_once(tmp_path):
    """With digests and a reference of the same weights in place, no job is run."""
    models = tmp_path / "models"
    folder = make_model(models / "tiny")
    digest = Digests.compute(folder, check_folder(folder), lambda _: None).weights_digest
    own = NumericsReference(digest, *(getattr(WORDS, n) for n in WORDS.__slots__[1:]))
    cache = cache_dir(folder, models)
    for place in (folder, cache):
        place.mkdir(parents=True, exist_ok=True)
        reference.save(own, place / REFERENCE)
        model = prepare("tiny", models, silent, available_bytes=1 << 40)

        assert (model.weights_digest, model.reference) == (digest, place / REFERENCE)
        (place / REFERENCE).unlink()


def test_a_model_too_big_to_check_is_refused(tmp_path):
    """A reference that does not fit into memory is not begun: one line says how much is missing."""
    make_model(tmp_path / "tiny")

    with pytest.raises(ModelError, match="not enough memory for the numerics reference of tiny"):
        prepare("tiny", tmp_path, silent, available_bytes=0)


def hold(path, held, release):
    with locked(path, lambda: None):
        held.set()
        release.wait(30)


def test_two_processes_never_prepare_the_same_model(tmp_path):
    """Whoever comes second is told to wait, and waits."""
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "lock", held, release))
    other.start()
    try:
        assert held.wait(30)
        with locked(tmp_path / "lock", release.set):
            assert release.is_set()
    finally:
        other.join()
        other.close()
