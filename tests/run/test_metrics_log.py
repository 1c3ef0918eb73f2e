import pickle

import pytest
from tensorboardX.proto.event_pb2 import Event

from vla_dist.run import metrics_log
from vla_dist.run.metrics_log import MetricsLog


class Board:
    def __init__(self):
        self.posted = []

    def post(self, component, metrics):
        self.posted.append((component, dict(metrics)))


class Gauge:
    made: dict = {}  # noqa: RUF012  a registry, as Prometheus has one

    def __init__(self, name, *, description, tag_keys):
        self.values = []
        Gauge.made[name] = self

    def set(self, value, *, tags):
        self.values.append((value, tags))


def read_events(folder):
    """(tag, update, value) of TensorBoard's files: length, checksum, record, checksum."""
    found = []
    for path in folder.glob("events*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            at += 12 + size + 4
    return found


@pytest.fixture(autouse=True)
def gauges(monkeypatch):
    monkeypatch.setattr(metrics_log, "Gauge", Gauge)
    Gauge.made = {}


def test_metrics_reach_the_board_tensorboard_and_prometheus(tmp_path):
    board = Board()
    log = pickle.loads(pickle.dumps(MetricsLog(board, tmp_path, run_id="run-7")))  # noqa: S301  as Ray sends it
    log({"updates": 25.0, "loss": 0.5})
    log({"updates": 50.0, "loss": 0.25})
    log._writer.close()
    assert [metrics["loss"] for _, metrics in log._board.posted] == [0.5, 0.25]
    assert [event for event in read_events(tmp_path) if event[0] == "learner/loss"] == [
        ("learner/loss", 25, 0.5),
        ("learner/loss", 50, 0.25),
    ]
    assert Gauge.made["vla_dist_learner_loss"].values == [(0.5, {"run": "run-7"}), (0.25, {"run": "run-7"})]
    log.close()


def test_a_log_that_was_never_used_closes(tmp_path):
    MetricsLog(Board(), tmp_path, run_id="run-7").close()
    assert list(tmp_path.iterdir()) == []
