"""How the ranks of an engine, and the rows of their batches, lie side by side. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inferflux.errors import ConfigError

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Sequence


def strategy(num_ranks: int, num_nodes: int) -> str:
    """Ray's name for it. Between the two extremes Ray packs as well as the nodes' sizes let it."""
    if num_nodes == 1:
        return "STRICT_PACK"
    return "STRICT_SPREAD" if num_nodes == num_ranks else "PACK"


def check_spread(ranks_of_nodes: Counter[str], num_ranks: int, num_nodes: int) -> None:
    """Raise ConfigError unless each of `num_nodes` nodes has equally many ranks."""
    if sorted(ranks_of_nodes.values()) != [num_ranks // num_nodes] * num_nodes:
        found = ", ".join(map(str, sorted(ranks_of_nodes.values())))
        wanted = f"{num_ranks} ranks on {num_nodes} nodes take {num_ranks // num_nodes} on each"
        raise ConfigError(f"nodes: {wanted}, Ray has room for {found}")


def share(nodes: Sequence[str], num_ranks: int, replica: int, num_replicas: int) -> list[str]:
    """The node of each of a replica's `num_ranks`, when all replicas' ranks fill `nodes` one after the other."""
    total = num_replicas * num_ranks
    return [nodes[(replica * num_ranks + i) * len(nodes) // total] for i in range(num_ranks)]


def own_rows(num_rows: int, sizes: Sequence[int], replica: int, tokens_of_replicas: Sequence[int]) -> slice:
    """Rows of one replica's tokens where those of all have been gathered; `sizes`: rows of each rank, with padding."""
    if num_rows != sum(sizes):
        return slice(num_rows)
    ranks_of_replica = len(sizes) // len(tokens_of_replicas)
    first = sum(sizes[: replica * ranks_of_replica])
    return slice(first, first + tokens_of_replicas[replica])
