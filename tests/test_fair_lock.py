"""The lock goes to whoever waited longest, and an interrupted wait neither keeps nor loses it."""

from __future__ import annotations

import threading
import time

import pytest

from persona_edge.runtime.fair_lock import FairLock


def wait_until(n_waiting: int, lock: FairLock) -> None:
    while len(lock._waiting) < n_waiting:
        time.sleep(0.001)


def test_first_come_first_served() -> None:
    lock, order = FairLock(), []

    def take(name: int) -> None:
        with lock:
            order.append(name)

    threads = [threading.Thread(target=take, args=(name,)) for name in range(5)]
    with lock:
        for n_before, thread in enumerate(threads):
            thread.start()
            wait_until(n_before + 1, lock)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4]


def test_a_thread_that_takes_it_again_and_again_lets_others_in_between() -> None:
    lock, taken = FairLock(), threading.Event()

    def take_once() -> None:
        with lock:
            taken.set()

    with lock:
        thread = threading.Thread(target=take_once)
        thread.start()
        wait_until(1, lock)
    with lock:
        assert taken.is_set()
    thread.join()


def test_never_two_holders() -> None:
    lock, inside, worst = FairLock(), [0], [0]

    def work() -> None:
        for _ in range(300):
            with lock:
                inside[0] += 1
                worst[0] = max(worst[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == [1]
    assert not lock._waiting


def test_an_interrupted_wait_leaves_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = FairLock()

    class InterruptedTurn:
        n_acquired = 0

        def acquire(self) -> None:
            self.n_acquired += 1
            if self.n_acquired == 2:  # the second is the wait itself
                raise KeyboardInterrupt

    with lock:
        with monkeypatch.context() as patch:
            patch.setattr("persona_edge.runtime.fair_lock.threading.Lock", InterruptedTurn)
            with pytest.raises(KeyboardInterrupt), lock:
                pytest.fail("two holders")
        assert not lock._waiting
    with lock:
        pass


def test_an_error_inside_releases_it() -> None:
    lock = FairLock()
    with pytest.raises(ValueError, match="inside"), lock:
        raise ValueError("inside")
    with lock:
        pass
