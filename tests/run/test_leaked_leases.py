"""Slots that Ray holds for nobody: found in a raylet's own report, and no working process is taken for one."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vla_dist.run.leaked_leases import LeakedLeases, leases

_REPORT = """Resource usage {
    - (language=PYTHON actor_or_taskRayTrainWorker.__init__ pid=2941 worker_id=f96): {learner: 1, }
    - (language=PYTHON actor_or_taskServeReplica:vla-dist:FleetReplica.__init__ pid=642 worker_id=bdb): {serving: 1}
}
"""


def test_leases_are_read_from_the_report_of_a_raylet():
    assert leases(_REPORT) == [
        ("RayTrainWorker.__init__", 2941),
        ("ServeReplica:vla-dist:FleetReplica.__init__", 642),
    ]


@pytest.fixture
def named():
    """Starts a process that calls itself something."""
    started = []

    def start(title):
        process = subprocess.Popen([title, "-c", "import time; time.sleep(60)"], executable=sys.executable)
        started.append(process)
        end = time.monotonic() + 10
        while psutil.Process(process.pid).cmdline()[:1] != [title]:
            assert time.monotonic() < end
            time.sleep(0.02)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def report_of(folder, **pids):
    lines = [f"- (language=PYTHON actor_or_task{what} pid={pid} worker_id=f96): {{}}" for what, pid in pids.items()]
    (folder / "debug_state.txt").write_text("\n".join(lines))


def test_what_stays_idle_under_a_lease_is_ended_and_nothing_else(named, tmp_path):
    lost, at_work, free = named("ray::IDLE"), named("ray::Replica"), named("ray::IDLE")
    report_of(tmp_path, lost=lost.pid, at_work=at_work.pid, gone=2**22 - 3)
    watch = LeakedLeases(tmp_path, patience_s=0.3)
    assert watch.end() == []
    time.sleep(0.35)
    assert watch.end() == ["lost"]
    assert lost.wait(10) < 0
    assert (at_work.poll(), free.poll()) == (None, None)
    assert watch.end() == []


def test_a_lease_that_was_idle_for_a_moment_is_left_alone(named, tmp_path):
    process = named("ray::IDLE")
    report_of(tmp_path, actor=process.pid)
    watch = LeakedLeases(tmp_path, patience_s=0.2)
    assert watch.end() == []
    report_of(tmp_path)
    assert watch.end() == []
    time.sleep(0.25)
    report_of(tmp_path, actor=process.pid)
    assert watch.end() == [], "its time begins anew"
    assert process.poll() is None


def test_without_a_report_nothing_happens(tmp_path):
    assert LeakedLeases(tmp_path / "missing").end() == []


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(150)
@pytest.mark.filterwarnings("ignore")
def test_this_version_of_ray_reports_its_leases_like_that():
    import ray
    from ray._private.worker import global_worker

    class Busy:
        def pid(self):
            import os

            return os.getpid()

    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    try:
        actor = ray.remote(Busy).options(num_cpus=1).remote()
        pid = ray.get(actor.pid.remote(), timeout=60)
        logs = Path(global_worker.node.get_logs_dir_path())
        watch = LeakedLeases(patience_s=0.0)
        assert logs in watch._all_logs()
        end = time.monotonic() + 60
        while pid not in {found for _, found in leases((logs / "debug_state.txt").read_text())}:
            assert time.monotonic() < end
            time.sleep(0.5)
        assert LeakedLeases(logs, patience_s=0.0).end() == []
        assert ray.get(actor.pid.remote(), timeout=60) == pid
    finally:
        ray.shutdown()
