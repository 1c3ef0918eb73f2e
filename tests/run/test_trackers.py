import importlib
import threading

import pytest

from vla_dist.run import trackers
from vla_dist.run.trackers import MlflowTracker, Trackers, WandbTracker

SETTINGS = {"learner": {"batch_size": 8}, "preset": "demo"}


class Recorder:
    """A tracker that keeps what it is told, and fails or waits where it is asked to."""

    def __init__(self, run_id, settings, *, fails_at=None, waits=None):
        self.run_id, self.settings, self.entries, self.is_closed = run_id, settings, [], False
        self._fails_at, self._waits = fails_at, waits

    def log(self, metrics, update):
        if self._waits is not None:
            assert self._waits.wait(60)
        if update == self._fails_at:
            raise OSError("no route to host")
        self.entries.append((update, metrics["loss"]))

    def close(self):
        self.is_closed = True


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Modules of these names are there, and make these trackers."""

    def install(**makers):
        for name in makers:
            (tmp_path / f"{name}.py").write_text("")
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        monkeypatch.setattr(trackers, "_KNOWN", makers)

    return install


def test_what_is_not_installed_is_no_trouble(monkeypatch):
    monkeypatch.setattr(trackers, "_KNOWN", {"no_such_tracker": None})
    some = Trackers("run-7", SETTINGS)
    some.log({"loss": 1.0}, 1)
    some.close()


def test_every_entry_reaches_every_tracker_with_the_settings_of_the_run(install):
    made = []

    def make(run_id, settings):
        made.append(Recorder(run_id, settings))
        return made[-1]

    install(one_tracker=make, other_tracker=make)
    some = Trackers("run-7", SETTINGS)
    for update in (25, 50):
        some.log({"loss": 1 / update}, update)
    some.close()
    assert [recorder.entries for recorder in made] == [[(25, 0.04), (50, 0.02)]] * 2
    assert made[0].settings == {"learner.batch_size": "8", "preset": "demo"}
    assert all(recorder.is_closed for recorder in made)


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(install, caplog):
    made = {}

    def make_failing(run_id, settings):
        made["failing"] = Recorder(run_id, settings, fails_at=50)
        return made["failing"]

    def make(run_id, settings):
        made["good"] = Recorder(run_id, settings)
        return made["good"]

    def refuse(run_id, settings):
        raise PermissionError("log in first")

    install(failing_tracker=make_failing, good_tracker=make, closed_tracker=refuse)
    some = Trackers("run-7", SETTINGS)
    for update in (25, 50, 75):
        some.log({"loss": 1.0}, update)
    some.close()
    assert [update for update, _ in made["good"].entries] == [25, 50, 75]
    assert [update for update, _ in made["failing"].entries] == [25]
    assert "failing_tracker gets no more metrics of run-7: no route to host" in caplog.text
    assert "closed_tracker gets no more metrics of run-7: log in first" in caplog.text


def test_a_server_that_hangs_keeps_nobody_waiting(install, monkeypatch):
    release, made = threading.Event(), []

    def make(run_id, settings):
        made.append(Recorder(run_id, settings, waits=release))
        return made[-1]

    install(slow_tracker=make)
    monkeypatch.setattr(trackers, "_QUEUE_LENGTH", 10)
    some = Trackers("run-7", SETTINGS)
    for update in range(100):
        some.log({"loss": 1.0}, update)
    some.close(timeout_s=0.1)
    assert made[0].entries == []
    release.set()
    some.close(timeout_s=60)
    updates = [update for update, _ in made[0].entries]
    assert updates[-1] == 99, "the newest are kept"
    assert len(updates) <= 12


def test_mlflow_goes_on_with_the_run_of_that_name(monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for updates in ((25, 50), (75,)):
        tracker = MlflowTracker("run-7", {"learner.batch_size": "8", "long": "x" * 9000})
        for update in updates:
            tracker.log({"loss": 1 / update, "updates": float(update)}, update)
        tracker.close()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("vla-dist").experiment_id])
    assert run.info.run_name == "run-7"
    assert run.info.status == "FINISHED"
    assert run.data.params["learner.batch_size"] == "8"
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == [25, 50, 75]


def test_wandb_writes_a_run_of_that_name(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    tracker = WandbTracker("run-7", {"learner.batch_size": "8"})
    tracker.log({"loss": 0.5}, 50)
    tracker.log({"loss": 0.25}, 25)
    tracker.close()
    (written,) = tmp_path.glob("wandb/offline-run-*-run-7/*.wandb")
    data = written.read_bytes()
    assert b"batch_size" in data
    assert data.count(b"updates") >= 2
