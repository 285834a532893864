"""An issuer's keys: what is taken of a set, when it is fetched, and by how many at a time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from joserfc.jwk import ECKey, OctKey, RSAKey

from inferflux.clock import ManualClock
from inferflux.errors import Unavailable
from inferflux.policy.identity import Issuer
from inferflux.process import Tasks
from services.gateway import jwks
from services.gateway.jwks import Keys, KeySource, KeySources, parse_keys
from tests.support.issuer import TokenIssuer, ec_key, rsa_key

PLACE = ("https://idp.example.com", "https://idp.example.com/keys", "public")


def public(key: Any, **fields: Any) -> dict[str, Any]:
    return key.as_dict(private=False) | fields


def test_only_public_signing_keys_of_the_right_kind_are_taken():
    """Others are passed over: sets hold keys for other uses, and of kinds that are yet to come."""
    with pytest.warns(match="2048"):
        short = RSAKey.generate_key(1024, {"kid": "short"})
    entries = [
        public(rsa_key()),
        public(ec_key(), use="sig", alg="ES256"),
        public(rsa_key("rsa-enc"), use="enc"),
        public(rsa_key("rsa-ps"), alg="PS256"),
        rsa_key("rsa-private").as_dict(private=True),
        public(short),
        public(ECKey.generate_key("P-384", {"kid": "p384"})),
        OctKey.import_key(b"secret-secret-secret-secret-secret", {"kid": "shared"}).as_dict(private=True),
        {"kty": "RSA", "kid": "broken", "n": "!!", "e": "AQAB"},
        {"kty": "RSA", "kid": "empty"},
        {"kty": "XYZ", "kid": "new"},
        {},
        "text",
    ]

    assert parse_keys({"keys": entries}).by_id.keys() == {"rsa-1", "ec-1"}


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"keys": {}},
        {"keys": []},
        {"keys": [{"kty": "oct", "k": "AAAA"}]},
        {"keys": [public(rsa_key())] * 2},
        {"keys": [public(rsa_key(), kid=7)]},
        {"keys": [public(rsa_key(), kid=str(i)) for i in range(jwks.MAX_KEYS + 1)]},
    ],
)
def test_a_set_without_a_good_key_or_with_doubtful_ids_is_refused(document):
    """As a whole: the keys from before stay."""
    with pytest.raises(Unavailable):
        parse_keys(document)


@pytest.mark.parametrize(
    ("keys", "key_id", "found"),
    [
        (Keys({"a": "A", "b": "B"}), "a", "A"),
        (Keys({"a": "A"}), "b", None),
        (Keys({"a": "A"}), None, "A"),
        (Keys({"a": "A", "b": "B"}), None, None),
        (Keys({}, ("N",)), None, "N"),
        (Keys({}, ("N",)), "a", "N"),
        (Keys({}, ("N", "M")), "a", None),
        (Keys({"a": "A"}, ("N",)), "b", None),
        (Keys({"a": "A"}, ("N",)), None, None),
    ],
)
def test_a_token_finds_its_key_or_none(keys, key_id, found):
    """By its id; without one only where there is no choice."""
    assert keys.find(key_id) == found


class Idp:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.issuer = TokenIssuer()
        self.num_asked = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.is_down = False

    async def fetch(self, url: str, network: str) -> dict[str, Any]:
        self.num_asked += 1
        await self.may_answer.wait()
        if self.is_down:
            raise Unavailable("down")
        return self.issuer.jwks()


async def test_a_flood_of_unknown_ids_is_one_fetch(monkeypatch):
    """However many wait; and none at all for a while after it."""
    monkeypatch.setattr(jwks, "MIN_INTERVAL_S", 0.05)
    clock, idp = ManualClock(), Idp()
    source = KeySource(PLACE, idp.fetch, clock)
    async with Tasks() as tasks:
        tasks.spawn(source.run(), "keys")
        await source.refreshed()
        assert idp.num_asked == 1
        await asyncio.gather(*(source.refreshed() for _ in range(1000)))
        assert idp.num_asked == 1

        clock.advance(1)
        await asyncio.gather(*(source.refreshed() for _ in range(1000)))
        assert idp.num_asked == 2


async def test_nobody_waits_long_for_an_issuer_that_hangs(monkeypatch):
    """The request goes on without the key, and is refused."""
    monkeypatch.setattr(jwks, "WAIT_S", 0.05)
    idp = Idp()
    idp.may_answer.clear()
    source = KeySource(PLACE, idp.fetch, ManualClock())
    async with Tasks() as tasks:
        tasks.spawn(source.run(), "keys")
        async with asyncio.timeout(5):
            await asyncio.gather(*(source.refreshed() for _ in range(100)))
    assert idp.num_asked == 1


async def test_a_failure_leaves_the_keys_for_as_long_as_the_policy_says():
    """Then nothing is verified by them."""
    clock, idp = ManualClock(), Idp()
    source = KeySource(PLACE, idp.fetch, clock)
    await source.refresh()
    keys = source.current(60)

    idp.is_down = True
    clock.advance(60)
    await source.refresh()
    assert source.current(60) is keys
    clock.advance(1)
    with pytest.raises(Unavailable):
        source.current(60)


async def test_rotation_needs_no_restart():
    """New keys come, old ones stay as long as they are published, and not longer."""
    idp = Idp()
    source = KeySource(PLACE, idp.fetch, ManualClock())
    for keys in ([rsa_key()], [rsa_key(), rsa_key("rsa-2")], [rsa_key("rsa-2")]):
        idp.issuer.keys = keys
        await source.refresh()
        assert source.current(60).by_id.keys() == {key.kid for key in keys}


@pytest.mark.parametrize(
    "discovery",
    [
        {"issuer": "https://other.example.com", "jwks_uri": PLACE[1]},
        {"issuer": PLACE[0]},
        {"issuer": PLACE[0], "jwks_uri": 7},
        {"jwks_uri": PLACE[1]},
    ],
)
async def test_a_discovery_document_of_another_issuer_is_refused(discovery):
    """Its keys would be the other's."""

    async def fetch(url: str, network: str) -> dict[str, Any]:
        return discovery if url.endswith("openid-configuration") else TokenIssuer().jwks()

    source = KeySource((PLACE[0], None, "public"), fetch, ManualClock())
    await source.refresh()
    with pytest.raises(Unavailable):
        source.current(60)


def issuer(**fields: Any) -> Issuer:
    rules = {"issuer": PLACE[0], "jwks_url": PLACE[1], "audiences": ["a"]}
    mapping = {"tenant": {"default": "acme"}, "roles": {"default": "read"}}
    return Issuer.model_validate(rules | mapping | fields)


async def test_an_issuer_that_changes_only_its_rules_keeps_its_keys():
    """One that moves is asked at its new place, one that is gone not at all."""
    idp = Idp()
    async with Tasks() as tasks:
        sources = KeySources(tasks, idp.fetch, ManualClock())
        sources.reconcile([issuer()])
        source = sources.of(issuer())
        await source.refreshed()
        sources.reconcile([issuer(blocked_subjects=["mallory"])])
        assert sources.of(issuer()) is source

        sources.reconcile([issuer(jwks_url=PLACE[1] + "2")])
        with pytest.raises(Unavailable):
            sources.of(issuer())
        sources.reconcile([])
        with pytest.raises(Unavailable):
            sources.of(issuer(jwks_url=PLACE[1] + "2"))
