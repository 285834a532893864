from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from inferflux.cli.plan import STOP_ORDER, ClusterOptions, EmbeddingModel, plan
from inferflux.errors import ConfigError
from inferflux.paths import Home

HOME = Home(Path("/tmp/ifx-plan"))
OPTIONS = ClusterOptions("vllm", "tiny", model_dir="/models/tiny", model_digest="d1", prefill=1, decode=2, port=9)


def make(options: ClusterOptions = OPTIONS, home: Home = HOME, **environ: str):
    return {spec.id: spec for spec in plan(options, home, [0, 1, 2, 3], environ)}


def test_every_role_runs_and_stops():
    """One process per service, the workers that were asked for, and each of them is in the stop order."""
    specs = make()

    assert list(specs) == ["redis-0", "policy-0", "registry-0", "prefill-0", "decode-0", "decode-1", "gateway-0"]
    with_embedding = make(replace(OPTIONS, pooling=1, embedding=EmbeddingModel("vectors")))
    assert with_embedding.keys() - specs.keys() == {"pooling-0"}
    assert {s.role for s in with_embedding.values()} == {role for roles in STOP_ORDER for role in roles}


def test_gateways_are_equals_on_ports_one_after_the_other():
    """Each gateway has an id and a port of its own, and nothing else of its own."""
    specs = make(replace(OPTIONS, gateways=2))

    assert [specs[f"gateway-{i}"].env["INFERFLUX_HTTP_PORT"] for i in range(2)] == ["9", "10"]
    assert replace(OPTIONS, gateways=2).urls == ("http://127.0.0.1:9", "http://127.0.0.1:10")


def test_an_outside_redis_is_used_and_kept_private():
    """With INFERFLUX_REDIS_URL no server is started, and only the two services that use it see the URL."""
    specs = make(INFERFLUX_REDIS_URL="rediss://:secret@db:6379")

    assert "redis-0" not in specs
    knowing = {name for name, spec in specs.items() if "INFERFLUX_REDIS_URL" in spec.env}
    assert knowing == {"policy-0", "registry-0"}


def test_api_keys_reach_only_the_policy_service():
    """The keys of the environment, ours and the client's, are not handed around."""
    specs = make(INFERFLUX_API_KEYS="abcdefgh:admin", INFERCTL_API_KEY="ifx_mine")

    assert {name for name, s in specs.items() if "INFERFLUX_API_KEYS" in s.env} == {"policy-0"}
    assert not [name for name, s in specs.items() if "INFERCTL_API_KEY" in s.env]


def test_workers_know_model_cores_and_threads():
    """A worker gets its model, its cores, and as many threads as cores, for OpenMP too."""
    env = make()["decode-1"].env

    assert env["INFERFLUX_MODEL_DIR"] == "/models/tiny"
    assert env["INFERFLUX_MODEL_DIGEST"] == "d1"
    assert (env["INFERFLUX_CPU_CORES"], env["INFERFLUX_THREADS"], env["OMP_NUM_THREADS"]) == ("3", "1", "1")
    assert make()["prefill-0"].env["INFERFLUX_CPU_CORES"] == "0,1"


def test_the_users_sizes_win():
    """Sizes in the environment override our defaults; names and addresses don't."""
    env = make(INFERFLUX_KV_CACHE_BYTES="12345", INFERFLUX_BIND="unix:/evil", INFERFLUX_THREADS="2")["decode-0"].env

    assert (env["INFERFLUX_KV_CACHE_BYTES"], env["OMP_NUM_THREADS"]) == ("12345", "2")
    assert env["INFERFLUX_BIND"] == HOME.socket("decode-0")


def test_the_simulator_is_not_pinned():
    """Sim workers sleep instead of computing, so they get no cores of their own."""
    specs = make(ClusterOptions("sim", "sim"))

    assert specs["prefill-0"].env["INFERFLUX_CPU_CORES"] == ""


def test_a_home_too_deep_for_sockets_is_refused():
    """A path that no unix socket can have is an error before anything starts."""
    with pytest.raises(ConfigError, match="too long"):
        make(home=Home(Path("/tmp/" + "x" * 100)))


def test_options_survive_their_json():
    """What the state file keeps comes back; keys of another version are ignored."""
    assert ClusterOptions.from_json({**OPTIONS.to_json(), "later": 1}) == OPTIONS


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:9"),  # noqa: S104 - nothing is bound
        ("::", "http://[::1]:9"),
        ("10.0.0.7", "http://10.0.0.7:9"),
    ],
)
def test_the_url_can_be_connected_to(host, url):
    """A wildcard address is not something to connect to."""
    assert ClusterOptions("sim", "sim", host=host, port=9).url == url
