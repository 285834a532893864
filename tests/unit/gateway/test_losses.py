from __future__ import annotations

import pytest

from inferflux.clock import ManualClock
from inferflux.errors import Draining, EngineFailed, InvalidRequest, KvTransportDegraded, WorkerLost
from services.gateway.losses import FLOOR, MAX_SAVED, SHARE, Losses, Moves, RetryBudget


def test_a_quiet_gateway_always_has_some_moves():
    """They come back with time, without any traffic."""
    clock = ManualClock()
    budget = RetryBudget(clock)

    assert [budget.take() for _ in range(int(FLOOR) + 1)] == [True] * int(FLOOR) + [False]
    clock.advance(2)
    assert [budget.take() for _ in range(3)] == [True, True, False]
    clock.advance(3600)
    assert sum(budget.take() for _ in range(100)) == FLOOR


def test_traffic_pays_for_a_tenth_of_itself():
    """And what is saved is bounded."""
    budget = RetryBudget(ManualClock())
    while budget.take():
        pass
    for _ in range(50):
        budget.deposit()
    assert sum(budget.take() for _ in range(100)) in (4, 5)
    for _ in range(int(2 * MAX_SAVED / SHARE)):
        budget.deposit()
    assert sum(budget.take() for _ in range(1000)) == MAX_SAVED


def test_all_requests_of_a_lost_worker_move_whatever_the_budget():
    """Their second loss is paid for, and a third is one too many."""
    moves = Moves(ManualClock())
    lost = [Losses() for _ in range(100)]
    for losses in lost:
        moves.permit(losses, WorkerLost("gone"), "a")
    num_moved = 0
    for losses in lost:
        try:
            moves.permit(losses, WorkerLost("gone"), "b")
            num_moved += 1
        except WorkerLost:
            pass

    assert num_moved == FLOOR
    with pytest.raises(WorkerLost):
        moves.permit(lost[0], WorkerLost("gone"), "c")


def test_draining_and_pardoned_workers_count_for_nothing():
    """However many there are."""
    moves, losses = Moves(ManualClock()), Losses(pardoned={"b"})
    for _ in range(100):
        moves.permit(losses, Draining("bye"), "a")
        moves.permit(losses, WorkerLost("gone"), "b")

    assert not losses.counted


@pytest.mark.parametrize("error", [InvalidRequest("bad"), KvTransportDegraded("no prefill")])
def test_what_another_worker_would_say_too_is_not_tried_again(error):
    """It goes to the client at once."""
    with pytest.raises(type(error)):
        Moves(ManualClock()).permit(Losses(), error, "a")


def test_failing_again_and_again_on_one_worker_ends():
    """A start counts each time."""
    moves, losses = Moves(ManualClock()), Losses()
    for _ in range(2):
        moves.permit(losses, EngineFailed("no"), "a")
    with pytest.raises(EngineFailed):
        moves.permit(losses, EngineFailed("no"), "a")
