from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inferflux.cli.placement import place


def test_two_cores_are_one_each():
    """On two cores prefill computes on the first and decode on the second."""
    assert place([0, 1], 1, 1) == ([(0,)], [(1,)])


def test_a_single_core_is_not_divided():
    """With one core nothing is pinned."""
    assert place([0], 1, 2) == ([()], [(), ()])


def test_workers_split_their_half():
    """Workers of a role get equal parts of their role's half."""
    assert place(range(8), 2, 1) == ([(0, 1), (2, 3)], [(4, 5, 6, 7)])


def test_too_many_workers_share():
    """More workers than cores share cores inside their half only."""
    assert place([0, 1], 3, 2) == ([(0,), (0,), (0,)], [(1,), (1,)])


def test_without_prefill_decode_has_all_cores():
    """A half that nobody uses is not left idle."""
    assert place([0, 1], 0, 1) == ([], [(0, 1)])


@given(
    st.lists(st.integers(0, 255), min_size=2, max_size=64, unique=True),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_prefill_and_decode_never_share_a_core(cores, num_prefill, num_decode):
    """Whatever the machine and the pools, every worker has cores and no core serves both roles."""
    prefill, decode = place(cores, num_prefill, num_decode)

    assert (len(prefill), len(decode)) == (num_prefill, num_decode)
    assert all(prefill + decode)
    used_by_prefill, used_by_decode = {c for w in prefill for c in w}, {c for w in decode for c in w}
    assert not used_by_prefill & used_by_decode
    assert used_by_prefill | used_by_decode <= set(cores)
