from __future__ import annotations

import os
from pathlib import Path

import pytest

from inferflux.config import load
from inferflux.engine.options import Parallelism
from inferflux.errors import ConfigError
from inferflux.types import Role
from inferflux.worker.model import LoadableModel
from inferflux.worker.settings import WorkerSettings

ENVIRON = {
    "INFERFLUX_INSTANCE_ID": "decode-0",
    "INFERFLUX_MODEL": "m",
    "INFERFLUX_HOME": "/h",
    "INFERFLUX_ENGINE": "sim",
}


def settings(**more: str) -> WorkerSettings:
    return load(WorkerSettings, ENVIRON | {f"INFERFLUX_{name.upper()}": value for name, value in more.items()})


def test_defaults_follow_from_the_home_and_the_engine() -> None:
    sim, vllm = settings(), settings(engine="vllm", model_dir="/models/m")

    assert (sim.bind, sim.arena_socket) == ("unix:/h/run/decode-0.sock", Path("/h/run/decode-0.arena.sock"))
    assert (sim.wedge_s, vllm.wedge_s) == (2.0, 30.0)
    assert settings(wedge_s="7").wedge_s == 7


def test_the_engine_gets_its_share() -> None:
    core = min(os.sched_getaffinity(0))
    own = settings(cpu_cores=f"{core}", dtype="float32", block_size="32")
    options = own.engine_options(Role.DECODE, LoadableModel(digest="d"))

    assert (options.role, options.model, options.dtype, options.block_size) == (Role.DECODE, "m", "float32", 32)
    assert (options.cpu_cores, options.model_digest) == ((core,), "d")


def test_the_engine_is_told_how_it_is_spread() -> None:
    spread = settings(tensor_parallel="2", pipeline_parallel="3", data_parallel="4", expert_parallel="true")

    assert settings().parallelism == Parallelism(1, 1, 1, expert=False, executor="auto")
    assert spread.engine_options(Role.DECODE, LoadableModel()).parallelism == Parallelism(2, 3, 4, expert=True)
    assert spread.parallelism.num_ranks == 6


@pytest.mark.parametrize(
    ("more", "uses_ray", "nodes_of_replica"),
    [
        ({}, False, 0),
        ({"tensor_parallel": "2", "nodes": "1"}, False, 1),
        ({"tensor_parallel": "2", "nodes": "2"}, True, 2),
        ({"tensor_parallel": "4", "data_parallel": "2", "nodes": "4"}, True, 2),
        ({"data_parallel": "4", "nodes": "2"}, True, 1),
        ({"tensor_parallel": "2", "executor": "ray"}, True, 0),
    ],
)
def test_several_nodes_take_ray(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, str], uses_ray: bool, nodes_of_replica: int
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    parallelism = settings(**more).parallelism

    assert (parallelism.uses_ray, parallelism.nodes_of_replica) == (uses_ray, nodes_of_replica)


def test_ray_is_used_only_where_it_asks_who_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(ConfigError, match="set RAY_AUTH_MODE=token"):
        settings(executor="ray")

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert settings(executor="ray", ray_address="head:6379").parallelism.ray_address == "head:6379"


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"engine": "vllm"}, "INFERFLUX_MODEL_DIR: missing"),
        ({"engine": "llama"}, "must be one of vllm, sim"),
        ({"cpu_cores": "1,x"}, "'x' is neither a core nor a range"),
        ({"cpu_cores": "0-99999"}, "no cores"),
        ({"tensor_parallel": "0"}, "INFERFLUX_TENSOR_PARALLEL: 0 is not at least 1"),
        ({"tensor_parallel": "2", "executor": "uniproc"}, "uniproc has one rank, 2 are wanted"),
        ({"tensor_parallel": "2", "nodes": "-1"}, "INFERFLUX_NODES: -1 is below 0"),
        (
            {"tensor_parallel": "2", "nodes": "2", "executor": "mp"},
            "INFERFLUX_NODES: 2 hosts take the executor ray, it is mp",
        ),
        ({"tensor_parallel": "2", "nodes": "3"}, "1 replicas of 2 ranks can't lie equally on 3 hosts"),
        (
            {"data_parallel": "3", "tensor_parallel": "2", "nodes": "2"},
            "3 replicas of 2 ranks can't lie equally on 2 hosts",
        ),
    ],
)
def test_bad_settings_are_named(more: dict[str, str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        settings(**more)
