"""The walk's threads: results in order, and an end that does not wait for whole experts."""

from __future__ import annotations

import threading
import time

import pytest

from npuq.parallel.pool import Pool
from npuq.parallel.threads import StoppedError


def test_results_come_in_order():
    pool = Pool(3)
    delays = [0.03, 0.0, 0.02, 0.0, 0.01, 0.0]
    assert list(pool.map(lambda item: time.sleep(item[1]) or item[0], enumerate(delays))) == list(range(6))
    pool.close()


def test_closing_stops_running_work_at_its_next_item():
    pool, begun, done = Pool(1), threading.Event(), []

    def work(_):
        for part in pool.inline.map(lambda part: time.sleep(0.001) or part, range(2000)):
            done.append(part)
            begun.set()

    def close():
        begun.wait()
        pool.close()

    closer = threading.Thread(target=close)
    closer.start()
    with pytest.raises(StoppedError):
        list(pool.map(work, [0, 1]))
    closer.join()
    assert 0 < len(done) < 2000
