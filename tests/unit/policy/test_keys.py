"""Keys are checked and hashed."""

from __future__ import annotations

import hashlib
import hmac

import pytest

from inferflux.errors import ConfigError, InvalidRequest
from inferflux.policy.identity import Scope
from services.policy.keys import decode_key, encode_key, new_key, new_secret, parse_api_keys
from services.policy.pepper import Pepper

PEPPER = Pepper(b"p" * 32)
NOW_MS = 1_700_000_000_000


def make(secret="ifx_secret-1", **changes):  # noqa: S107
    return new_key(secret, PEPPER, **{"name": "ci", "scopes": [Scope.READ], "now_ms": NOW_MS} | changes)


def test_a_key_holds_the_hmac_of_its_secret_and_not_the_secret():
    """Gateways compute the same hash from what a client sends."""
    key = make("ifx_secret-1")

    assert key.secret_hash == hmac.new(b"p" * 32, b"ifx_secret-1", hashlib.sha256).digest()
    assert "ifx_secret-1" not in repr(key)


def test_the_same_secret_is_the_same_key():
    """Ids come from the hash, so registering twice is no duplicate."""
    assert make("ifx_secret-1").key_id == make("ifx_secret-1", name="other").key_id
    assert make("ifx_secret-1").key_id != make("ifx_secret-2").key_id


def test_generated_secrets_are_accepted_and_differ():
    """What the service makes has the documented shape."""
    secrets = {new_secret() for _ in range(100)}

    assert len(secrets) == 100
    assert all(len(secret) == 47 and secret.startswith("ifx_") and make(secret) for secret in secrets)


@pytest.mark.parametrize(
    "bad",
    [
        {"secret": "short-7"},
        {"secret": "x" * 257},
        {"secret": "with space"},
        {"secret": "with,comma"},
        {"secret": "with:colon"},
        {"secret": "new\nline.."},
        {"secret": "ümlaut-secret"},
        {"name": ""},
        {"name": "x" * 65},
        {"name": "bell\x07"},
        {"tenant": "a b"},
        {"tenant": "../x"},
        {"scopes": []},
        {"expires_at_ms": NOW_MS},
    ],
)
def test_bad_input_is_refused_and_a_bad_secret_is_not_repeated(bad):
    """Each rule has its error, which names the field."""
    with pytest.raises(InvalidRequest) as caught:
        make(**bad)

    assert caught.value.param == next(iter(bad)).removesuffix("_ms")
    assert bad.get("secret", "\0") not in caught.value.message


def test_every_visible_ascii_character_may_be_in_a_secret():
    """Operators bring their own."""
    visible = "".join(chr(code) for code in range(33, 127) if chr(code) not in ",:")

    assert make(visible).key_id


def test_a_key_expires_at_its_instant():
    """Expiry is inclusive."""
    key = make(expires_at_ms=NOW_MS + 1)

    assert not key.is_expired(NOW_MS)
    assert key.is_expired(NOW_MS + 1)


def test_a_record_reads_back():
    """Nothing is lost in the store."""
    key = make(scopes=[Scope.ADMIN, Scope.READ], tenant="acme", expires_at_ms=NOW_MS + 5, priority=-3)

    assert decode_key(encode_key(key)) == key


def test_api_keys_of_the_environment_are_parsed():
    """`secret:scope+scope`, as in INFERFLUX_API_KEYS."""
    first, second = parse_api_keys(["ifx_one-1:generate+read", " ifx_two-2:admin "], PEPPER, now_ms=NOW_MS)

    assert first.scopes == {Scope.GENERATE, Scope.READ}
    assert second.scopes == {Scope.ADMIN}
    assert second.secret_hash == PEPPER.hash_secret("ifx_two-2")


def test_all_bad_api_keys_are_reported_at_once_without_their_secrets():
    """A typo shows by position, never by value."""
    with pytest.raises(ConfigError) as caught:
        parse_api_keys(["ifx_one-1:generate", "ifx_two-2:root", "ifx_three", "tiny:read"], PEPPER, now_ms=NOW_MS)

    assert [line.split(":")[0] for line in caught.value.message.splitlines()] == [
        f"INFERFLUX_API_KEYS entry {position}" for position in (2, 3, 4)
    ]
    assert not any(secret in caught.value.message for secret in ("ifx_two-2", "ifx_three", "tiny"))


def test_a_pepper_file_must_exist_and_be_long_enough(tmp_path):
    """A service without the cluster's pepper must not start."""
    with pytest.raises(ConfigError, match="No such file"):
        Pepper.load(tmp_path / "pepper.key")

    (tmp_path / "pepper.key").write_bytes(b"short")
    with pytest.raises(ConfigError, match="5 bytes"):
        Pepper.load(tmp_path / "pepper.key")
