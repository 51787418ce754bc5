from __future__ import annotations

import os
import signal
import threading

import pytest

from tapeline.train.interrupt import GracefulStop


def test_the_first_interrupt_asks_the_second_one_stops() -> None:
    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with GracefulStop(said.append) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_requested
        assert len(said) == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_are_left_alone() -> None:
    results: list[bool] = []

    def run() -> None:
        with GracefulStop(print) as stop:
            results.append(stop.is_requested)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert results == [False]
