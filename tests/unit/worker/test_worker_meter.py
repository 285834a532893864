from __future__ import annotations

from inferflux.clock import ManualClock
from inferflux.types import ChoiceTokens, Frame
from inferflux.worker.meter import Meter, Pace


def test_tokens_are_counted_and_nine_of_ten_are_as_fast() -> None:
    meter = Meter(ManualClock())
    for i in range(1, 11):
        meter.add(100, i / 10)

    assert meter.num_tokens == 1000
    assert meter.latency_s() == 0.9


def test_too_few_requests_tell_nothing() -> None:
    """Those without a latency are none; those of more than a minute ago are forgotten."""
    clock = ManualClock()
    meter = Meter(clock)
    for _ in range(4):
        meter.add(1, 1.0)
    meter.add(1, None)
    assert meter.latency_s() is None

    meter.add(1, 1.0)
    assert meter.latency_s() == 1.0
    clock.advance(61)
    assert (meter.latency_s(), meter.num_tokens) == (None, 6)


def test_a_pace_is_that_of_the_tokens_after_the_first_ones() -> None:
    pace = Pace()
    pace.see(Frame(data=b"head"))
    pace.see(Frame(choices=(ChoiceTokens(0, (1,)), ChoiceTokens(1, (2,)))))
    alone = pace.s_per_token()
    pace.see(Frame(choices=(ChoiceTokens(0, (3, 4, 5)),)))

    assert alone is None
    assert pace.num_tokens == 5
    assert 0 <= (pace.s_per_token() or -1) < 60
