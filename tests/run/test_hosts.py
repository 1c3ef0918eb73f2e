"""Hosts and judges in real actors that are really killed."""

import os
import signal
import time

import pytest
import ray

from vla_dist.core.errors import WorkerFailed
from vla_dist.evaluation.suite import EpisodeOutcome, SuiteConfig
from vla_dist.run.board import BoardLink
from vla_dist.run.evaluations import EvaluationBoard
from vla_dist.run.hosts import HostedWorker

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(150),
    pytest.mark.filterwarnings("ignore"),  # Ray leaves files and sockets to the garbage collector
]


class CountingWorker:
    """Counts in a file, so that a killed one goes on where it was."""

    def __init__(self, path, until):
        self.path, self.until = path, until

    def step(self):
        count = int(self.path.read_text()) + 1 if self.path.exists() else 1
        # Whole or not at all: it is read, and its writer killed, at any time.
        whole = self.path.with_suffix(".new")
        whole.write_text(str(count))
        whole.replace(self.path)
        time.sleep(0.05)
        return {"count": float(count), "done": float(count >= self.until)}

    def close(self):
        pass


class FailingWorker(CountingWorker):
    def step(self):
        raise ValueError("the arm has no power")


class SlowJudge:
    """Takes its time, so that it can be killed at work."""

    def ping(self):
        return os.getpid()

    def judge(self, version, suite):
        time.sleep(1.0)
        return [
            EpisodeOutcome(task=t, told=t, seed=0, success=True, obeyed=True, num_steps=version) for t in suite.tasks
        ]


@pytest.fixture(scope="module")
def board():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    link = BoardLink("test")
    link.start()
    yield link
    ray.shutdown()


def poll_until(poll, condition, *, timeout_s=60.0):
    notes, end = [], time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, notes
        if note := poll():
            notes.append(note)
        time.sleep(0.1)
    return notes


def test_a_killed_host_counts_one_death_and_goes_on(board, tmp_path):
    path = tmp_path / "count"
    host = HostedWorker("counter", lambda: [CountingWorker(path, 60)], board, max_seconds=60, options={"num_cpus": 0})
    pid = ray.get(host.actor.ping.remote(), timeout=60)
    poll_until(host.poll, lambda: path.exists() and int(path.read_text()) > 5)
    os.kill(pid, signal.SIGKILL)
    notes = poll_until(host.poll, lambda: host.is_done)
    assert host.deaths == 1
    assert notes == ["counter died and was started again (1 of at most 10)"]
    assert int(path.read_text()) == 60
    assert board.read()["counter/0"]["count"] == 60
    host.close()
    host.close()


def test_a_host_that_is_killed_before_its_run_begins_is_counted_too(board, tmp_path):
    path, pids = tmp_path / "count", tmp_path / "pids"

    def build():
        with open(pids, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(1.0)
        return [CountingWorker(path, 3)]

    host = HostedWorker("counter", build, board, max_seconds=60, options={"num_cpus": 0})
    poll_until(host.poll, lambda: pids.exists() and pids.read_text().endswith("\n"))
    os.kill(int(pids.read_text()), signal.SIGKILL)
    notes = poll_until(host.poll, lambda: host.is_done)
    assert len(pids.read_text().split()) == 2
    assert host.deaths == 1
    assert notes == ["counter died and was started again (1 of at most 10)"]
    host.close()


def test_a_worker_that_raises_ends_the_run_with_its_own_words(board, tmp_path):
    host = HostedWorker("arm", lambda: [FailingWorker(tmp_path, 1)], board, max_seconds=60, options={"num_cpus": 0})
    with pytest.raises(WorkerFailed, match=r"arm failed: .*the arm has no power"):
        poll_until(host.poll, lambda: host.is_done)
    host.close()


def test_a_killed_judge_takes_no_verdict_with_it(board, tmp_path):
    judge = ray.remote(SlowJudge).options(max_restarts=-1, num_cpus=0).remote()
    path, suite = tmp_path / "evaluations.json", SuiteConfig(tasks=("a", "b"), episodes_per_task=1)
    judged = EvaluationBoard([judge], path)
    for _ in range(3):
        judged.ask(4, suite)
    judged.poll()
    os.kill(ray.get(judge.ping.remote(), timeout=60), signal.SIGKILL)
    poll_until(judged.poll, lambda: judged.is_idle)
    assert judged.rate(4, suite).trials == 2
    assert judged.rate(5, suite) is None
    again = EvaluationBoard([judge], path)
    again.ask(4, suite)
    assert again.is_idle
    assert again.outcomes(4, suite) == judged.outcomes(4, suite)
    ray.kill(judge)
