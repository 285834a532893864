"""The cluster that is attacked, and everybody who may or may not use it."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.support.cluster import Cluster, poll
from tests.support.issuer import TokenIssuer, running_issuer

CHAT = "/v1/chat/completions"
TENANTS = ("acme", "globex")
ALL = frozenset({"generate", "read", "admin"})
# In everything that clients send and nobody may write down.
PROMPT_CANARY = f"prompt-{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class Visitor:
    """Somebody with, or without, a credential. `scopes` None: the credential is no good."""

    name: str
    credential: str = field(repr=False)
    scopes: frozenset[str] | None
    tenant: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.credential}"} if self.credential else {}


def issuer_rules(issuer: TokenIssuer, **rules: Any) -> dict[str, Any]:
    """What the policy says of our issuer."""
    mapping = {
        "tenant": {"claim": "org", "values": {f"o-{tenant}": tenant for tenant in TENANTS}},
        "roles": {"claim": "groups", "values": {"users": "generate", "staff": "developer", "admins": "admin"}},
        "blocked_subjects": ["mallory"],
    }
    return {"issuer": issuer.url, "audiences": ["inferflux"], "network": "loopback"} | mapping | rules


@dataclass(slots=True)
class Site:
    """A running cluster, its issuer, and its visitors by name."""

    cluster: Cluster
    issuer: TokenIssuer
    client: httpx.Client
    visitors: dict[str, Visitor] = field(default_factory=dict)
    secrets: set[str] = field(default_factory=set)

    @property
    def admin(self) -> dict[str, str]:
        """Authenticate as the administrator."""
        return self.cluster.headers

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.cluster.url)
        return url.host, url.port or 80

    def apply(self, **identity: Any) -> httpx.Response:
        """Put a policy in force that has our tenants and roles and, unless told otherwise, our issuer."""
        document = {"roles": {"developer": ["generate", "read"]}, "issuers": [issuer_rules(self.issuer)]} | identity
        return self.client.put("/v1/admin/policy", headers=self.admin, json={"document": {"identity": document}})

    def create_key(self, **body: Any) -> dict[str, Any]:
        """Make a key."""
        response = self.client.post("/v1/admin/api_keys", headers=self.admin, json={"name": "test"} | body)
        assert response.status_code == 201, response.text
        self.secrets.add(response.json()["secret"])
        return response.json()

    def token(self, tenant: str, *groups: str, **claims: Any) -> str:
        """Make a good token."""
        token = self.issuer.token(org=f"o-{tenant}", groups=list(groups), **claims)
        self.secrets.add(token)
        return token

    def chat(self, headers: dict[str, str], **fields: Any) -> httpx.Response:
        """Ask for two tokens."""
        body = {"messages": [{"role": "user", "content": PROMPT_CANARY}], "max_tokens": 2} | fields
        return self.client.post(CHAT, headers=headers, json=body)

    def routes(self) -> list[tuple[str, str]]:
        """Method and path of every route, as the gateway has them."""
        lines = (json.loads(line) for line in self.cluster.log("gateway").splitlines() if '"routes"' in line)
        table = next(line["routes"] for line in lines if "routes" in line)
        return [tuple(entry.split(" ", 1)) for entry in table]

    def prepare(self) -> None:
        """Make everybody."""
        assert self.apply().status_code == 200
        for tenant in TENANTS:
            for name, scopes, body in (
                ("generate", {"generate"}, {"scopes": ["generate"]}),
                ("read", {"read"}, {"scopes": ["read"]}),
                ("admin", ALL, {"scopes": ["admin"]}),
                ("developer", {"generate", "read"}, {"roles": ["developer"], "team": "red"}),
                ("nothing", set(), {"roles": ["nobody-defined-this"]}),
            ):
                secret = self.create_key(tenant=tenant, **body)["secret"]
                self._admit(f"{name} of {tenant}", secret, frozenset(scopes), tenant)
            self._admit(f"token of {tenant}", self.token(tenant, "users"), frozenset({"generate"}), tenant)
        revoked = self.create_key(tenant="acme", scopes=["admin"])
        assert self.client.delete(f"/v1/admin/api_keys/{revoked['id']}", headers=self.admin).status_code == 200
        short = self.create_key(tenant="acme", scopes=["admin"], expires_at=int(time.time()) + 2)
        self._admit("nobody", "", None)
        self._admit("a stranger", "ifx_" + "x" * 43, None)
        self._admit("a revoked key", revoked["secret"], None)
        self._admit("an expired key", short["secret"], None)
        self._admit("a token of nobody", self.token("nowhere", "admins"), frozenset())
        expired = self.visitors["an expired key"].headers
        poll(lambda: self.client.get("/v1/models", headers=expired).status_code == 401, 10, "still good")

    def _admit(self, name: str, credential: str, scopes: frozenset[str] | None, tenant: str = "") -> None:
        self.visitors[name] = Visitor(name, credential, scopes, tenant)


@contextmanager
def running_site() -> Iterator[Site]:
    """Start all of it."""
    env = {"INFERFLUX_LOG_LEVEL": "DEBUG", "INFERFLUX_SLOW_CLIENT_S": "2", "INFERFLUX_MAX_BODY_BYTES": str(32 << 20)}
    with running_issuer() as issuer, Cluster.start(prefill=1, decode=1, env=env) as cluster:
        # As if through a proxy: what is open to this machine alone is not open to us.
        headers = {"x-forwarded-for": "192.0.2.7"}
        with httpx.Client(base_url=cluster.url, timeout=30, trust_env=False, headers=headers) as client:
            site = Site(cluster, issuer, client, secrets={cluster.api_key})
            site.prepare()
            yield site
