from __future__ import annotations

import pytest

from inferflux.worker.eta import left_s


@pytest.mark.parametrize(
    ("ages", "lengths", "left"),
    [
        ((), (), 0.0),
        ((), (5.0,), 0.0),
        ((1.0,), (), None),
        ((1.0,), (5.0, 3.0), 4.0),
        ((1.0, 4.0), (5.0,), 4.0),
        ((7.0,), (5.0,), 7.0),
    ],
    ids=["nothing", "nothing any more", "nothing to judge by", "the longest counts", "the youngest is last", "Lindy"],
)
def test_what_is_over_tells_how_long_the_rest_takes(
    ages: tuple[float, ...], lengths: tuple[float, ...], left: float | None
) -> None:
    assert left_s(ages, lengths) == left
