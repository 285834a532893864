"""What is stored can be read, changed or moved only by who has a key of the ring."""

from __future__ import annotations

import base64
import os

import pytest

from inferflux.errors import ConfigError
from services.policy.vault import Vault

OLD, NEW = b"o" * 32, b"n" * 32


def test_a_record_opens_under_its_name_only():
    """And every time it is sealed it looks different."""
    vault = Vault([OLD])
    record = vault.seal("keys:1", "text")

    assert vault.open("keys:1", record) == "text"
    assert "text" not in record
    assert vault.seal("keys:1", "text") != record
    for name, text in (("keys:2", record), ("", record)):
        with pytest.raises(ValueError, match="changed"):
            vault.open(name, text)


def test_every_changed_character_is_noticed():
    """Version, key id, nonce, text and tag."""
    vault = Vault([OLD])
    record = vault.seal("n", "text")
    for position in range(len(record)):
        other = "A" if record[position] != "A" else "B"
        with pytest.raises(ValueError, match=r"seal|changed"):
            vault.open("n", record[:position] + other + record[position + 1 :])


@pytest.mark.parametrize("record", ["", ".", "v1", "v1..", "v1.x.y", "é", "{}"])
def test_what_is_no_record_is_refused(record):
    """Without any other exception."""
    with pytest.raises(ValueError, match=r"seal|changed"):
        Vault([OLD]).open("n", record)


def test_the_first_key_seals_and_all_of_them_open():
    """That is how keys are changed."""
    record = Vault([OLD]).seal("n", "text")
    ring = Vault([NEW, OLD])

    assert ring.open("n", record) == "text"
    assert not ring.is_current(record)
    assert ring.is_current(ring.seal("n", "text"))
    with pytest.raises(ValueError, match="no key"):
        Vault([NEW]).open("n", record)


def test_keys_come_from_a_file_or_the_environment(tmp_path):
    """The environment first; what is none of 32 bytes is refused without being shown."""
    path = tmp_path / "store.key"
    path.write_bytes(NEW + OLD)
    record = Vault([OLD]).seal("n", "text")

    assert Vault.load(path).open("n", record) == "text"
    assert Vault.load(tmp_path / "nowhere", (base64.b64encode(OLD).decode(),)).open("n", record) == "text"
    with pytest.raises(ConfigError, match="INFERFLUX_STORE_KEYS: key 2") as caught:
        Vault.load(path, (base64.b64encode(OLD).decode(), "c2hvcnQ="))
    assert "c2hvcnQ" not in caught.value.message
    for content in (b"", os.urandom(31)):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="32 per key"):
            Vault.load(path)
