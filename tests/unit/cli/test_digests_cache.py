from __future__ import annotations

import hashlib
import os

from inferflux.cli import digests as cache
from inferflux.cli.digests import Digests

NAMES = ["config.json", "model.safetensors", "tokenizer.json"]


def make_folder(folder):
    folder.mkdir(exist_ok=True)
    for name in NAMES:
        (folder / name).write_bytes(name.encode() * 1000)
    return folder


def compute(folder):
    return Digests.compute(folder, NAMES, lambda _: None)


def test_digests_are_sha256(tmp_path):
    """Each file has its SHA-256; progress ends at one."""
    seen = []
    digests = Digests.compute(make_folder(tmp_path), NAMES, seen.append)

    assert digests.files["config.json"].sha256 == hashlib.sha256(b"config.json" * 1000).hexdigest()
    assert seen[-1] == 1.0


def test_the_weights_digest_is_about_what_decides_kv(tmp_path):
    """Another tokenizer leaves the digest alone, other weights or another config change it."""
    folder = make_folder(tmp_path)
    before = compute(folder).weights_digest
    (folder / "tokenizer.json").write_text("other")
    assert compute(folder).weights_digest == before

    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("other")
        assert compute(folder).weights_digest != before
        make_folder(tmp_path)


def test_it_survives_its_file(tmp_path):
    """What is saved is loaded, and nonsense is nothing."""
    digests = compute(make_folder(tmp_path / "m"))
    path = tmp_path / cache.NAME
    digests.save(path)
    assert Digests.load(path) == digests

    for text in ("", "[]", '{"format": 2, "files": {}}', '{"format": 1, "files": {"a": 3}}'):
        path.write_text(text)
        assert Digests.load(path) is None


def test_it_notices_changes(tmp_path):
    """A touched, changed, missing or additional file makes a manifest stale."""
    folder = make_folder(tmp_path)
    digests = compute(folder)
    assert digests.is_fresh(folder, NAMES)
    assert not digests.is_fresh(folder, [*NAMES, "chat_template.jinja"])

    os.utime(folder / "config.json", (1, 1))
    assert not digests.is_fresh(folder, NAMES)
    (folder / "config.json").unlink()
    assert not digests.is_fresh(folder, NAMES)
