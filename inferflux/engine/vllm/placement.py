"""Where the ranks of a replica lie: a placement group, which is there as a whole or not at all."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import ray
from ray.util import placement_group, placement_group_table
from vllm.v1.executor import ray_utils

from inferflux.engine.layout import check_spread, strategy
from inferflux.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

WAIT_S, POLL_S = 1800.0, 0.5
NODE_LABEL = "ray.io/node-id"


def reserve(device: str, num_ranks: int, num_nodes: int) -> Any:
    """Wait for room for `num_ranks` on any `num_nodes` nodes, equally many on each; gives the group.

    `device`: the resource of which each rank has one. Raises ConfigError when the cluster's nodes are not of that size.
    """
    group = placement_group([{device: 1.0}] * num_ranks, strategy=strategy(num_ranks, num_nodes))
    ray_utils._wait_until_pg_ready(group)  # noqa: SLF001
    nodes = placement_group_table(group)["bundles_to_node_id"].values()
    check_spread(Counter(nodes), num_ranks, num_nodes)
    return group


def reserve_on(device: str, nodes: Sequence[str]) -> Any:
    """Wait for room for one rank on each of `nodes`, which may name a node more than once; gives the group."""
    selectors = [{NODE_LABEL: node} for node in nodes]
    group = placement_group([{device: 1.0}] * len(nodes), bundle_label_selector=selectors)
    ray_utils._wait_until_pg_ready(group)  # noqa: SLF001
    return group


def wait_for_nodes(device: str, ranks_per_node: int, num_nodes: int) -> list[str]:
    """Wait for the nodes of a whole worker; their ids, the driver's first, in an order that all replicas agree on.

    The first replica's first rank is where the others look for it: on the driver's node.
    """
    deadline = time.monotonic() + WAIT_S
    while len(found := _nodes_with(device, ranks_per_node)) < num_nodes:
        if time.monotonic() > deadline:
            raise ConfigError(f"nodes: {num_nodes} with {ranks_per_node} ranks each are wanted, Ray has {len(found)}")
        time.sleep(POLL_S)
    own = ray.get_runtime_context().get_node_id()
    return sorted(found, key=lambda node: (node != own, node))[:num_nodes]


def _nodes_with(device: str, amount: int) -> list[str]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["NodeID"] for node in nodes if node["Alive"] and node["Resources"].get(device, 0) >= amount]
