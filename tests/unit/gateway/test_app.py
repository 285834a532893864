"""Every route there is, with every method and every kind of key. No worker, no other service: nothing gets that far."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import httpx
import pytest

from inferflux.clock import ManualClock
from inferflux.errors import Conflict
from inferflux.lifecycle import Lifecycle
from services.gateway.admin import AdminApi
from services.gateway.app import Doorway, Gate, create_app
from services.gateway.audit_api import AuditApi
from services.gateway.auth import Authenticator, Key, KeyRing, Principal, hash_secret
from services.gateway.cache import CacheApi
from services.gateway.endpoints import ENDPOINTS, Scope
from services.gateway.envelope import BodyLimits
from services.gateway.fleet import Fleet
from services.gateway.fleet_api import FleetApi
from services.gateway.guardrails.referees import Referees
from services.gateway.idempotency import Idempotency, RecordLimits, Records
from services.gateway.inference import Inference
from services.gateway.matrix import Matrix
from services.gateway.news import News
from services.gateway.policy import Policies
from services.gateway.policy_api import PolicyApi
from services.gateway.policy_documents import PolicyRevision, PolicyState
from services.gateway.policy_views import PolicyViews
from services.gateway.pool import Pool, Terms
from services.gateway.rehearsal_api import RehearsalApi
from services.gateway.reservations import Reservations
from services.gateway.routing import LocalPrefill
from services.gateway.views import Model

PEPPER = b"p" * 32
SECRETS = {scope: f"key-with-{scope}" for scope in Scope}
REVISION = PolicyRevision(0, b"{}", "", "", datetime.fromtimestamp(0, UTC), "live", 0, 0)
PUBLIC = {"/livez", "/readyz", "/healthz"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")
MODEL = Model("tiny", "d", "float32", 2048, ("chat",), 1, is_default=True)


class Policy:
    """A policy service that has nothing."""

    async def list_keys(self):
        return [], 7

    async def create_key(self, key):
        raise Conflict("no new keys here")

    async def rotate_key(self, key_id, grace_s, secret):
        raise Conflict("no new secrets here")

    async def revoke_key(self, key_id):
        return 8


class Documents:
    """A policy service without a document."""

    async def get(self):
        return PolicyState(REVISION, None, 0)

    async def apply(self, change):
        raise Conflict("no changes here")

    async def history(self, limit):
        return [REVISION]

    async def revision(self, number):
        return REVISION

    async def replicas(self):
        return 7, []

    async def search(self, fields, since, most):
        return []


def key_ring() -> KeyRing:
    principals = {scope: Principal(f"key_{scope}", "default", frozenset({scope})) for scope in Scope}
    hashes = {scope: hash_secret(PEPPER, secret.encode()) for scope, secret in SECRETS.items()}
    return KeyRing(7, {hashes[scope]: Key(hashes[scope], principals[scope]) for scope in Scope})


async def never(_revision: int, _timeout_s: float) -> bool:
    return False


@pytest.fixture
def app() -> Doorway:
    ring = key_ring()
    inference = Inference(
        auth=Authenticator(PEPPER, lambda: ring),
        pool=Pool(caller=None, tasks=None, terms=Terms(1, 1, 1, LocalPrefill())),
        policies=lambda: Policies(ring.revision, ring),
        reservations=Reservations(shares=None),
        limits=BodyLimits(),
        timeout_s=5,
        access_log=None,
    )
    idempotency = Idempotency(inference, Records(ManualClock(), RecordLimits(1, 1)), tasks=None)
    admin = AdminApi(Policy(), never, FleetApi(Fleet(lambda: ())), Matrix(lambda: (), News()))
    apis = PolicyApi(Documents(), never), PolicyViews(Documents(), never), AuditApi(Documents())
    cache = CacheApi(inference.auth, inference.pool, str)
    return create_app(
        idempotency,
        (admin, cache, RehearsalApi(inference.policies, Referees()), *apis),
        lambda *_: (MODEL,),
        Lifecycle("gateway", "g"),
    )


@pytest.fixture
async def client(app: Doorway) -> AsyncIterator[httpx.AsyncClient]:
    """A client from elsewhere."""
    async with client_at(app, "192.0.2.7") as client:
        yield client


def client_at(app: Doorway, host: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, client=(host, 1), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://gateway")


def bearer(scope: Scope) -> dict[str, str]:
    return {"authorization": f"Bearer {SECRETS[scope]}"}


def concrete(path: str) -> str:
    named = path.replace("{key_id}", "key_1").replace("{worker_id}", "decode-0").replace("{revision}", "7")
    return named.replace("{name:path}", "tiny").replace("{name}", "system")


ALL_PATHS = (
    *sorted(PUBLIC),
    "/metrics",
    "/v1/models",
    "/v1/models/tiny",
    "/v1/admin/api_keys",
    "/v1/admin/api_keys/key_1",
    "/v1/admin/api_keys/key_1/rotate",
    "/v1/admin/workers",
    "/v1/admin/workers/decode-0",
    "/v1/admin/workers/decode-0/drain",
    "/v1/admin/tickets",
    "/v1/admin/paths",
    "/v1/admin/policy",
    "/v1/admin/policy/revisions",
    "/v1/admin/policy/revisions/7",
    "/v1/admin/policy/validate",
    "/v1/admin/policy/simulate",
    "/v1/admin/policy/promote",
    "/v1/admin/policy/rollback",
    "/v1/admin/policy/status",
    "/v1/admin/guardrails",
    "/v1/admin/rate_limit",
    "/v1/admin/budgets",
    "/v1/admin/audit",
    "/v1/admin/cache",
    "/v1/admin/cache/warm",
    "/v1/admin/cache/pins",
    "/v1/admin/cache/pins/system",
    *ENDPOINTS,
)


def test_the_walk_below_knows_every_route(app):
    """A new route must be added to it."""
    paths = {concrete(route.path) for route in app.app.routes}

    assert paths | set(ENDPOINTS) == set(ALL_PATHS)


def test_every_route_is_public_or_gated(app):
    """Whoever adds a route without a gate is stopped here."""
    for route in app.app.routes:
        gates = [dependency for dependency in route.dependencies if isinstance(dependency.dependency, Gate)]

        assert (route.path in PUBLIC) != bool(gates), route.path


@pytest.mark.parametrize("path", ALL_PATHS)
async def test_nothing_but_health_answers_without_a_key(client, path):
    """Whatever the method, the spelling of the path, or the credentials of another kind."""
    bad = (
        {},
        {"authorization": "Bearer not-a-key-at-all"},
        {"authorization": "Basic a2V5OmtleQ=="},
        {"x-api-key": "x"},
    )
    for method in METHODS:
        for headers in bad:
            response = await client.request(method, path, headers=headers)
            if path in PUBLIC:
                assert response.status_code in {200, 503, 405}
            else:
                assert response.status_code in {401, 405}, (method, headers)
                assert response.status_code == 405 or response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ALL_PATHS)
async def test_other_spellings_of_a_path_are_not_there(client, path):
    """No redirect, no second name that a filter in front of us might not know."""
    encoded = ("/%" + f"{ord(path[1]):02x}" + path[2:], path[:-1] + f"%{ord(path[-1]):02X}", path.replace("/", "%2f"))
    for spelling in (path + "/", "/" + path, path.upper(), path + ";x", path + "%00", *encoded):
        if path.startswith("/v1/models/"):  # a model may have any name
            continue
        response = await client.post(f"http://gateway{spelling}", headers=bearer(Scope.ADMIN))

        assert response.status_code in {404, 405}, spelling


async def test_a_models_name_may_be_written_with_escapes(client):
    """Clients escape the slash in it, or don't."""
    for spelling in ("tiny", "%74iny"):
        assert (await client.get(f"/v1/models/{spelling}", headers=bearer(Scope.READ))).status_code == 200
    for spelling in ("org/tiny", "org%2Ftiny"):
        response = await client.get(f"/v1/models/{spelling}", headers=bearer(Scope.READ))
        assert "org/tiny" in response.json()["error"]["message"]


NEEDS = {
    "/metrics": {Scope.READ},
    "/v1/models": {Scope.READ, Scope.GENERATE},
    "/v1/models/tiny": {Scope.READ, Scope.GENERATE},
    "/v1/admin/api_keys": set(),
    "/v1/admin/api_keys/key_1": set(),
    "/v1/admin/api_keys/key_1/rotate": set(),
    "/v1/admin/workers": set(),
    "/v1/admin/workers/decode-0": set(),
    "/v1/admin/workers/decode-0/drain": set(),
    "/v1/admin/tickets": set(),
    "/v1/admin/paths": set(),
    "/v1/admin/policy": set(),
    "/v1/admin/policy/revisions": set(),
    "/v1/admin/policy/revisions/7": set(),
    "/v1/admin/policy/validate": set(),
    "/v1/admin/policy/simulate": set(),
    "/v1/admin/policy/promote": set(),
    "/v1/admin/policy/rollback": set(),
    "/v1/admin/policy/status": set(),
    "/v1/admin/guardrails": set(),
    "/v1/admin/rate_limit": set(),
    "/v1/admin/budgets": set(),
    "/v1/admin/audit": set(),
} | {path: {Scope.GENERATE} for path in ENDPOINTS}


@pytest.mark.parametrize("path", NEEDS)
async def test_each_route_takes_exactly_its_scopes(client, path):
    """403 for the others, and for nobody else; ADMIN may do everything."""
    posts = ("drain", "rotate", "validate", "simulate", "promote", "rollback")
    method = "POST" if path in ENDPOINTS or path.endswith(posts) else "DELETE" if path.endswith("key_1") else "GET"
    for scope in Scope:
        response = await client.request(method, path, headers=bearer(scope), content=b"not json")

        is_allowed = scope is Scope.ADMIN or scope in NEEDS[path]
        assert (response.status_code == 403) == (not is_allowed), scope
        assert response.status_code != 401
        if not is_allowed:
            assert response.json()["error"]["type"] == "permission_error"


async def test_metrics_are_open_to_this_machine_only(app):
    """Headers that claim to come from here do not help."""
    async with (
        client_at(app, "127.0.0.1") as local,
        client_at(app, "::1") as local6,
        client_at(app, "192.0.2.7") as far,
    ):
        assert (await local.get("/metrics")).status_code == 200
        assert (await local6.get("/metrics")).status_code == 200
        for name in ("x-forwarded-for", "x-real-ip", "forwarded", "host"):
            assert (await far.get("/metrics", headers={name: "127.0.0.1"})).status_code == 401
        assert (await far.get("/metrics", headers=bearer(Scope.READ))).status_code == 200


@pytest.mark.parametrize("name", ["Forwarded", "X-Forwarded-For", "Via"])
async def test_metrics_are_not_open_to_what_a_proxy_on_this_machine_passes_on(app, name):
    """Whatever the header says: the sender is not the proxy. With a key it is welcome."""
    async with client_at(app, "127.0.0.1") as proxy:
        for value in ("127.0.0.1", ""):
            assert (await proxy.get("/metrics", headers={name: value})).status_code == 401
        assert (await proxy.get("/metrics", headers={name: "192.0.2.7"} | bearer(Scope.READ))).status_code == 200


async def test_405_says_what_is_allowed(client):
    """On both sides of the doorway."""
    chat = await client.get("/v1/chat/completions", headers=bearer(Scope.ADMIN))
    models = await client.post("/v1/models", headers=bearer(Scope.ADMIN))

    assert (chat.status_code, chat.headers["allow"]) == (405, "POST")
    assert (models.status_code, models.headers["allow"]) == (405, "GET")
    assert chat.json()["error"]["code"] == models.json()["error"]["code"] == "method_not_allowed"


async def test_every_response_has_an_id_and_the_policy_revision(client):
    """Ids are never the same twice, whatever the client sends."""
    ids = set()
    for path in ("/livez", "/nowhere", "/v1/models", "/v1/chat/completions"):
        response = await client.get(path, headers={"x-request-id": "mine"})
        ids.add(response.headers["x-request-id"])
        assert response.headers["x-inferflux-policy-rev"] == "7"

    assert len(ids) == 4
    assert "mine" not in ids


async def test_unknown_paths_have_the_same_error_shape(client):
    """Clients parse one shape."""
    response = await client.get("/v1/files")

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


async def test_errors_of_other_services_keep_their_meaning(client):
    """A conflict in the policy service is a 409 here."""
    body = {"name": "x", "scopes": ["read"]}
    response = await client.post("/v1/admin/api_keys", json=body, headers=bearer(Scope.ADMIN))

    assert (response.status_code, response.json()["error"]["message"]) == (409, "no new keys here")


async def test_unknown_workers_are_not_found(client):
    """And the answer says which there are."""
    for method, path in (("GET", ""), ("POST", "/drain")):
        response = await client.request(method, f"/v1/admin/workers/decode-7{path}", headers=bearer(Scope.ADMIN))

        assert response.status_code == 404
        assert "decode-7" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("query", "param"),
    [("live=perhaps", "live"), ("limit=0", "limit"), ("limit=1001", "limit"), ("limit=x", "limit"), ("a=1", "a")],
)
async def test_queries_for_tickets_that_make_no_sense_are_refused(client, query, param):
    """With the name of what is wrong."""
    response = await client.get(f"/v1/admin/tickets?{query}", headers=bearer(Scope.ADMIN))

    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("body", [b"[]", b'{"drain_s": -1}', b'{"drain_s": "1"}', b'{"soon": true}', b"{"])
async def test_drains_that_make_no_sense_are_refused(client, body):
    """Before any worker hears of them."""
    response = await client.post("/v1/admin/workers/decode-0/drain", content=body, headers=bearer(Scope.ADMIN))

    assert response.status_code == 400


async def test_no_tickets_are_balanced(client):
    """A cluster without prefill workers has nothing to account for."""
    response = await client.get("/v1/admin/tickets?live=true", headers=bearer(Scope.ADMIN))

    document = response.json()
    assert (document["data"], document["workers"], document["balanced"]) == ([], [], True)


async def test_admin_bodies_are_small(client):
    """An administrator's key is no licence to fill our memory."""
    response = await client.post("/v1/admin/api_keys", content=b" " * 100_000, headers=bearer(Scope.ADMIN))

    assert response.status_code == 413
