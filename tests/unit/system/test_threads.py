# SPDX-License-Identifier: GPL-2.0-or-later
import threading
import time

import pytest

from backupctl.errors import Interrupted, WriteFailed
from backupctl.system import threads
from backupctl.system.threads import Stopped, Workers, side_by_side


def nothing() -> None:
    pass


def test_results_have_the_order_of_the_tasks_and_no_more_run_than_asked():
    running, most, lock = 0, 0, threading.Lock()

    def task(number):
        def work(_check):
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.02 * (5 - number))
            with lock:
                running -= 1
            return number

        return work

    assert side_by_side([task(number) for number in range(5)], at_once=2, check=nothing) == (0, 1, 2, 3, 4)
    assert most == 2


def until_stopped(check):
    while True:
        check()
        time.sleep(0.01)


def test_the_first_failure_ends_all():
    ended = threading.Event()

    def goes_on(check):
        try:
            until_stopped(check)
        except Stopped:
            ended.set()
            raise

    def fails(_check):
        raise WriteFailed("no space")

    with pytest.raises(WriteFailed, match="no space"):
        side_by_side([goes_on, fails], at_once=2, check=nothing)
    assert ended.is_set()


def test_what_check_raises_ends_all_even_those_that_hang(monkeypatch):
    monkeypatch.setattr(threads, "END_SECONDS", 0.3)
    hanging = threading.Event()
    main, seen = threading.get_ident(), []

    def check():
        seen.append(threading.get_ident())
        if len(seen) == 3:
            raise Interrupted("stopped by SIGTERM")

    begun = time.monotonic()
    with pytest.raises(Interrupted):
        side_by_side([until_stopped, lambda _check: hanging.wait(60)], at_once=2, check=check)
    assert time.monotonic() - begun < 30
    assert set(seen) == {main}
    hanging.set()


def test_no_task_is_no_result():
    assert side_by_side([], at_once=2, check=nothing) == ()


def test_workers_do_each_job_once():
    done, all_done = [], threading.Event()

    def job(number):
        done.append(number)
        if len(done) == 50:
            all_done.set()

    with Workers(3) as workers:
        for number in range(50):
            workers.submit(lambda number=number: job(number))
        assert all_done.wait(10)
    assert sorted(done) == list(range(50))
