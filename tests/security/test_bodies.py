"""Bodies that cost more than they should, or mean more than one thing; and addresses in them."""

from __future__ import annotations

import json
import time

import pytest

from tests.security.site import CHAT, PROMPT_CANARY
from tests.support.issuer import serving

MESSAGES = f'"messages":[{{"role":"user","content":"{PROMPT_CANARY}"}}]'


def body(rest: str) -> bytes:
    return f"{{{MESSAGES},{rest}}}".encode()


BOMBS = {
    "lists in lists": body('"a":' + "[" * 1_000_000),
    "lists in lists, closed": body('"a":' + "[" * 100_000 + "]" * 100_000),
    "objects in objects": body('"a":' + '{"a":' * 100_000 + "1" + "}" * 100_000),
    "65 levels": body('"a":' + "[" * 64 + "]" * 64),
    "a million members": json.dumps({str(i): 1 for i in range(1_000_000)}).encode(),
    "members with one-letter names": b"{" + b",".join(b'"a":1' for _ in range(1_000_000)) + b"}",
    "a million objects": body('"a":[' + "{}," * 3_000_000 + "{}]"),
    "ten million numbers": body('"a":[' + "1," * 10_000_000 + "1]"),
    "a million texts": body('"a":[' + '"",' * 1_000_000 + '""]'),
    "quotes in an open text": body('"a":"' + '\\"' * 5_000_000),
    "NaN": body('"temperature":NaN'),
    "Infinity": body('"temperature":Infinity'),
    "minus Infinity": body('"temperature":-Infinity'),
    "1e999": body('"temperature":1e999'),
    "-1e999": body('"top_p":-1e999'),
    "an integer of 20 digits": body('"seed":' + "1" * 20),
    "an integer of 5,000 digits": body('"seed":' + "1" * 5000),
    "an integer of a million digits": body('"seed":' + "1" * 1_000_000),
    "model twice": body('"model":"a","model":"b"'),
    "messages twice": body(MESSAGES),
    "messages twice, escaped": body('"\\u006dessages":[]'),
    "a twin further down": body('"a":{"b":1,"b":2}'),
    "n is huge": body('"n":1000000000'),
    "n in a text": body('"n":"1000000000"'),
    "n is no integer": body('"n":1e3'),
    "n negative": body('"n":-1'),
    "n 129": body('"n":129'),
    "best_of is huge": body('"best_of":1000000000'),
    "a thousand prompts": body('"prompt":' + json.dumps(["x"] * 1000)),
    "prompts times n": body('"n":10,"prompt":' + json.dumps(["x"] * 100)),
    "max_tokens negative": body('"max_tokens":-1'),
    "max_tokens beyond 31 bits": body('"max_tokens":2147483648'),
    "max_tokens a text": body('"max_tokens":"9"'),
    "max_completion_tokens a float": body('"max_completion_tokens":1.5'),
    "min_tokens is huge": body('"min_tokens":4000000000'),
    "a million biases": body('"logit_bias":' + json.dumps({str(i): 1 for i in range(60_000)})),
    "301 biases": body('"logit_bias":' + json.dumps({str(i): 1 for i in range(301)})),
    "a bias of 101": body('"logit_bias":{"1":101}'),
    "a bias for no token": body('"logit_bias":{"-1":1}'),
    "a bias that is a text": body('"logit_bias":{"1":"1"}'),
    "biases as a list": body('"logit_bias":[[1,1]]'),
    "10,000 stops": body('"stop":' + json.dumps(["x"] * 10_000)),
    "cache_salt": body('"cache_salt":"globex"'),
    "cache_salt, escaped": body('"cache\\u005fsalt":"globex"'),
    "a byte order mark": b"\xef\xbb\xbf" + body('"a":1'),
    "UTF-16": body('"a":1').decode().encode("utf-16"),
    "half a surrogate": body('"a":"\\ud800"'),
    "bytes that are no UTF-8": b'{"a":"\xff\xfe"}',
    "a NUL behind it": body('"a":1') + b"\0",
    "two documents": body('"a":1') + b"{}",
    "comments": body('"a":1/* */'),
    "no object": b"[]",
    "nothing": b"",
    "a text": b'"' + b"x" * 1_000_000 + b'"',
}
SECONDS = 10.0
"""How long any of them may take on a loaded machine; each takes well under a second on a free one."""


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(site, name):
    """With 400 and words about what is wrong, soon, and without an echo."""
    started_at = time.monotonic()
    response = site.client.post(CHAT, headers=site.visitors["generate of acme"].headers, content=BOMBS[name])

    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "invalid_request"
    assert PROMPT_CANARY not in response.text
    assert len(response.content) < 500
    assert time.monotonic() - started_at < SECONDS


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "x-gzip"])
def test_compressed_bodies_are_refused(site, encoding):
    """They could be a thousand times as large."""
    headers = site.visitors["generate of acme"].headers | {"content-encoding": encoding}

    assert site.client.post(CHAT, headers=headers, content=b"\x1f\x8b" + b"\0" * 100).status_code == 400


def test_a_body_that_is_too_large_is_refused(site):
    """Declared, or as it comes."""
    headers = site.visitors["generate of acme"].headers
    declared = site.client.post(CHAT, headers=headers, content=b" " * ((32 << 20) + 1))
    grown = site.client.post(CHAT, headers=headers, content=iter([b" " * (1 << 20)] * 33))

    assert (declared.status_code, grown.status_code) == (413, 413)


# --- addresses

HOSTS = (
    "127.0.0.1",
    "localhost",
    "127.1",
    "127.0.1",
    "2130706433",
    "0x7f000001",
    "0x7f.0.0.1",
    "017700000001",
    "0177.0.0.1",
    "127.0.0.1.",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[0:0:0:0:0:ffff:127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
    "0.0.0.0",  # noqa: S104 - refused
    "0",
    "169.254.169.254",
    "[fd00:ec2::254]",
    "metadata.google.internal",
    "100.100.100.200",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "localtest.me",
    "127.0.0.1.nip.io",
    "\u2460\u2461\u2466.0.0.1",
    "\uff11\uff12\uff17.0.0.1",
    "example.com@127.0.0.1",
    "127.0.0.1#@example.com",
    "example.com\\@127.0.0.1",
    "example.com%2f@127.0.0.1",
    "127.0.0.1%00.example.com",
    "127.0.0.1?.example.com",
    "127.0.0.1 .example.com",
    "127.0.0.1\t",
    "127.0.0.1%23.example.com",
    "spoofed.burpcollaborator.net",
)
SCHEMES = (
    "file:///etc/passwd",
    "file://localhost/etc/passwd",
    "file:/etc/passwd",
    "FILE:///proc/self/environ",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "dict://127.0.0.1:6379/info",
    "ftp://127.0.0.1/x",
    "sftp://127.0.0.1/x",
    "tftp://127.0.0.1/x",
    "ldap://127.0.0.1/x",
    "jar:http://127.0.0.1!/x",
    "netdoc:///etc/passwd",
    "unix:/run/policy.sock",
    "s3://bucket/key",
    "blob:http://127.0.0.1/x",
    "javascript:alert(1)",
    "view-source:http://127.0.0.1",
    "about:blank",
    "//127.0.0.1/x",
    "/etc/passwd",
    "../../etc/passwd",
    "http:127.0.0.1",
    "http:/127.0.0.1",
    "http:\\\\127.0.0.1",
    "hTTp://127.0.0.1",
    " http://127.0.0.1",
    "\thttp://127.0.0.1",
    "\nhttp://127.0.0.1",
    "http://127.0.0.1\r\nX: y",
    "data",
    "dat:,",
    "\u0000data:image/png;base64,AAAA",
    " data:image/png;base64,AAAA",
    "xdata:image/png;base64,AAAA",
    "",
    "http://",
    "https://example.com/redirect?to=http://127.0.0.1",
    "https://example.com/image.png",
    "http://127.0.0.1:22/",
    "http://127.0.0.1:6379/",
)
ADDRESSES = (*(f"http://{host}:{{port}}/x.png" for host in HOSTS), *SCHEMES)


def parts(url: str) -> list[dict]:
    return [
        {"type": "image_url", "image_url": {"url": url}},
        {"image_url": url},
        {"type": "audio_url", "audio_url": {"url": url}},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "input_image", "image_url": url},
        {"type": "input_file", "file_url": url},
        {"type": "image", "source": {"type": "url", "url": url}},
    ]


def test_there_are_enough_addresses():
    """Eighty are promised."""
    assert len(ADDRESSES) >= 80


@pytest.mark.parametrize("address", ADDRESSES, ids=range(len(ADDRESSES)))
def test_no_address_is_followed(site, address):
    """In any kind of part, on any kind of path: refused, and nobody has called."""
    headers = site.visitors["generate of acme"].headers
    with serving(lambda _: (200, b"")) as (server, asked):
        url = address.replace("{port}", server.rpartition(":")[2])
        for part in parts(url):
            for path, call in (
                (CHAT, {"messages": [{"role": "user", "content": [part]}]}),
                ("/v1/messages", {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}),
                ("/v1/responses", {"input": [{"role": "user", "content": [part]}]}),
            ):
                response = site.client.post(path, headers=headers, json=call)
                assert response.status_code == 400, (path, part, response.text)
                assert "data: URL" in response.text
        assert asked == []
