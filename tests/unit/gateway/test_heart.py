from __future__ import annotations

from inferflux.types import Pulse, State
from services.gateway.heart import SUSPECT_TICKS, WARM_TICKS, Heart

READY, DRAINING = Pulse("i", State.READY), Pulse("i", State.DRAINING)


def test_a_heart_is_down_until_its_first_pulse():
    """A stream that is open but silent proves nothing."""
    heart = Heart(dead_ticks=8)

    assert not heart.is_up
    assert not heart.is_ready


def test_silence_makes_it_suspect_and_then_dead():
    """Suspect workers get nothing new if others are there; dead ones lose what they have."""
    heart = Heart(dead_ticks=SUSPECT_TICKS + 1)
    heart.beat(READY)
    for _ in range(SUSPECT_TICKS):
        assert heart.is_fresh
        heart.tick()

    assert not heart.is_fresh
    assert not heart.is_dead
    heart.tick()
    assert heart.is_dead


def test_a_pulse_heals_it():
    """A short stall leaves nothing behind."""
    heart = Heart(dead_ticks=8)
    heart.beat(READY)
    for _ in range(7):
        heart.tick()
    heart.beat(READY)

    assert heart.is_fresh


def test_a_draining_worker_is_up_and_not_ready():
    """Its requests go on, new ones go elsewhere."""
    heart = Heart(dead_ticks=8)
    heart.beat(DRAINING)

    assert heart.is_up
    assert not heart.is_ready


def test_a_new_stream_starts_with_a_clean_slate():
    """Old silence does not count against it."""
    heart = Heart(dead_ticks=2)
    heart.beat(READY)
    heart.tick()
    heart.tick()
    heart.stop()

    assert not heart.is_up
    assert not heart.is_dead


def test_a_worker_that_refuses_is_not_ready_until_its_next_pulse():
    """It knows better than its last pulse."""
    heart = Heart(dead_ticks=8)
    heart.beat(READY)
    heart.refuse()
    assert heart.is_up
    assert not heart.is_ready
    heart.beat(READY)

    assert heart.is_ready


def test_a_worker_warms_up_with_the_time_it_is_up():
    """From little to everything, and anew after each loss."""
    heart = Heart(dead_ticks=8)
    heart.beat(READY)
    cold = heart.warmth
    for _ in range(WARM_TICKS):
        heart.tick()
    warm = heart.warmth
    heart.stop()
    heart.beat(READY)

    assert 0 < cold == heart.warmth < warm == 1
