import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, DataError, ReplayWait, Unreachable, WaitTimeout
from vla_dist.learner.loader import Loader


class ScriptedTable:
    """Gives numbers, raises what it finds in its script, and waits where told."""

    def __init__(self, *script):
        self.script = list(script)
        self.calls = 0
        self.gate = threading.Event()
        self.gate.set()

    def sample(self, num_windows, *, timeout_s):
        self.gate.wait(20)
        self.calls += 1
        event = self.script.pop(0) if self.script else self.calls
        if isinstance(event, Exception):
            raise event
        return event


@pytest.fixture
def make_loader():
    made = []

    def make(table, **settings):
        def collate(batch, index):
            return batch, index

        loader = Loader(table, collate, **{"batch_size": 3, "timeout_s": 0.2, **settings})
        made.append((loader, table))
        return loader

    yield make
    for loader, table in made:
        getattr(table, "gate", threading.Event()).set()
        loader.close()


def test_batches_come_in_order_and_are_numbered(make_loader):
    loader = make_loader(ScriptedTable(), first_index=7)
    assert [loader.next() for _ in range(4)] == [(1, 7), (2, 8), (3, 9), (4, 10)]


def test_no_more_than_num_prefetch_are_made_ahead(make_loader):
    table = ScriptedTable()
    loader = make_loader(table, num_prefetch=3)
    loader.next()
    deadline = time.monotonic() + 5
    while table.calls < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert table.calls == 4


def test_an_error_reaches_the_caller_and_the_loader_goes_on_with_the_same_number(make_loader):
    loader = make_loader(ScriptedTable("a", Unreachable("gone"), TypeError("a bug"), "b"))
    assert loader.next() == ("a", 0)
    with pytest.raises(Unreachable, match="gone"):
        loader.next()
    with pytest.raises(TypeError, match="a bug"):
        loader.next()
    assert loader.next() == ("b", 1)


def test_a_replay_that_asks_to_wait_is_asked_again_until_the_timeout(make_loader):
    loader = make_loader(ScriptedTable(*[ReplayWait("not yet")] * 3, "a"), timeout_s=5)
    assert loader.next() == ("a", 0)

    class Empty:
        def sample(self, num_windows, *, timeout_s):
            time.sleep(timeout_s)
            raise ReplayWait("nothing")

    with pytest.raises(ReplayWait, match="nothing"):
        make_loader(Empty(), timeout_s=0.05).next()


def test_a_table_that_hangs_is_a_timeout_and_the_batch_is_not_lost(make_loader):
    table = ScriptedTable()
    table.gate.clear()
    loader = make_loader(table, timeout_s=0.05)
    with pytest.raises(WaitTimeout, match="batch of 3"):
        loader.next()
    assert loader.waited_s >= 0.1
    table.gate.set()
    assert loader.next() == (1, 0)


def test_close_ends_the_thread_in_the_middle_of_a_wait():
    class Empty:
        def sample(self, num_windows, *, timeout_s):
            time.sleep(timeout_s)
            raise ReplayWait("nothing")

    loader = Loader(Empty(), lambda b, i: b, batch_size=1, timeout_s=60)
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 5


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError):
        Loader(ScriptedTable(), lambda b, i: b, batch_size=1, timeout_s=1, num_prefetch=0)


def test_an_episode_that_is_not_finite_stops_the_learner(make_learner, make_table):
    table = make_table()
    segment = table._segments["episode-0"][0]
    actions = np.full_like(segment.target_actions, np.nan)
    table._segments["episode-0"][0] = replace(segment, target_actions=actions)
    learner = make_learner(table=table, batch_size=64)
    with pytest.raises(DataError, match="target_actions"):
        learner.step()
