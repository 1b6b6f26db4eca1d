"""Signals that ask a training to stop."""

import signal
import threading

import pytest

from portacnn.training import stopping_on_signals


class Work:
    stops = 0

    def stop(self):
        self.stops += 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_request(number):
    mine = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        work = Work()
        with stopping_on_signals(work) as caught:
            assert caught.exit_status == 0
            signal.raise_signal(number)
            assert work.stops == 1
            assert caught.number == number
            assert caught.exit_status == 128 + number
            assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        with pytest.raises(KeyError), stopping_on_signals(work):
            raise KeyError
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    finally:
        signal.signal(signal.SIGTERM, mine)


def test_a_second_ctrl_c_is_meant():
    work = Work()
    # a shell starts background jobs with it ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stopping_on_signals(work):
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert work.stops == 1


def test_in_other_threads_signals_are_left_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def elsewhere():
        with stopping_on_signals(Work()) as caught:
            seen.append((signal.getsignal(signal.SIGINT), caught.number))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(before, None)]
