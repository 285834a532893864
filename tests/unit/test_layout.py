"""Which node a rank goes to, and whose tokens a rank sees."""

from __future__ import annotations

from collections import Counter

import pytest

from inferflux.engine.layout import check_spread, own_rows, share, strategy
from inferflux.errors import ConfigError


@pytest.mark.parametrize(
    ("num_nodes", "num_ranks", "num_replicas", "nodes_of_replicas"),
    [
        (2, 1, 2, ["a", "b"]),
        (2, 2, 2, ["aa", "bb"]),
        (4, 2, 2, ["ab", "cd"]),
        (2, 1, 4, ["a", "a", "b", "b"]),
        (1, 2, 2, ["aa", "aa"]),
    ],
)
def test_replicas_fill_the_nodes_one_after_the_other(
    num_nodes: int, num_ranks: int, num_replicas: int, nodes_of_replicas: list[str]
) -> None:
    """The first rank of all is on the first node."""
    found = [share("abcd"[:num_nodes], num_ranks, replica, num_replicas) for replica in range(num_replicas)]

    assert ["".join(nodes) for nodes in found] == nodes_of_replicas


def test_nodes_of_unequal_shares_are_refused() -> None:
    """With what there is room for."""
    assert [strategy(4, num_nodes) for num_nodes in (1, 2, 4)] == ["STRICT_PACK", "PACK", "STRICT_SPREAD"]
    check_spread(Counter("aabb"), 4, 2)
    with pytest.raises(ConfigError, match="4 ranks on 2 nodes take 2 on each, Ray has room for 1, 3"):
        check_spread(Counter("aaab"), 4, 2)


@pytest.mark.parametrize(
    ("num_rows", "sizes", "replica", "rows"),
    [
        (7, [3, 4], 0, range(3)),
        (7, [3, 4], 1, range(3, 7)),
        (4, [3, 4], 1, range(4)),  # not gathered
        (8, [2, 2, 2, 2], 1, range(4, 7)),  # two ranks each, padded
    ],
)
def test_a_replica_counts_its_own_tokens(num_rows: int, sizes: list[int], replica: int, rows: range) -> None:
    """Where the tokens of all replicas have been gathered."""
    tokens = [3, 4] if len(sizes) == 2 else [4, 3]

    assert range(num_rows)[own_rows(num_rows, sizes, replica, tokens)] == rows
