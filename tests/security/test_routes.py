"""Every route, method, role and tenant: what is let through is what the rules below say, and nothing else."""

from __future__ import annotations

import itertools

import pytest

from tests.security.site import PROMPT_CANARY, TENANTS, Visitor

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PURGE")
PUBLIC = {"/livez", "/readyz", "/healthz"}
MODELS = ("/v1/models", "/v1/models/{name}")


def needed(path: str) -> set[str]:
    """Scopes of which one is needed; empty: none. Written down anew, so that the gateway's own table can be wrong."""
    if path in PUBLIC:
        return set()
    if path == "/metrics":
        return {"read", "admin"}
    if path.startswith("/v1/admin/"):
        return {"admin"}
    if path in ("/v1/models", "/v1/models/{name:path}"):
        return {"read", "generate", "admin"}
    return {"generate", "admin"}


def expected(method: str, methods: set[str], path: str, visitor: Visitor) -> set[int]:
    """Return the statuses that a cell of the table may have."""
    if method not in methods:
        return {405}
    if path in PUBLIC:
        return {200}
    if visitor.scopes is None:
        return {401}
    if visitor.scopes.isdisjoint(needed(path)):
        return {403}
    return {200, 201, 202, 400, 404, 409}


def concrete(path: str) -> str:
    """Name things that are not there, so that nothing is drained, revoked or rolled back."""
    return "/".join("nobody-0" if part.startswith("{") else part for part in path.split("/"))


@pytest.mark.timeout(300)
def test_every_cell_of_the_table(site):
    """Live routes x methods x visitors of two tenants; all wrong cells are shown."""
    table: dict[str, set[str]] = {}
    for method, path in site.routes():
        table.setdefault(path, set()).add(method)
    assert len(table) > 35
    cells = list(itertools.product(sorted(table), METHODS, site.visitors.values()))
    wrong = []
    for path, method, visitor in cells:
        response = site.client.request(method, concrete(path), headers=visitor.headers, content=b"not json")
        if response.status_code not in expected(method, table[path], path, visitor):
            wrong.append((method, path, visitor.name, response.status_code))

    assert wrong == []
    assert len(cells) == len(table) * len(METHODS) * len(site.visitors) > 5000


def test_routes_have_one_spelling(site):
    """No second name of a path reaches what the first one guards, with any key."""
    for _, path in site.routes():
        name = concrete(path)
        for spelling in (
            name + "/",
            "/" + name,
            name.upper(),
            name.replace("/v1/", "/v1//"),
            name.replace("/v1/", "/v1/./"),
            name.replace("/v1/", "/x/../v1/"),
            name.replace("/v1/", "/v1%2f"),
            name.replace("/v1/", "/%76%31%2F"),
            name + "%00",
            name + "%20",
            name + ";a=b",
            name + "\\",
            name + "/..",
        ):
            if spelling == name or "models" in name or "{request_id}" in path:
                continue  # a model may have any name, and what follows a stream's path is its id
            target = {"target": spelling.encode()}  # as it is: clients know better than to send some of these
            response = site.client.get("/", headers=site.admin, extensions=target)
            assert response.status_code in {400, 404, 405}, spelling


@pytest.mark.parametrize("path", ["/invocations", "/docs", "/openapi.json", "/v1/load_lora_adapter", "/sleep", "/ping"])
def test_what_engines_also_serve_is_not_there(site, path):
    """Not for an administrator either."""
    for method in ("GET", "POST"):
        assert site.client.request(method, path, headers=site.admin, json={}).status_code == 404


# --- across tenants


@pytest.mark.parametrize(("owner", "thief"), [TENANTS, TENANTS[::-1]])
def test_streams_are_their_tenants_own(site, owner, thief):
    """For others, administrators among them, the stream does not exist."""
    mine, other = (site.visitors[f"generate of {tenant}"].headers for tenant in (owner, thief))
    admin = site.visitors[f"admin of {thief}"].headers
    response = site.chat(mine, stream=True, max_tokens=8)
    name = response.headers["x-request-id"]
    strange = "req_" + "0" * 24
    for headers in (other, admin):
        stolen, unknown = (site.client.get(f"/v1/streams/{i}", headers=headers) for i in (name, strange))
        assert stolen.status_code == unknown.status_code == 404
        assert stolen.text.replace(name, "") == unknown.text.replace(strange, "")


def test_an_idempotency_key_of_another_key_is_another_one(site):
    """Nobody gets somebody else's answer by guessing how it was asked for."""
    answers = [
        site.chat(visitor.headers | {"idempotency-key": "order-1"})
        for name, visitor in site.visitors.items()
        if name.startswith(("generate", "admin", "token"))
    ]

    assert {answer.status_code for answer in answers} == {200}
    assert not [answer for answer in answers if "idempotent-replayed" in answer.headers]


def test_nobody_but_an_administrator_makes_or_changes_keys(site):
    """Also not their own, also not with more in the body than there is."""
    mine = site.create_key(scopes=["generate"], tenant="acme")
    headers = {"authorization": f"Bearer {mine['secret']}"}
    for method, path, body in (
        ("POST", "/v1/admin/api_keys", {"name": "x", "scopes": ["admin"]}),
        ("POST", f"/v1/admin/api_keys/{mine['id']}/rotate", {}),
        ("DELETE", f"/v1/admin/api_keys/{mine['id']}", None),
        ("PUT", "/v1/admin/policy", {"document": {"identity": {"roles": {"generate": ["admin"]}}}}),
    ):
        assert site.client.request(method, path, headers=headers, json=body).status_code == 403


@pytest.mark.parametrize(
    "extra",
    [{"key_id": "key_0"}, {"id": "x"}, {"is_admin": True}, {"role": "admin"}, {"scope": "admin"}, {"revision": 1}],
)
def test_a_body_with_unknown_properties_is_refused(site, extra):
    """Rather than half understood."""
    body = {"name": "x", "scopes": ["read"]} | extra
    assert site.client.post("/v1/admin/api_keys", headers=site.admin, json=body).status_code == 400


# --- models


def test_a_model_that_a_key_may_not_use_is_not_there(site):
    """In the same words as one that nobody has; nor is it listed."""
    headers = {"authorization": f"Bearer {site.create_key(scopes=['admin'], models=['none-of-them'])['secret']}"}
    name = site.cluster.model
    forbidden, unknown = (site.chat(headers, model=model) for model in (name, "nobody"))

    assert (forbidden.status_code, unknown.status_code) == (404, 404)
    assert forbidden.text.replace(name, "?") == unknown.text.replace("nobody", "?")
    assert site.client.get("/v1/models", headers=headers).json()["data"] == []
    shown, missing = (site.client.get(f"/v1/models/{model}", headers=headers) for model in (name, "nobody"))
    assert shown.text.replace(name, "?") == missing.text.replace("nobody", "?")
    assert site.chat(headers).status_code == 404
    assert PROMPT_CANARY not in forbidden.text


def test_a_tenants_list_is_in_force_at_once(site):
    """For keys and tokens that are in use."""
    key, token = (site.visitors[f"{kind} of globex"].headers for kind in ("generate", "token"))
    try:
        assert site.apply(tenants={"globex": {"models": ["none-of-them"]}}).status_code == 200
        assert [site.chat(headers).status_code for headers in (key, token)] == [404, 404]
        assert site.chat(site.visitors["generate of acme"].headers).status_code == 200
    finally:
        assert site.apply().status_code == 200
    assert [site.chat(headers).status_code for headers in (key, token)] == [200, 200]


def test_a_role_that_loses_a_scope_loses_it_at_once(site):
    """Its keys need not be made anew."""
    headers = site.visitors["developer of acme"].headers
    try:
        assert site.apply(roles={"developer": ["read"]}).status_code == 200
        assert site.chat(headers).status_code == 403
    finally:
        assert site.apply().status_code == 200
    assert site.chat(headers).status_code == 200


# --- rotation


def test_a_rotated_key_has_two_secrets_for_a_while_and_then_one(site):
    """With a grace of nothing the old one is dead when the answer is there."""
    key = site.create_key(scopes=["generate"])
    secrets = [key["secret"]]
    for grace_s in (60, 0):
        response = site.client.post(
            f"/v1/admin/api_keys/{key['id']}/rotate", headers=site.admin, json={"grace_s": grace_s}
        )
        assert (response.status_code, response.json()["id"]) == (200, key["id"])
        secrets.append(response.json()["secret"])
        site.secrets.add(secrets[-1])
        statuses = [site.chat({"authorization": f"Bearer {secret}"}).status_code for secret in secrets]
        assert statuses == ([200, 200] if grace_s else [401, 401, 200])

    assert site.client.delete(f"/v1/admin/api_keys/{key['id']}", headers=site.admin).status_code == 200
    assert {site.chat({"authorization": f"Bearer {secret}"}).status_code for secret in secrets} == {401}
    for secret in secrets:
        response = site.client.post(
            "/v1/admin/api_keys", headers=site.admin, json={"name": "again", "scopes": ["read"], "secret": secret}
        )
        assert response.status_code == 409
