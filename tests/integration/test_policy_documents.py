"""Policy documents through everything there is: real policy service, real store, and a gateway with its HTTP API."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from tests.support.cluster import inferctl, poll
from tests.support.redis_server import RedisServer
from tests.support.service import Service, temporary_home

KEY = "ifx_admin-of-the-tests"
READER = "ifx_reader-of-the-tests"
ADMIN = {"authorization": f"Bearer {KEY}"}
CARDS = {"name": "cards", "kind": "pii", "types": ["credit_card"], "action": "redact"}


def answers(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/livez", trust_env=False).status_code == 200
    return False


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
        url = f"http://127.0.0.1:{port}"
        poll(lambda: "policy" not in gateway.readiness().get("reason", "policy"), 30, "the gateway has no policy")
        poll(lambda: answers(url), 30, "the gateway does not answer")
        return url

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


def applied(http: httpx.Client, document: dict[str, object], **terms: object) -> dict[str, object]:
    answer = http.put("/v1/admin/policy", json={"document": document, **terms})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_document_goes_through_shadow_and_canary_to_live_and_back(http):
    """Each step a revision; a change that does not know the newest one is refused."""
    first = applied(http, {"audit": {"sample": 0.1}})
    tried = applied(http, {"audit": {"sample": 0.2}}, stage="shadow", expected_revision=first["revision"])
    stale = http.put("/v1/admin/policy", json={"document": {}, "expected_revision": first["revision"]})
    canary = http.post("/v1/admin/policy/promote", json={"stage": "canary", "share": 0.25}).json()
    state = http.get("/v1/admin/policy").json()
    live = http.post("/v1/admin/policy/promote", json={"expected_revision": canary["revision"]}).json()
    back = http.post("/v1/admin/policy/rollback", json={"revision": first["revision"], "reason": "slow"}).json()
    listed = http.get("/v1/admin/policy/revisions?limit=2").json()["data"]

    assert stale.status_code == 409
    assert (state["revision"], state["candidate"]["revision"]) == (first["revision"], canary["revision"])
    assert (canary["share"], canary["document"]) == (0.25, tried["document"])
    assert (live["stage"], live["document"], back["document"]) == ("live", tried["document"], first["document"])
    assert [revision["revision"] for revision in listed] == [back["revision"], live["revision"]]
    assert [change["path"] for change in listed[0]["changes"]] == ["$.audit.sample"]
    assert http.post("/v1/admin/policy/promote", json={}).status_code == 409
    assert http.get("/v1/admin/policy/revisions/1").status_code == 404


def test_parts_of_the_document_have_addresses_of_their_own(http):
    """They are views: what they change is a new revision of the whole."""
    before = applied(http, {"audit": {"sample": 0.1}})
    put = http.put("/v1/admin/guardrails", json={"value": {}, "expected_revision": before["revision"]})
    stale = http.put("/v1/admin/guardrails", json={"value": {}, "expected_revision": before["revision"]})
    wrong = http.put("/v1/admin/rate_limit", json={"value": {"no such limit": 1}})
    document = http.get("/v1/admin/policy").json()["document"]
    deleted = http.delete("/v1/admin/guardrails").json()

    assert (put.status_code, stale.status_code) == (200, 409)
    assert (wrong.status_code, "$.limits.rate_limit" in wrong.json()["error"]["message"]) == (400, True)
    assert document == {"audit": {"sample": 0.1}, "guardrails": {}}
    assert http.get("/v1/admin/guardrails").json()["value"] is None
    assert http.get("/v1/admin/policy").json()["revision"] == deleted["revision"]


def test_gateways_report_what_they_use(http):
    """And are not behind for long."""
    made = applied(http, {"audit": {"sample": 0.3}})

    def is_reported() -> bool:
        replicas = http.get("/v1/admin/policy/status").json()["data"]
        return any(r["policy_revision"] == made["revision"] and r["lag_s"] == 0 for r in replicas)

    poll(is_reported, 20, "the gateway has not reported the revision")


def test_only_administrators_reach_the_policy(http):
    """Nor do readers."""
    reader = {"authorization": f"Bearer {READER}"}
    for path in ("policy", "policy/revisions", "policy/status", "guardrails", "rate_limit", "budgets", "audit"):
        assert http.get(f"/v1/admin/{path}", headers=reader).status_code == 403


def run(url: str, home: Path, *arguments: str, key: str = KEY) -> subprocess.CompletedProcess[str]:
    return inferctl(home, *arguments, INFERCTL_URL=url, INFERCTL_API_KEY=key)


def test_inferctl_applies_compares_lists_and_rolls_back(http, url, plane, tmp_path):
    """As an administrator at his terminal does it."""
    file = tmp_path / "policy.toml"
    file.write_text("[audit]\nsample = 0.25\n")
    first = json.loads(run(url, plane.home, "policy", "apply", str(file), "--reason", "one", "-o", "json").stdout)
    file.write_text("[audit]\nsample = 0.75\n")
    difference = json.loads(run(url, plane.home, "policy", "diff", str(file), "-o", "json").stdout)["data"]
    run(url, plane.home, "policy", "apply", str(file), "--expect", str(first["revision"]))
    stale = run(url, plane.home, "policy", "apply", str(file), "--expect", str(first["revision"]))
    back = json.loads(run(url, plane.home, "policy", "rollback", "-o", "json").stdout)
    history = run(url, plane.home, "policy", "history", "-n", "3")
    file.write_text("[audit]\nsample = 7\nmore = 1\n")
    wrong = run(url, plane.home, "policy", "validate", str(file))

    assert difference == [{"path": "$.audit.sample", "kind": "changed", "before": 0.25, "after": 0.75}]
    assert (stale.returncode, "409" in stale.stderr) == (1, True)
    assert (back["document"], back["stage"]) == (first["document"], "live")
    assert str(back["revision"]) in history.stdout
    assert wrong.returncode == 1
    assert "$.audit.sample" in wrong.stderr
    assert "$.audit.more" in wrong.stderr
    assert run(url, plane.home, "policy", "get", key=READER).returncode == 4
    assert "gateway-0" in run(url, plane.home, "policy", "status").stdout


def test_inferctl_simulates_a_draft_on_recorded_traffic(http, url, plane, tmp_path):
    """Beside what is in force, which stays; records come from the audit log or from a file of its lines."""
    live = applied(http, {"guardrails": {"rules": [CARDS]}})
    draft, traffic = tmp_path / "draft.json", tmp_path / "traffic.jsonl"
    draft.write_text(json.dumps({"guardrails": {"rules": [CARDS | {"action": "block"}]}}))
    records = [record(f"card {number}", n) for n, number in enumerate(("4111111111111111", "none", "none"))]
    lines = [json.dumps(records[0]), json.dumps({"record": records[1], "hash": "x"}), json.dumps(records[2])]
    traffic.write_text("\n".join(lines))
    arguments = ("policy", "simulate", str(draft), "--traffic", str(traffic))
    found = json.loads(run(url, plane.home, *arguments, "-o", "json").stdout)
    shown = run(url, plane.home, *arguments)
    empty = run(url, plane.home, "policy", "simulate", str(draft), "--since", "2999-01-01T00:00:00")
    wrong = http.post("/v1/admin/policy/simulate", json={"document": {"x": 1}, "records": records})
    no_candidate = http.post("/v1/admin/policy/simulate", json={"records": records})

    counts = {"changed": 1, "newly_refused": 1, "newly_allowed": 0, "newly_redacted": 0}
    assert found["summary"] == {"records": 3, "without_text": 0} | counts
    (change,) = found["changes"]
    assert (change["request_id"], change["before"]["is_redacted"]) == ("req_0", True)
    assert change["after"]["refusal"] == "CONTENT_POLICY_VIOLATION"
    assert "req_0" in shown.stdout
    assert (empty.returncode, "no recorded requests" in empty.stderr) == (1, True)
    assert (wrong.status_code, no_candidate.status_code) == (400, 409)
    assert http.get("/v1/admin/policy").json()["revision"] == live["revision"]


def record(text: str, number: int) -> dict[str, object]:
    """What the audit log keeps of a request with debug_mode."""
    body = json.dumps({"messages": [{"role": "user", "content": text}]})
    who = {"tenant": "acme", "key_id": "key_1", "model": "tiny", "path": "/v1/chat/completions"}
    at = f"2026-01-02T00:00:0{number}+00:00"
    return who | {"kind": "request", "request_id": f"req_{number}", "at": at, "status": 200, "prompt": body}


def test_inferctl_searches_and_verifies_the_audit_log(http, url, plane):
    """What was done is there, bound and signed; one changed byte is found at its line."""
    made = http.put("/v1/admin/policy", json={"document": {}})
    request_id = made.headers["x-request-id"]

    def is_found() -> bool:
        return request_id in run(url, plane.home, "audit", "search", "--request", request_id).stdout

    poll(is_found, 20, "the action is not in the audit log")
    assert run(url, plane.home, "audit", "tail", "-n", "5").returncode == 0
    good = run(url, plane.home, "audit", "verify")
    assert (good.returncode, "policy-0" in good.stderr) == (0, True)

    (log,) = (plane.home / "audit").glob("policy-0-*.jsonl")
    copy = plane.home / "copy"
    shutil.copytree(log.parent, copy)
    lines = (copy / log.name).read_bytes().splitlines(keepends=True)
    (copy / log.name).write_bytes(b"".join([lines[0], lines[1].replace(b"admin", b"nimda"), *lines[2:]]))
    bad = run(url, plane.home, "audit", "verify", str(copy))
    shutil.rmtree(copy)

    assert bad.returncode == 1
    assert f"{log.name}:2" in bad.stderr


def test_nothing_of_a_document_is_in_any_file(http, plane):
    """Neither in Redis's, nor in logs, nor in the audit log; and no process was told it on its command line."""
    canary = "canary-in-a-policy"
    answer = http.put("/v1/admin/policy", json={"document": {"audit": {}}, "reason": canary})
    wrong = http.put("/v1/admin/policy", json={"document": {"audit": {"sample": canary}}, "reason": canary})
    assert (answer.status_code, wrong.status_code) == (200, 400)
    files = [
        path for root in (plane.home, plane.redis.socket_path.parent) for path in root.rglob("*") if path.is_file()
    ]

    assert any(path.suffix == ".aof" for path in files)
    assert [path for path in files if canary.encode() in path.read_bytes()] == []
