from __future__ import annotations

import os
import select
import signal

import pytest

from inferflux.cli.interrupts import SIGNALS, Interrupts


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_interrupts(number):
    """Outside of `deferred` every one of the signals is a Ctrl-C."""
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    assert interrupts.num_received == 1


def test_deferred_signals_are_counted():
    """Inside of `deferred` nothing is raised; the descriptor tells, and `check` raises when asked."""
    with Interrupts() as interrupts, interrupts.deferred():
        interrupts.check()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

        assert select.select([interrupts.fd], [], [], 5)[0]
        assert interrupts.num_received == 2
        interrupts.clear_fd()
        assert not select.select([interrupts.fd], [], [], 0)[0]
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


def test_handlers_are_put_back():
    """After the block signals do what they did before."""
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interrupts():
        pass

    assert [signal.getsignal(number) for number in SIGNALS] == before
