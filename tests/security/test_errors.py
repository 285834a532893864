"""Everything that a refusal says, to the letter: no stack, no address, no version, nothing of anybody else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.security.site import CHAT, Site

SNAPSHOT = Path(__file__).with_name("errors.json")
LEAKS = re.compile(
    r"Traceback|File \"|\.py\b|0x[0-9a-f]{4,}|site-packages|/tmp/|/work/|/home/|/usr/|\.sock\b|unix:|"
    r"\b\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b|localhost|redis|valkey|uvicorn|starlette|fastapi|pydantic|grpc|python/|"
    r"orjson|joserfc|vllm",
    re.IGNORECASE,
)


def requests(site: Site) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """One request for each way to be refused: method, path, and what else belongs to it."""
    good, none = site.visitors["generate of acme"].headers, {}
    bad = {"authorization": "Bearer no-such-key"}
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    return {
        "no key": ("POST", CHAT, {"headers": none, "json": chat}),
        "no such key": ("POST", CHAT, {"headers": bad, "json": chat}),
        "revoked key": ("POST", CHAT, {"headers": site.visitors["a revoked key"].headers, "json": chat}),
        "expired key": ("POST", CHAT, {"headers": site.visitors["an expired key"].headers, "json": chat}),
        "another scheme": ("POST", CHAT, {"headers": {"authorization": "Basic x"}, "json": chat}),
        "forged token": ("POST", CHAT, {"headers": {"authorization": "Bearer eyJ9.eyJ9.AA"}, "json": chat}),
        "token of no tenant": ("POST", CHAT, {"headers": site.visitors["a token of nobody"].headers, "json": chat}),
        "no scope": ("POST", CHAT, {"headers": site.visitors["read of acme"].headers, "json": chat}),
        "no scope for admin": ("GET", "/v1/admin/api_keys", {"headers": good}),
        "no such model": ("POST", CHAT, {"headers": good, "json": chat | {"model": "nobody"}}),
        "no such model to show": ("GET", "/v1/models/nobody", {"headers": good}),
        "no such path": ("GET", "/nowhere", {"headers": good}),
        "no such method": ("GET", CHAT, {"headers": good}),
        "no such method, elsewhere": ("POST", "/v1/models", {"headers": good}),
        "no such stream": ("GET", "/v1/streams/req_000000000000000000000000", {"headers": good}),
        "no stream": ("GET", "/v1/streams/x", {"headers": good}),
        "no JSON": ("POST", CHAT, {"headers": good, "content": b"{"}),
        "no object": ("POST", CHAT, {"headers": good, "content": b"[]"}),
        "a twin": ("POST", CHAT, {"headers": good, "content": b'{"a":1,"a":2}'}),
        "too deep": ("POST", CHAT, {"headers": good, "content": b'{"a":' + b"[" * 100 + b"]" * 100 + b"}"}),
        "an address": (
            "POST",
            CHAT,
            {"headers": good, "json": {"messages": [{"content": [{"image_url": "http://x"}]}]}},
        ),
        "cache_salt": ("POST", CHAT, {"headers": good, "json": chat | {"cache_salt": "x"}}),
        "n": ("POST", CHAT, {"headers": good, "json": chat | {"n": 1000}}),
        "compressed": ("POST", CHAT, {"headers": good | {"content-encoding": "gzip"}, "content": b"x"}),
        "timeout": ("POST", CHAT, {"headers": good | {"x-inferflux-timeout-ms": "soon"}, "json": chat}),
        "idempotency key": ("POST", CHAT, {"headers": good | {"idempotency-key": "x" * 256}, "json": chat}),
        "Anthropic, no key": ("POST", "/v1/messages", {"json": chat}),
        "Anthropic, no JSON": ("POST", "/v1/messages", {"headers": good, "content": b"{"}),
        "Anthropic, no such model": ("POST", "/v1/messages", {"headers": good, "json": chat | {"model": "nobody"}}),
        "key without a name": ("POST", "/v1/admin/api_keys", {"headers": site.admin, "json": {"scopes": ["read"]}}),
        "key without scopes": ("POST", "/v1/admin/api_keys", {"headers": site.admin, "json": {"name": "x"}}),
        "key of no tenant": (
            "POST",
            "/v1/admin/api_keys",
            {"headers": site.admin, "json": {"name": "x", "scopes": ["read"], "tenant": "a b"}},
        ),
        "no such key to revoke": ("DELETE", "/v1/admin/api_keys/key_0", {"headers": site.admin}),
        "no such key to rotate": ("POST", "/v1/admin/api_keys/key_0/rotate", {"headers": site.admin}),
        "no such worker": ("GET", "/v1/admin/workers/nobody-0", {"headers": site.admin}),
        "no such pin": ("DELETE", "/v1/admin/cache/pins/nobody", {"headers": site.admin}),
        "no policy": ("PUT", "/v1/admin/policy", {"headers": site.admin, "json": {}}),
        "a bad policy": ("PUT", "/v1/admin/policy", {"headers": site.admin, "json": {"document": {"identity": 7}}}),
    }


def seen(site: Site) -> dict[str, dict[str, Any]]:
    """Make all requests; ids are replaced by their kind."""
    found = {}
    for name, (method, path, fields) in requests(site).items():
        response = site.client.request(method, path, **fields)
        body = re.sub(r"req_[0-9a-f]{24}", "req_ID", response.text)
        found[name] = {"status": response.status_code, "body": json.loads(body)}
    return found


@pytest.fixture(scope="module")
def refusals(site: Site) -> dict[str, dict[str, Any]]:
    return seen(site)


def test_refusals_say_what_they_have_always_said(refusals):
    """`errors.json` is what clients have seen; whoever changes a text changes it there."""
    assert refusals == json.loads(SNAPSHOT.read_text())


def test_refusals_tell_nothing_of_the_inside(refusals):
    """Neither where they were made nor of what."""
    bodies = {name: json.dumps(refusal["body"]) for name, refusal in refusals.items()}

    assert {name: body for name, body in bodies.items() if LEAKS.search(body)} == {}
    assert all(400 <= refusal["status"] < 500 for refusal in refusals.values())


def test_headers_name_no_product(site):
    """No server, no version."""
    for path in ("/livez", "/nowhere", "/v1/models"):
        response = site.client.get(path, headers=site.admin)
        assert not {"server", "x-powered-by", "via"} & response.headers.keys()
