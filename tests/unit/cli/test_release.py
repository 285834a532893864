"""What `inferctl registry sign` writes into a folder, and what it refuses to sign."""

from __future__ import annotations

import json

import pytest

from inferflux.cli import release
from inferflux.cli.pull.receipt import Receipt
from inferflux.cli.release import Wish
from inferflux.engine import reference
from inferflux.engine.reference import NumericsReference
from inferflux.errors import ConfigError, ModelRefused
from inferflux.models import manifest, signing
from inferflux.models.anchors import Anchors
from inferflux.models.folder import ModelFolder
from inferflux.models.manifest import Manifest
from inferflux.models.rules import Rules
from inferflux.models.verification import measure, verify
from tests.support.models import CONFIG, make_folder, make_keys


@pytest.fixture
def wish(tmp_path):
    make_keys(tmp_path)
    folder = make_folder(tmp_path / "m")
    return Wish(folder=folder, key=tmp_path / "private" / "release.key", name="m", numerics=False)


def read(folder):
    return Manifest.parse((folder / manifest.NAME).read_bytes())


def statements(folder):
    return [json.loads(line) for line in (folder / manifest.PROVENANCE).read_text().splitlines()]


def test_a_release_says_what_the_model_is(wish, tmp_path):
    """From its folder; and it verifies."""
    release.sign(wish)
    made = read(wish.folder)

    assert (made.name, made.version, made.max_context) == ("m", 1, 512)
    assert (made.architectures, made.tokenizer) == (("LlamaForCausalLM",), ("tokenizer.json",))
    assert "chat" in made.capabilities
    assert made.chat_template == made.files["chat_template.jinja"].sha256
    with ModelFolder.open(wish.folder) as folder:
        assert verify(folder, Anchors.load(tmp_path / "keys"), Rules()).manifest == made


def test_without_a_template_there_is_no_chat(wish):
    """Unless somebody says so."""
    (wish.folder / "chat_template.jinja").unlink()
    release.sign(wish)

    assert "chat" not in (made := read(wish.folder)).capabilities
    assert "completion" in made.capabilities
    (wish.folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    release.sign(wish)
    assert "chat" in read(wish.folder).capabilities


def test_each_release_has_the_next_version(wish):
    """And leaves nothing of the last one behind."""
    release.sign(wish)
    (wish.folder / "generation_config.json").write_text("{}")
    release.sign(wish)

    assert read(wish.folder).version == 2
    assert "generation_config.json" in read(wish.folder).files


def test_provenance_says_where_it_comes_from(wish, tmp_path):
    """What `inferctl pull` remembers, and evaluation results, each as a statement about the files."""
    (tmp_path / "results.json").write_text('{"result": "PASSED", "configuration": [], "mmlu": 0.3}')
    Receipt("m", "pkg:pypi/x@1", {}, {"x.whl": "ab" * 32}, licence="MIT").save(tmp_path)
    release.sign(Wish(folder=wish.folder, key=wish.key, name="m", numerics=False, evaluation=tmp_path / "results.json"))
    origin, results = statements(wish.folder)
    (dependency,) = origin["predicate"]["buildDefinition"]["resolvedDependencies"]

    assert dependency == {"uri": "pkg:pypi/x@1", "digest": {"sha256": "ab" * 32}}
    assert results["predicate"]["mmlu"] == 0.3
    assert [s["_type"] for s in (origin, results)] == ["https://in-toto.io/Statement/v1"] * 2
    assert {s["name"] for s in origin["subject"]} == {
        *("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors")
    }
    assert read(wish.folder).licence == "MIT"


def test_a_reference_of_these_weights_is_kept(wish):
    """It is not computed again, and it is signed."""
    with ModelFolder.open(wish.folder) as folder:
        digests = {name: file.sha256 for name, file in measure(folder, folder.names).items()}
    digest = manifest.weights_digest(digests)
    words = NumericsReference(digest, (1, 2), (2, 3), (-0.1, -0.2), (-0.1,), (3, 4))
    reference.save(words, wish.folder / manifest.REFERENCE)
    release.sign(Wish(folder=wish.folder, key=wish.key, name="m"))

    assert read(wish.folder).numerics == manifest.REFERENCE
    assert manifest.REFERENCE in read(wish.folder).files


def test_code_is_not_signed(wish):
    """Nor is anything with a key that is none."""
    (wish.folder / "config.json").write_text(json.dumps(CONFIG | {"auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(ModelRefused, match="auto_map"):
        release.sign(wish)

    make_folder(wish.folder)
    signing.make_root(wish.key.parent, "other")
    with pytest.raises(ConfigError, match="cannot sign"):
        release.sign(Wish(folder=wish.folder, key=wish.folder / "config.json", name="m", numerics=False))
