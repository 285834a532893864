"""Models that come and go on a real cluster, while clients ask: nobody who asks for what is there notices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from inferflux.cli.failure import Exit
from inferflux.engine.reference import NumericsReference, save
from inferflux.models import signing
from inferflux.models.manifest import REFERENCE
from tests.support.asking import asking as go_on_asking
from tests.support.cluster import Cluster, inferctl, new_home, poll
from tests.support.models import make_folder, sign

MODELS = "/v1/admin/models"
COMPLETIONS = "/v1/completions"
ENV = {
    "INFERFLUX_MODEL_SIGNATURE": "require",
    "INFERFLUX_WORKER_DEAD_S": "20",
    "INFERFLUX_WEDGE_S": "30",
}
ONE = {"prefill": 0, "decode": 1, "drain_s": 30, "stream": True}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    home = new_home()
    assert inferctl(home, "registry", "keygen").returncode == 0
    with Cluster.start(prefill=1, decode=1, env=ENV, home=home) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.url, headers=cluster.headers, timeout=60, trust_env=False) as client:
        yield client


def asking(client: httpx.Client, model: str | None, num_clients: int = 2) -> AbstractContextManager[list[Future[int]]]:
    """Clients of a model, or of the default one."""
    body = {"prompt": "Go on.", "max_tokens": 40, "temperature": 0} | ({"model": model} if model else {})
    return go_on_asking(client, COMPLETIONS, body, num_clients)


def load(client: httpx.Client, **spec: Any) -> list[dict[str, Any]]:
    """Load a model; returns everything that was said on the way."""
    with client.stream("POST", MODELS, json=ONE | spec) as response:
        response.raise_for_status()
        assert response.headers["content-type"] == "application/x-ndjson"
        return [json.loads(line) for line in response.iter_lines()]


def served(client: httpx.Client) -> dict[str, dict[str, Any]]:
    return {model["id"]: model for model in client.get("/v1/models").raise_for_status().json()["data"]}


def default_model(client: httpx.Client) -> str:
    return next(name for name, model in served(client).items() if model["is_default"])


def workers_of(cluster: Cluster, model: str) -> list[dict[str, Any]]:
    return [process for process in cluster.processes if process["model"] == model]


def signed_folder(home: Path, version: int, **fields: Any) -> Path:
    """A version of the model m, as large as nothing."""
    folder = make_folder(home / f"m-{version}", weights=bytes([version]) * 4096)
    sign(folder, home / "signing" / "release.key", version=version, **fields)
    return folder


def test_a_second_model_comes_becomes_the_default_and_the_first_one_goes(
    cluster: Cluster, client: httpx.Client
) -> None:
    """With clients of the default model all the time: no request fails, and both models have pools of their own."""
    with asking(client, None) as clients:
        said = load(client, model="second", prefill=1)
        assert (said[0]["state"], said[-1]["state"]) == ("loading", "ready")
        assert {(w["role"], w["state"]) for w in said[-1]["workers"]} == {("prefill", "ready"), ("decode", "ready")}
        assert default_model(client) == "sim"
        with asking(client, "second", 1) as others:
            client.put(MODELS + "/default", json={"model": "second"}).raise_for_status()
            poll(lambda: default_model(client) == "second", 10, "the default did not change")
            gone = client.request("DELETE", MODELS + "/sim", params={"stream": "true"}).raise_for_status()

    assert json.loads(gone.text.splitlines()[-1])["state"] == "unloaded"
    assert min(each.result() for each in (*clients, *others)) > 0
    assert workers_of(cluster, "sim") == []
    poll(lambda: set(served(client)) == {"second"}, 10, "the model is still listed")
    poll(lambda: client.post(COMPLETIONS, json={"model": "sim", "prompt": "x"}).status_code == 404, 10, "it is there")


def test_a_new_version_serves_when_it_is_proven_and_a_bad_one_never(cluster: Cluster, client: httpx.Client) -> None:
    """Signed versions 1 and 2, one with a changed file, and one that computes something else than it should."""
    first = load(client, model="m", source=str(signed_folder(cluster.home, 1)))
    assert first[-1]["state"] == "ready"
    poll(lambda: served(client).get("m", {}).get("version") == 1, 10, "version 1 is not listed")

    with asking(client, "m", 1) as clients:
        second = load(client, model="m", source=str(signed_folder(cluster.home, 2)))
        assert second[-1]["state"] == "ready"
        poll(lambda: served(client)["m"]["version"] == 2, 10, "version 2 does not serve")
        poll(lambda: len(workers_of(cluster, "m")) == 1, 30, "version 1 still has a worker")
        serving = workers_of(cluster, "m")[0]

        changed = shutil.copytree(cluster.home / "m-2", cluster.home / "changed")
        with (changed / "model.safetensors").open("r+b") as file:
            file.write(b"\xff")
        refused = load(client, model="m", source=str(changed))[-1]
        unproven = load(client, model="m", source=str(unproven_folder(cluster.home)))[-1]
        poll(lambda: len(workers_of(cluster, "m")) == 1, 30, "what was refused still has a worker")

    assert (refused["state"], unproven["state"]) == ("failed", "failed")
    assert "model.safetensors: not the file that was signed" in refused["error"]
    assert "greedy tokens" in unproven["error"]
    assert served(client)["m"]["version"] == 2
    assert [(w["id"], w["pid"]) for w in workers_of(cluster, "m")] == [(serving["id"], serving["pid"])]
    assert min(each.result() for each in clients) > 0


def unproven_folder(home: Path) -> Path:
    """Version 3, whose reference says what no engine computes."""
    folder, ids = make_folder(home / "m-3"), tuple(b"a reference")
    n = len(ids)
    save(NumericsReference("d", ids, (1,) * n, (0.0,) * n, (0.0,) * (n - 1), (1,)), folder / REFERENCE)
    return signed_folder(home, 3, numerics=REFERENCE)


def test_what_makes_no_sense_is_refused_before_anything_happens(client: httpx.Client) -> None:
    """With what is wrong; and the default model stays, as long as there are others."""
    unknown = client.post(MODELS, json={"model": "x", "settings": {"run_dir": "/tmp"}, "decode": 0})
    relative = client.post(MODELS, json={"model": "x", "source": "../x"})
    default = client.delete(f"{MODELS}/{default_model(client)}")

    assert [answer.status_code for answer in (unknown, relative, default)] == [400, 400, 409]
    assert all(word in unknown.json()["error"]["message"] for word in ("'run_dir'", "decode 0"))
    assert "neither an absolute path nor a name" in relative.json()["error"]["message"]
    assert client.delete(f"{MODELS}/nothing").status_code == 404
    assert client.put(f"{MODELS}/default", json={"model": "nothing"}).status_code == 404
    assert "x" not in served(client)


def test_inferctl_loads_lists_and_unloads(cluster: Cluster, client: httpx.Client) -> None:
    """As people do, with a setting that its workers show."""
    loaded = cluster.inferctl("models", "load", "third", "--prefill", "0", "--set", "max_model_len=512", "-o", "json")
    listed = json.loads(cluster.inferctl("models", "list", "-o", "json").stdout)["data"]
    chosen = cluster.inferctl("models", "default", "third")
    poll(lambda: default_model(client) == "third", 10, "the default did not change")
    back = cluster.inferctl("models", "default", "second")
    poll(lambda: default_model(client) == "second", 10, "the default did not change back")
    length = served(client)["third"]["max_model_len"]
    unloaded = cluster.inferctl("models", "unload", "third")
    refused = cluster.inferctl("models", "load", "bad", "--set", "run_dir=/tmp")

    assert [done.returncode for done in (loaded, chosen, back, unloaded)] == [Exit.OK] * 4, loaded.stderr
    assert (json.loads(loaded.stdout)["state"], length) == ("ready", 512)
    assert {m["id"]: m["state"] for m in listed}["third"] == "ready"
    assert (refused.returncode, "'run_dir'" in refused.stderr) == (Exit.FAILED, True)
    assert workers_of(cluster, "third") == []


# --- adapters ---------------------------------------------------------------------------------------------------------

ADAPTERS = "/v1/admin/adapters"


def adapter_folder(home: Path, name: str, weights: bytes) -> Path:
    """Files of an adapter, signed: the simulator computes with their digest."""
    folder = home / name
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "model.sig").unlink(missing_ok=True)
    signing.sign(folder, home / "signing" / "release.key")
    return folder


def say(client: httpx.Client, model: str, **headers: str) -> str:
    body = {"model": model, "prompt": "Once upon a time " * 20, "max_tokens": 12, "temperature": 0}
    answer = client.post(COMPLETIONS, json=body, headers=headers).raise_for_status().json()
    assert answer["model"] == model
    return answer["choices"][0]["text"]


def refusals(cluster: Cluster) -> list[str]:
    """What the gateway counted of KV that did not fit."""
    return [line for line in cluster.metrics("gateway").splitlines() if line.startswith("inferflux_kv_rejected_total{")]


def test_adapters_come_change_and_go_under_load(cluster: Cluster, client: httpx.Client) -> None:
    """Each version says something else, KV from prefill included, and nobody's request fails."""
    assert load(client, model="base", prefill=1, settings={"max_adapters": 2})[-1]["state"] == "ready"
    red, blue = (adapter_folder(cluster.home, name, name.encode()) for name in ("red", "blue"))
    made = cluster.inferctl("adapters", "load", "tuned", str(red), "--model", "base", "-o", "json")
    assert made.returncode == Exit.OK, made.stderr
    poll(lambda: served(client).get("tuned", {}).get("parent") == "base", 10, "the adapter is not listed")
    before = say(client, "tuned")

    with asking(client, "tuned") as tuned, asking(client, "base", 1) as base:
        changed = cluster.inferctl("adapters", "load", "tuned", str(blue), "--model", "base")
        after = say(client, "tuned")
        again = cluster.inferctl("adapters", "load", "tuned", str(red), "--model", "base")
        back = say(client, "tuned")

    assert (changed.returncode, again.returncode) == (Exit.OK, Exit.OK), changed.stderr + again.stderr
    assert min(each.result() for each in (*tuned, *base)) > 0
    assert (before == back, len({before, after, say(client, "base")})) == (True, 3)
    # While workers change one after the other, KV of one version may meet the other: then it is computed again.
    num_refused = refusals(cluster)
    assert say(client, "tuned") == before
    assert refusals(cluster) == num_refused
    gone = cluster.inferctl("adapters", "unload", "tuned")
    poll(lambda: "tuned" not in served(client), 10, "the adapter is still listed")
    assert (gone.returncode, client.post(COMPLETIONS, json={"model": "tuned", "prompt": "x"}).status_code) == (0, 404)


def test_an_adapter_is_its_tenants_and_must_be_signed(cluster: Cluster, client: httpx.Client) -> None:
    """For other tenants it does not exist; one whose files were changed is refused, with the file's name."""
    source = adapter_folder(cluster.home, "own", b"own")
    made = cluster.inferctl("adapters", "load", "own", str(source), "--model", "base", "--tenant", "acme")
    assert made.returncode == Exit.OK, made.stderr
    keys = {
        tenant: client.post(
            "/v1/admin/api_keys", json={"name": tenant, "scopes": ["generate"], "tenant": tenant}
        ).json()["secret"]
        for tenant in ("acme", "other")
    }
    acme, other = ({"authorization": f"Bearer {keys[tenant]}"} for tenant in ("acme", "other"))
    poll(lambda: "own" in client.get("/v1/models", headers=acme).text, 10, "the adapter is not listed")

    assert say(client, "own", **acme)
    assert '"own"' not in client.get("/v1/models", headers=other).text
    body = {"model": "own", "prompt": "x"}
    assert client.post(COMPLETIONS, json=body, headers=other).status_code == 404

    (source / "adapter_model.safetensors").write_bytes(b"changed")
    refused = cluster.inferctl("adapters", "load", "own", str(source), "--model", "base", "--tenant", "acme")
    assert refused.returncode == Exit.FAILED
    assert "adapter_model.safetensors: not the file that was signed" in refused.stderr
    assert say(client, "own", **acme)
    missing = client.post(ADAPTERS, json={"name": "x", "model": "nothing", "source": "/x"})
    relative = client.post(ADAPTERS, json={"name": "x", "model": "base", "source": "x"})
    assert (missing.status_code, relative.status_code) == (404, 400)
    cluster.inferctl("adapters", "unload", "own")
