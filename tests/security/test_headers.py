"""Requests that two readers would understand as two, and headers that claim what nobody asked them for."""

from __future__ import annotations

import json
import re
import socket

import pytest

from tests.security.site import CHAT, Site
from tests.support.cluster import poll

SMUGGLED = "GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n\r\n"
POST = "POST " + CHAT + " HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
GET = "GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"

# What a front and a back server could divide differently. Each must end in one refusal, or in nothing at all.
AMBIGUOUS = {
    "CL and TE": POST + "content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TE and CL": POST + "transfer-encoding: chunked\r\ncontent-length: 6\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "two CL that differ": POST + "content-length: 2\r\ncontent-length: 90\r\n\r\n{{}}" + SMUGGLED,
    "two CL that agree": POST + "content-length: 2\r\ncontent-length: 2\r\n\r\n{{}}" + SMUGGLED,
    "CL list": POST + "content-length: 2, 2\r\n\r\n{{}}" + SMUGGLED,
    "CL with a sign": POST + "content-length: +2\r\n\r\n{{}}" + SMUGGLED,
    "CL negative": POST + "content-length: -2\r\n\r\n{{}}" + SMUGGLED,
    "CL hexadecimal": POST + "content-length: 0x2\r\n\r\n{{}}" + SMUGGLED,
    "CL in words": POST + "content-length: two\r\n\r\n{{}}" + SMUGGLED,
    "CL beyond 64 bits": POST + "content-length: 18446744073709551618\r\n\r\n{{}}" + SMUGGLED,
    "CL with a space before the colon": POST + "content-length : 2\r\n\r\n{{}}" + SMUGGLED,
    "TE with a space before the colon": POST + "transfer-encoding : chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TE twice": POST + "transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TE chunked, identity": POST + "transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TE xchunked": POST + "transfer-encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TE with a vertical tab": POST + "transfer-encoding: \x0bchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TE on a folded line": POST + "transfer-encoding:\r\n chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TE after a lone CR": POST + "x: y\rtransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "header after a NUL": POST + "x: y\x00\r\ncontent-length: 2\r\n\r\n{{}}" + SMUGGLED,
    "chunk size negative": POST + "transfer-encoding: chunked\r\n\r\n-1\r\n{{}}\r\n0\r\n\r\n" + SMUGGLED,
    "chunk size with 0x": POST + "transfer-encoding: chunked\r\n\r\n0x2\r\n{{}}\r\n0\r\n\r\n" + SMUGGLED,
    "chunk size beyond 64 bits": POST + "transfer-encoding: chunked\r\n\r\n1" + "0" * 16 + "2\r\n{{}}\r\n0\r\n\r\n",
    "chunk without its end": POST + "transfer-encoding: chunked\r\n\r\n2\r\n{{}}XX0\r\n\r\n" + SMUGGLED,
    "chunk size ended by LF": POST + "transfer-encoding: chunked\r\n\r\n2\n{{}}\r\n0\r\n\r\n" + SMUGGLED,
    "two hosts": GET.replace("host: x", "host: x\r\nhost: y") + "\r\n",
    "two authorizations": GET + "authorization: Bearer other-key\r\n\r\n",
    "folded authorization": "GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization:\r\n Bearer {key}\r\n\r\n",
    "space before the first header": "GET /v1/models HTTP/1.1\r\n host: x\r\nauthorization: Bearer {key}\r\n\r\n",
    "HTTP/0.9": "GET /v1/models\r\n\r\n",
    "HTTP/1.2": "GET /v1/models HTTP/1.2\r\nhost: x\r\nauthorization: Bearer {key}\r\n\r\n",
    "HTTP/2 preface": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "method with a NUL": "GE\x00T /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n\r\n",
    "two spaces after the method": "GET  /v1/models HTTP/1.1 \r\nhost: x\r\nauthorization: Bearer {key}\r\n\r\n",
    "TLS hello": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "CONNECT": "CONNECT 169.254.169.254:80 HTTP/1.1\r\nhost: x\r\n\r\n" + SMUGGLED,
    "absolute form": "GET http://169.254.169.254/ HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n\r\n",
    "upgrade": "GET /v1/nothing HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
    "a header without a name": GET + ": value\r\n\r\n",
    "a header name with a space": GET + "x y: value\r\n\r\n",
    "a header that is too long": GET + "x: " + "y" * 40_000 + "\r\n\r\n",
    "too many headers": GET + "".join(f"x{i}: y\r\n" for i in range(200)) + "\r\n",
}


def exchange(site: Site, data: bytes) -> list[int]:
    """Send it and read to the end; gives the statuses of all answers."""
    with socket.create_connection(site.address, timeout=10) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while part := connection.recv(1 << 16):
                answer += part
        except (ConnectionResetError, BrokenPipeError):
            pass
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_could_be_two_requests_is_none(site, name):
    """One refusal at most, and what came after it is not read."""
    key = site.cluster.api_key
    data = (AMBIGUOUS[name].format(key=key) if "{key}" in AMBIGUOUS[name] else AMBIGUOUS[name]).encode("latin-1")
    statuses = exchange(site, data)

    assert len(statuses) <= 1
    assert all(400 <= status < 500 for status in statuses), statuses


def test_the_same_without_the_trick_is_answered(site):
    """So it is the trick that was refused."""
    key = site.cluster.api_key
    good = GET.format(key=key) + "\r\n" + GET.format(key=key) + "connection: close\r\n\r\n"

    assert exchange(site, good.encode()) == [200, 200]


CREDENTIALS = (
    "Bearer",
    "Bearer ",
    "Bearer  {key}",
    "Bearer\t{key}",
    "Bearer {key} ",
    "Bearer {key},{key}",
    "Bearer {key}\t",
    "Basic {key}",
    "Token {key}",
    "{key}",
    "Bearer ' OR '1'='1",
    "Bearer ifx_'; DROP TABLE keys;--",
    "Bearer *",
    "Bearer ifx:{{policy}}:keys",
    "Bearer $(id)",
    "Bearer `id`",
    "Bearer ${{jndi:ldap://127.0.0.1/a}}",
    "Bearer \\r\\nFLUSHALL\\r\\n",
    "Bearer return redis.call('FLUSHALL')",
    "Bearer ../../../../etc/passwd",
    "Bearer " + "a" * 20_000,
    "Bearer \u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9",
    "Bearer null",
    "Bearer undefined",
    "Bearer {{}}",
)


@pytest.mark.parametrize("credential", CREDENTIALS, ids=range(len(CREDENTIALS)))
def test_odd_credentials_are_refused(site, credential):
    """As what they are: characters."""
    value = credential.format(key=site.cluster.api_key).encode("latin-1")
    head = b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: " + value + b"\r\n\r\n"

    assert exchange(site, head) == [401]


SPOOFED = {
    "x-tenant": "globex",
    "x-tenant-id": "globex",
    "x-inferflux-tenant": "globex",
    "inferflux-tenant": "globex",
    "openai-organization": "globex",
    "openai-project": "globex",
    "x-user-id": "root",
    "x-role": "admin",
    "x-scopes": "admin",
    "x-api-key": "another-key",
    "x-forwarded-user": "admin",
    "x-forwarded-for": "127.0.0.1",
    "x-real-ip": "127.0.0.1",
    "forwarded": "for=127.0.0.1",
    "x-original-url": "/v1/admin/api_keys",
    "x-rewrite-url": "/v1/admin/api_keys",
    "x-http-method-override": "DELETE",
    "x-request-id": "req_000000000000000000000000",
    "x-inferflux-priority": "-100",
    "cache-salt": "globex",
    "x-cache-salt": "globex",
    "host": "127.0.0.1",
    "cookie": "tenant=globex; role=admin",
}


def tenant_of(site: Site, request_id: str) -> str:
    """Look up whose request it was; its line is written when it is over."""

    def find() -> str:
        lines = site.cluster.log("gateway").splitlines()
        return next((line for line in lines if request_id in line and "tenant" in line), "")

    return str(json.loads(poll(find, 10, "no line in the log"))["tenant"])


@pytest.mark.parametrize("name", SPOOFED)
def test_a_header_changes_nobody(site, name):
    """The request is its key's, and its log line says so."""
    headers = site.visitors["generate of acme"].headers | {name: SPOOFED[name]}
    response = site.chat(headers, user="root")
    assert response.status_code == 200
    request_id = response.headers["x-request-id"]
    assert request_id != SPOOFED["x-request-id"]

    assert tenant_of(site, request_id) == "acme"
    assert site.client.get("/v1/admin/api_keys", headers=headers).status_code == 403
    assert site.client.get("/metrics", headers={name: SPOOFED[name]} if name != "x-api-key" else {}).status_code == 401


@pytest.mark.parametrize("field", ["tenant", "team", "role", "scopes", "api_key", "organization", "metadata"])
def test_a_member_of_the_body_changes_nobody(site, field):
    """Whatever a worker may make of it."""
    response = site.chat(site.visitors["generate of acme"].headers, **{field: "globex"})
    request_id = response.headers["x-request-id"]

    assert tenant_of(site, request_id) == "acme"
