"""Tokens, through the front door: forged, replayed, of a key that is gone, of an issuer that is down."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.security.site import Site, issuer_rules
from tests.support.cluster import poll
from tests.support.issuer import TokenIssuer, forgeries, rsa_key, serving, stranger

NAMES = tuple(forgeries(TokenIssuer()))


@pytest.fixture(scope="session")
def forged(site: Site) -> dict[str, str]:
    """Every forgery, in the name of our issuer."""
    return forgeries(site.issuer)


def test_there_are_enough_of_them():
    """Forty are promised."""
    assert len(NAMES) >= 40


@pytest.mark.parametrize("name", NAMES)
def test_forgeries_are_refused(site, forged, name):
    """With the answer that an unknown key gets, to the letter."""
    answers = [site.chat({"authorization": f"Bearer {credential}"}) for credential in (forged[name], "no-such-key")]

    assert [answer.status_code for answer in answers] == [401, 401]
    assert answers[0].content == answers[1].content
    assert answers[0].headers["www-authenticate"] == "Bearer"


def test_tokens_open_what_their_claims_are_mapped_to(site):
    """Roles and tenants, and nothing that they say without being asked."""
    staff = {"authorization": f"Bearer {site.token('acme', 'staff')}"}
    watcher = {"authorization": f"Bearer {site.token('acme', 'admin', 'root', scope='admin', roles=['admin'])}"}

    assert site.chat(staff).status_code == 200
    assert site.client.get("/v1/models", headers=staff).status_code == 200
    assert site.client.get("/v1/admin/api_keys", headers=staff).status_code == 403
    assert site.chat(watcher).status_code == 403
    assert site.chat({"x-api-key": site.token("acme", "users")}).status_code == 200


def test_sessions_end_at_once(site):
    """Of one person, or of all: also those whose token was just used."""
    headers = {"authorization": f"Bearer {site.token('acme', 'users', sub='eve')}"}
    assert site.chat(headers).status_code == 200
    try:
        for rules in ({"blocked_subjects": ["eve"]}, {"not_before": 2**32}):
            assert site.apply(issuers=[issuer_rules(site.issuer, **rules)]).status_code == 200
            assert site.chat(headers).status_code == 401
    finally:
        assert site.apply().status_code == 200
    assert site.chat(headers).status_code == 200


@pytest.mark.timeout(120)
def test_keys_come_and_go(site):
    """A new key is good from its first token on, a key that is taken back is dead within a minute."""
    old = {"authorization": f"Bearer {site.token('acme', 'users')}"}
    fresh, keys = stranger("rsa-fresh"), site.issuer.keys
    try:
        site.issuer.keys = [rsa_key(), fresh]
        token = site.issuer.token(fresh, org="o-acme", groups=["users"])
        headers = {"authorization": f"Bearer {token}"}
        poll(lambda: site.chat(headers).status_code == 200, 15, "the new key is not known")
        assert site.chat(old).status_code == 200

        site.issuer.keys = [fresh]
        poll(lambda: site.chat(old).status_code == 401, 60, "the old key is still good")
        assert site.chat(headers).status_code == 200
    finally:
        site.issuer.keys = keys
    poll(lambda: site.chat(old).status_code == 200, 60, "the key did not come back")


def fetches(site: Site) -> float:
    lines = site.cluster.metrics("gateway")
    return sum(float(n) for n in re.findall(r"^inferflux_jwks_fetches_total\{.*\} (\S+)$", lines, re.MULTILINE))


def test_a_flood_of_unknown_ids_does_not_reach_the_issuer(site):
    """A hundred strangers are a few fetches, not a hundred."""
    before = fetches(site)
    for number in range(100):
        token = site.issuer.token(rsa_key(), org="o-acme")
        head, rest = token.split(".", 1)
        assert head
        unknown = json.dumps({"alg": "RS256", "kid": f"unknown-{number}"}).encode().hex()
        assert site.chat({"authorization": f"Bearer eyJ{unknown}.{rest}"}).status_code == 401
    assert fetches(site) - before <= 5


@contextmanager
def trap() -> Iterator[tuple[int, list[object]]]:
    """Listen on this machine; gives the port, and whoever has come."""
    caught: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        is_over = threading.Event()

        def accept() -> None:
            while not is_over.is_set():
                try:
                    connection, peer = server.accept()
                except TimeoutError:
                    continue
                caught.append(peer)
                connection.close()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield server.getsockname()[1], caught
        finally:
            is_over.set()
            thread.join()


HOSTS = ("127.0.0.1", "localhost", "2130706433", "0x7f000001", "017700000001", "127.1", "[::1]", "[::ffff:127.0.0.1]")


def test_keys_are_never_fetched_from_this_machine_by_accident(site):
    """However its address is written, unless the policy says loopback."""
    before = fetches(site)
    with trap() as (port, caught):
        issuers = [
            issuer_rules(TokenIssuer(f"https://idp-{number}.example.com"), network="public")
            | {"jwks_url": f"https://{host}:{port}/keys"}
            for number, host in enumerate(HOSTS)
        ]
        try:
            assert site.apply(issuers=[issuer_rules(site.issuer), *issuers]).status_code == 200
            poll(lambda: fetches(site) - before >= len(HOSTS), 15, "not all were tried")
        finally:
            assert site.apply().status_code == 200
        assert caught == []


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/keys",
        "http://169.254.169.254/latest/meta-data",
        "http://idp.example.com/keys",
        "file:///etc/passwd",
        "gopher://127.0.0.1:6379/_FLUSHALL",
        "ftp://idp.example.com/keys",
        "https://idp.example.com\\@127.0.0.1/keys",
        "https://user:password@idp.example.com/keys",
        "https://idp.example.com/#@127.0.0.1",
        "https:///keys",
        "keys",
        "",
    ],
)
def test_a_policy_with_such_an_address_is_refused(site, url):
    """Before anybody looks for it."""
    response = site.apply(issuers=[issuer_rules(site.issuer, network="public", jwks_url=url)])

    assert response.status_code == 400
    assert "password" not in response.text


@pytest.mark.parametrize("kind", ["redirect", "huge", "no JSON", "no keys", "private key"])
def test_bad_key_sets_change_nothing(site, kind):
    """The keys from before stay in use."""
    other = TokenIssuer()
    bodies = {
        "redirect": b"",
        "huge": b'{"keys": ["' + b"x" * (1 << 20) + b'"]}',
        "no JSON": b"<html>",
        "no keys": b'{"keys": []}',
        "private key": json.dumps({"keys": [rsa_key().as_dict(private=True)]}).encode(),
    }
    with serving(lambda _: (302 if kind == "redirect" else 200, bodies[kind])) as (url, asked):
        other.url = url
        rules = issuer_rules(other, jwks_url=url + "/keys")
        try:
            assert site.apply(issuers=[issuer_rules(site.issuer), rules]).status_code == 200
            poll(lambda: asked, 10, "never fetched")
            headers = {"authorization": f"Bearer {other.token(org='o-acme', groups=['users'])}"}
            assert site.chat(headers).status_code == 503
            assert site.chat(site.visitors["token of acme"].headers).status_code == 200
        finally:
            assert site.apply().status_code == 200
