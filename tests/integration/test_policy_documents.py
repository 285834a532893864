"""Policy documents through everything there is: real policy service, real store, and a gateway with its HTTP API."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from tests.support.cluster import poll
from tests.support.redis_server import RedisServer
from tests.support.service import Service, temporary_home

KEY = "ifx_admin-of-the-tests"
READER = "ifx_reader-of-the-tests"
ADMIN = {"authorization": f"Bearer {KEY}"}


class Plane:
    """Redis, a policy service and gateways, all real processes. No registry: nothing is inferred here."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.home = stack.enter_context(temporary_home())
        self.redis = stack.enter_context(RedisServer())
        keys = f"{KEY}:admin,{READER}:read"
        self.policy = self._run("services.policy", "policy-0", redis_url=self.redis.url, api_keys=keys)

    def gateway(self, number: int = 0, **settings: str) -> str:
        """Start one; returns its URL when it has a policy."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        nobody, settings = f"unix:{self.home}/registry.sock", {"http_port": str(port)} | settings
        addresses = {"policy_address": self.policy.address, "registry_address": nobody}
        gateway = self._run("services.gateway", f"gateway-{number}", **addresses, **settings)
        poll(lambda: "policy" not in gateway.readiness().get("reason", "policy"), 30, "the gateway has no policy")
        return f"http://127.0.0.1:{port}"

    def _run(self, module: str, name: str, **settings: str) -> Service:
        service = Service(module, name, self.home, settings)
        self._stack.callback(service.kill)
        return service.start()


@pytest.fixture(scope="module")
def plane() -> Iterator[Plane]:
    with ExitStack() as stack:
        yield Plane(stack)


@pytest.fixture(scope="module")
def url(plane: Plane) -> str:
    return plane.gateway()


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    """An administrator."""
    with httpx.Client(base_url=url, headers=ADMIN, timeout=20, trust_env=False) as client:
        yield client


def test_a_document_is_put_and_read(http):
    """The answer comes when this gateway uses it; the author is the key that was used."""
    made = http.put("/v1/admin/policy", json={"document": {"audit": {"sample": 0.5}}, "reason": "try"})
    state = http.get("/v1/admin/policy")

    assert made.status_code == 200
    assert made.json()["author"].startswith("key_")
    assert state.json() == made.json() | {"candidate": None, "newest": made.json()["revision"]}
    assert int(state.headers["x-inferflux-policy-rev"]) >= made.json()["revision"]


def test_a_wrong_document_is_refused_with_all_its_problems(http):
    """And nothing has changed."""
    before = http.get("/v1/admin/policy").json()["revision"]
    answer = http.put("/v1/admin/policy", json={"document": {"audit": {"sample": 2, "x": 1}, "y": 2}})

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "policy_invalid")
    for path in ("$.audit.sample", "$.audit.x", "$.y"):
        assert path in answer.json()["error"]["message"]
    assert http.get("/v1/admin/policy").json()["revision"] == before
