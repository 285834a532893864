from __future__ import annotations

from inferflux.clock import ManualClock
from inferflux.engine.base import EngineLoad
from inferflux.worker.progress import Progress


def load(step: int, num_running: int = 1, num_waiting: int = 0, *, is_alive: bool = True) -> EngineLoad:
    return EngineLoad(step, num_running, num_waiting, 0, 0, 0, is_alive)


def pass_time(clock: ManualClock, progress: Progress, seconds: int, now: EngineLoad) -> str | None:
    """Let time pass with a look each second; the last judgement."""
    judgement = None
    for _ in range(seconds):
        clock.advance(1)
        judgement = progress.observe(now)
    return judgement


def test_work_without_steps_is_a_wedged_engine() -> None:
    clock = ManualClock()
    progress = Progress(clock, wedged_after_s=2)

    assert progress.observe(load(step=5)) is None
    assert pass_time(clock, progress, 2, load(step=5)) is None
    clock.advance(0.5)
    assert progress.observe(load(step=5)) == "work but no step for 2.5 s"
    assert progress.observe(load(step=6)) is None


def test_requests_that_only_wait_count_as_work() -> None:
    clock = ManualClock()
    progress = Progress(clock, wedged_after_s=2)
    progress.observe(load(step=5, num_running=0, num_waiting=1))

    assert pass_time(clock, progress, 3, load(step=5, num_running=0, num_waiting=1)) is not None


def test_an_engine_that_stays_wedged_for_as_long_again_is_hopeless() -> None:
    clock = ManualClock()
    progress = Progress(clock, wedged_after_s=2)
    progress.observe(load(step=5))

    pass_time(clock, progress, 4, load(step=5))
    assert not progress.is_hopeless
    pass_time(clock, progress, 1, load(step=5))
    assert progress.is_hopeless


def test_an_engine_is_not_blamed_for_the_time_in_which_its_whole_process_was_stopped() -> None:
    clock = ManualClock()
    progress = Progress(clock, wedged_after_s=2)
    progress.observe(load(step=5))

    clock.advance(3600)

    assert progress.observe(load(step=5)) is None
    assert not progress.is_hopeless


def test_an_idle_engine_is_never_wedged() -> None:
    """Also not in the moment when work arrives after an hour without any."""
    clock = ManualClock()
    progress = Progress(clock, wedged_after_s=2)
    progress.observe(load(step=5, num_running=0))

    clock.advance(3600)

    assert progress.observe(load(step=5, num_running=0)) is None
    assert progress.observe(load(step=5)) is None


def test_a_wedged_engine_is_not_well_again_because_its_requests_went_elsewhere() -> None:
    """Only a step of its own says so; without one it becomes hopeless."""
    clock = ManualClock()
    progress = Progress(clock, wedged_after_s=2)
    progress.observe(load(step=5))
    pass_time(clock, progress, 3, load(step=5))

    assert pass_time(clock, progress, 1, load(step=5, num_running=0)) is not None
    assert pass_time(clock, progress, 1, load(step=5, num_running=0)) is not None
    assert progress.is_hopeless
    assert progress.observe(load(step=6, num_running=0)) is None


def test_a_dead_engine_is_not_fit() -> None:
    assert Progress(ManualClock(), 2).observe(load(1, is_alive=False)) == "the engine is dead"
