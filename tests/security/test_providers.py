"""Tokens of providers that others have written, one of them certified by the OpenID Foundation."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from tests.security.site import Site, issuer_rules
from tests.support.cluster import poll
from tests.support.issuer import TokenIssuer

CERTIFIED = "oidc-provider@9"
SCRIPT = Path(__file__).with_name("provider.mjs")
MOCK = """
import sys, oidc_provider_mock
with oidc_provider_mock.run_server_in_thread() as server:
    print(f'{{"issuer": "http://127.0.0.1:{server.server_port}"}}', flush=True)
    sys.stdin.read()
"""


@contextmanager
def provider(*command: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run a provider that prints its issuer's URL, and end it."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*command], text=True, **pipes) as process:
        try:
            yield json.loads(process.stdout.readline())["issuer"], process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def certified() -> str:
    """Install the provider with npm, once on this machine; gives its module."""
    place = Path(tempfile.gettempdir()) / "ifx-npm-oidc-provider-9"
    module = place / "node_modules/oidc-provider/lib/index.js"
    if not module.exists():
        npm = shutil.which("npm")
        assert npm, f"npm is needed to install the certified provider {CERTIFIED}"
        command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(place), CERTIFIED]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"npm cannot install {CERTIFIED}: {done.stderr[-500:]}"
    return str(module)


@contextmanager
def trusted(site: Site, issuer: str, **rules: object) -> Iterator[None]:
    """Take an issuer's tokens inside the block, found by its discovery document."""
    try:
        response = site.apply(issuers=[issuer_rules(site.issuer), issuer_rules(TokenIssuer(issuer), **rules)])
        assert response.status_code == 200, response.text
        yield
    finally:
        assert site.apply().status_code == 200


def twisted(token: str) -> str:
    """The same token with another signature."""
    head, body, signature = token.split(".")
    return f"{head}.{body}.{'A' if signature[0] != 'A' else 'B'}{signature[1:]}"


@pytest.mark.timeout(180)
def test_access_tokens_of_a_certified_provider(site, certified):
    """Of both algorithms; found by discovery; also when the provider is gone."""
    with provider("node", str(SCRIPT), certified) as (issuer, process), trusted(site, issuer):
        tokens = []
        for resource in ("urn:rs256", "urn:es256"):
            grant = {"grant_type": "client_credentials", "resource": resource, "scope": "generate"}
            with httpx.Client(trust_env=False) as client:
                answer = client.post(f"{issuer}/token", auth=("app", "app-secret"), data=grant)
            tokens.append(answer.json()["access_token"])
        headers = [{"authorization": f"Bearer {token}"} for token in tokens]
        poll(lambda: site.chat(headers[0]).status_code == 200, 15, "the first token is not taken")
        assert site.chat(headers[1]).status_code == 200
        for token in tokens:
            assert site.chat({"authorization": f"Bearer {twisted(token)}"}).status_code == 401
        assert site.client.get("/v1/admin/api_keys", headers=headers[0]).status_code == 403

        process.kill()
        process.wait()
        assert [site.chat(header).status_code for header in headers] == [200, 200]


@pytest.mark.timeout(120)
def test_id_tokens_of_another_provider(site):
    """From a login by authorization code, for the client that the policy names as audience."""
    rules = {
        "audiences": ["console"],
        "tenant": {"default": "acme"},
        "roles": {"claim": "sub", "values": {"ann@example.com": "generate"}},
    }
    with provider(sys.executable, "-W", "ignore", "-c", MOCK) as (issuer, _), trusted(site, issuer, **rules):
        tokens = [_log_in(issuer, "ann@example.com", client) for client in ("console", "other")]
        headers = {"authorization": f"Bearer {tokens[0]}"}
        poll(lambda: site.chat(headers).status_code == 200, 15, "the token is not taken")
        assert site.chat({"authorization": f"Bearer {tokens[1]}"}).status_code == 401
        assert site.chat({"authorization": f"Bearer {twisted(tokens[0])}"}).status_code == 401


def _log_in(issuer: str, subject: str, client_id: str) -> str:
    """Walk through the login of a browser; gives the ID token."""
    redirect = "http://127.0.0.1:1/back"
    asked = {"client_id": client_id, "redirect_uri": redirect, "response_type": "code", "scope": "openid email"}
    with httpx.Client(trust_env=False) as client:
        back = client.post(f"{issuer}/oauth2/authorize", params=asked, data={"sub": subject})
        code = parse_qs(urlsplit(back.headers["location"]).query)["code"][0]
        grant = {"grant_type": "authorization_code", "code": code, "redirect_uri": redirect}
        answer = client.post(f"{issuer}/oauth2/token", auth=(client_id, "any-secret"), data=grant)
    return str(answer.json()["id_token"])
