"""What a signature promises, attacked from every side; the package that signs is the oracle."""

from __future__ import annotations

import base64
import json
import os
import shutil

import pytest
from model_signing import hashing, verifying

from inferflux.errors import ModelRefused
from inferflux.models import bundle, manifest, signing
from inferflux.models.anchors import Anchors
from inferflux.models.bundle import Bundle
from inferflux.models.folder import ModelFolder
from inferflux.models.rules import Rules
from inferflux.models.verification import verify
from tests.support.models import CONFIG, make_folder, make_keys, sign


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A signed model and its keys; tests work on copies."""
    root = tmp_path_factory.mktemp("models")
    make_keys(root)
    sign(make_folder(root / "m"), root / "private" / "release.key", version=3)
    return root


@pytest.fixture
def place(original, tmp_path):
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    return tmp_path


def check(place, rules=Rules()):  # noqa: B008 - frozen
    with ModelFolder.open(place / "m") as folder:
        return verify(folder, Anchors.load(place / "keys"), rules)


def refused(place, match, rules=Rules()):  # noqa: B008 - frozen
    with pytest.raises(ModelRefused, match=match):
        check(place, rules)


def rewrite(place, edit):
    """Change a signature's document."""
    path = place / "m" / bundle.NAME
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def test_a_signed_model_verifies(place):
    """Its manifest, its digests and its key are known then."""
    verified = check(place)

    assert (verified.manifest.name, verified.version) == ("m", 3)
    assert verified.weights_digest == verified.manifest.weights_digest
    assert verified.key_ids == tuple(Anchors.load(place / "keys").keys)


def test_the_package_agrees(place):
    """What we accept is a bundle as others read it."""
    config = verifying.Config().use_elliptic_key_verifier(public_key=place / "keys" / "release.pub")
    own = hashing.Config().set_ignored_paths(paths=[place / "m" / bundle.NAME], ignore_git_paths=False)

    config.set_hashing_config(own).verify(place / "m", place / "m" / bundle.NAME)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", manifest.NAME])
def test_a_flipped_byte_is_found_in_any_file(name, place):
    """The file is named."""
    path = place / "m" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    refused(place, rf"^{name}: not (the file that was signed|JSON)")


def test_an_added_file_is_refused(place):
    """Wherever it is, hidden or not."""
    for name in ("extra.safetensors", ".hidden", ".git", "deep/er/file.json"):
        path = place / "m" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        refused(place, f"{name}: not among the signed files")
        path.unlink()


def test_a_missing_or_renamed_file_is_refused(place):
    """Named as it was signed."""
    (place / "m" / "tokenizer.json").unlink()
    refused(place, "tokenizer.json: signed, but missing")

    make_folder(place / "m")
    (place / "m" / "tokenizer.json").rename(place / "m" / "vocab.json")
    refused(place, "vocab.json: not among the signed files")


def test_a_file_becomes_no_link(place):
    """Not even one to the same content."""
    target = place / "m" / "tokenizer.json"
    target.rename(place / "tokenizer.json")
    target.symlink_to(place / "tokenizer.json")

    refused(place, "tokenizer.json: a link")


def test_no_signature_is_no_signature(place):
    """An unsigned model is one of the complaints."""
    (place / "m" / bundle.NAME).unlink()
    refused(place, "model.sig: missing")


def test_another_key_does_not_count(place):
    """Signed properly, by somebody else; also when he claims to be the trusted key."""
    trusted_id = next(iter(Anchors.load(place / "keys").keys))
    signing.make_key(place / "private", "mallory")
    sign(place / "m", place / "private" / "mallory.key", version=3)
    refused(place, "not trusted here")

    rewrite(place, lambda d: d["verificationMaterial"]["publicKey"].update(hint=trusted_id))
    refused(place, "the signature is not that of key")


def test_a_revoked_key_does_not_count_any_more(place):
    """Whatever it signed."""
    (key,) = Anchors.load(place / "keys").keys

    refused(place, "was revoked", Rules(revoked=frozenset({key})))


def test_a_version_below_the_floor_is_refused(place):
    """Validly signed, and replaced since."""
    assert check(place, Rules(floor=3)).version == 3
    refused(place, "version 3, at least 4", Rules(floor=4))


def test_a_model_signed_by_other_tools_has_no_version(place):
    """It verifies; as soon as there is a floor it is below it."""
    (place / "m" / manifest.NAME).unlink()
    signing.sign(place / "m", place / "private" / "release.key")

    assert check(place).manifest is None
    refused(place, "version 0", Rules(floor=1))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {**CONFIG, "auto_map": {"AutoModel": "evil.Model"}}),
        ("config.json", {**CONFIG, "trust_remote_code": True}),
        ("tokenizer_config.json", {"auto_map": {}}),
        ("processor_config.json", {"auto_map": {"AutoProcessor": "evil.P"}}),
    ],
)
def test_code_is_refused_even_when_it_is_signed(name, content, place):
    """A signature says who, not that it is safe."""
    (place / "m" / name).write_text(json.dumps(content))
    sign(place / "m", place / "private" / "release.key", version=3)

    refused(place, f"{name}: has ")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda d: d.update(mediaType="application/vnd.dev.sigstore.bundle.v0.1+json"), "not read here"),
        (lambda d: d["dsseEnvelope"].update(payloadType="text/plain"), "not read here"),
        (lambda d: d["dsseEnvelope"].update(signatures=[]), "not a model signature"),
        (lambda d: d["dsseEnvelope"]["signatures"].append(d["dsseEnvelope"]["signatures"][0]), "not a model signature"),
        (lambda d: d["dsseEnvelope"].update(payload="!!"), "not a model signature"),
        (lambda d: d.pop("verificationMaterial"), "not a model signature"),
        (lambda d: d["verificationMaterial"]["publicKey"].update(hint=""), "not trusted"),
        (lambda d: d["dsseEnvelope"]["signatures"][0].update(sig=base64.b64encode(b"x").decode()), "not that of key"),
    ],
)
def test_a_bundle_that_is_none_is_refused(edit, match, place):
    """Each in its own words."""
    rewrite(place, edit)
    refused(place, match)


def test_a_statement_about_other_files_is_refused(place):
    """The payload can't be changed without the key."""

    def drop_a_file(document):
        payload = json.loads(base64.b64decode(document["dsseEnvelope"]["payload"]))
        payload["predicate"]["resources"].pop()
        document["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()

    rewrite(place, drop_a_file)
    refused(place, "the signature is not that of key")


def test_a_manifest_must_say_what_the_signature_says(place):
    """A signed manifest of another model in a signed folder is a mistake, or a trick."""
    text = (place / "m" / manifest.NAME).read_bytes()
    (place / "m" / "tokenizer.json").write_text('{"other": 1}')
    (place / "m" / manifest.NAME).write_bytes(text)
    signing.sign(place / "m", place / "private" / "release.key")

    refused(place, "lists other files")


def test_a_chain_leads_to_a_trusted_root(place):
    """Both keys vouch for it, and either can be revoked."""
    root = signing.make_root(place / "private", "root")
    leaf = signing.issue(place / "private", "leaf", root)
    sign(place / "m", leaf.with_suffix(".key"), chain=(leaf,))
    refused(place, "no root certificate is trusted")

    shutil.copy(root, place / "keys")
    verified = check(place)
    assert len(verified.key_ids) == 2
    for key in verified.key_ids:
        refused(place, "was revoked", Rules(revoked=frozenset({key})))


def test_a_chain_of_strangers_is_refused(place):
    """A root of the same name, or a leaf that signs as a root."""
    for folder in ("private", "keys"):
        signing.make_root(place / folder, "root")
    leaf = signing.issue(place / "private", "leaf", place / "private" / "root.crt")
    sign(place / "m", leaf.with_suffix(".key"), chain=(leaf, place / "private" / "root.crt"))
    refused(place, "does not lead to a trusted root")

    (place / "keys" / "root.key").unlink()
    shutil.copy(place / "private" / "root.crt", place / "keys" / "root.crt")
    leaf.rename(place / "private" / "leaf.crt")
    below = signing.issue(place / "private", "below", place / "private" / "leaf.crt")
    sign(place / "m", below.with_suffix(".key"), chain=(below, place / "private" / "leaf.crt"))
    refused(place, "does not lead to a trusted root")


def test_what_was_verified_is_what_is_read(place):
    """A file renamed over a verified one is not seen; a write into one is noticed; a touch is not a change."""
    weights = place / "m" / "model.safetensors"
    with ModelFolder.open(place / "m") as folder:
        verify(folder, Anchors.load(place / "keys"), Rules())
        folder.link(place / "view")
        before = weights.read_bytes()
        (place / "evil").write_bytes(b"evil")
        (place / "evil").rename(weights)
        (place / "m" / "late.json").write_text("{}")

        assert (place / "view" / "model.safetensors").read_bytes() == before
        assert not (place / "view" / "late.json").exists()
        assert folder.changed() == []

        os.utime(place / "view" / "tokenizer.json")
        assert folder.changed() == []
        with (place / "m" / "tokenizer.json").open("r+b") as file:
            file.write(b"[]")
        assert folder.changed() == ["tokenizer.json"]


def test_a_manifest_reads_back(place):
    """And nothing else is one."""
    text = (place / "m" / manifest.NAME).read_bytes()
    assert manifest.Manifest.parse(text).dump() == text

    document = json.loads(text)
    for edit in (
        {"schema": 2},
        {"version": 0},
        {"name": "a b"},
        {"unknown": 1},
        {"weights_digest": "00"},
        {"files": [1]},
    ):
        with pytest.raises(ModelRefused, match=manifest.NAME):
            manifest.Manifest.parse(json.dumps(document | edit).encode())
    with pytest.raises(ModelRefused):
        Bundle.parse(b"[]")
