"""Parts go where their role is, on a real cluster of several raylets, and outlive the nodes that they were on."""

import dataclasses
import threading
import time

import pytest
import ray
from ray.cluster_utils import Cluster

from vla_dist.core.errors import ConfigError, ResourceMissing, Unreachable
from vla_dist.replay.server import EmbeddedServer
from vla_dist.run import nodes
from vla_dist.run.board import BoardLink
from vla_dist.run.hosts import HostedWorker
from vla_dist.run.launch import fit_cluster
from vla_dist.run.nodes import NodeReport, _require_fit, require_fit_nodes, versions
from vla_dist.run.placement import LIMITS_VARIABLE, Placement, parts, survey_cluster
from vla_dist.run.presets import preset
from vla_dist.run.roles import LEARNER, ROLLOUT, SERVING, PlacementSettings, largest_load
from vla_dist.run.serve_settings import TOKEN_VARIABLE
from vla_dist.run.store import Store

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(150),
    pytest.mark.filterwarnings("ignore"),  # Ray leaves files and sockets to the garbage collector
]


class Counting:
    """Counts in a file until it is told otherwise."""

    def __init__(self, path):
        self.path = path

    def step(self):
        count = int(self.path.read_text()) + 1 if self.path.exists() else 1
        whole = self.path.with_suffix(".new")
        whole.write_text(str(count))
        whole.replace(self.path)
        time.sleep(0.05)
        return {"count": float(count), "done": 0.0}

    def close(self):
        pass


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "resources": {"gateway": 1},
            "object_store_memory": 80 * 2**20,
            "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 3},
        },
    )
    cluster.add_node(num_cpus=2, resources={"serving": 1}, object_store_memory=80 * 2**20)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_a_vanished_spot_node_costs_no_life_and_the_worker_goes_on(cluster, tmp_path):
    spot = cluster.add_node(num_cpus=2, resources={"rollout": 2}, object_store_memory=80 * 2**20)
    placement = survey_cluster()
    assert placement.roles == {"rollout", "serving", "gateway"}
    board = BoardLink("test-placement")
    board.start(placement.beside_driver(cpus=1))
    path = tmp_path / "count"
    host = HostedWorker(
        "rollout-0",
        lambda: [Counting(path)],
        board,
        max_seconds=100,
        options=placement.options(ROLLOUT, cpus=1),
        max_deaths=0,
    )
    notes, end = [], time.monotonic() + 90

    def watch(condition):
        while not condition():
            assert time.monotonic() < end, notes
            if note := host.poll():
                notes.append(note)
            time.sleep(0.1)

    watch(lambda: path.exists() and int(path.read_text()) > 3)
    assert ray.get(host.actor.node.remote(), timeout=30) == spot.node_id
    host.poll()
    host._max_deaths = 1
    cluster.remove_node(spot, allow_graceful=False)
    watch(lambda: notes)
    counted = int(path.read_text())
    cluster.add_node(num_cpus=2, resources={"rollout": 2}, object_store_memory=80 * 2**20)
    watch(lambda: int(path.read_text()) > counted + 3)
    assert host.deaths == 0
    assert any("lost its node" in note for note in notes)
    host.close()


@pytest.mark.slow
def test_a_run_that_no_cluster_could_take_is_refused_before_it_starts(cluster):
    config, placement = preset("babyai"), survey_cluster()
    many = dataclasses.replace(config, serving=dataclasses.replace(config.serving, num_replicas=3))
    with pytest.raises(
        ResourceMissing, match=r"3 slots of the role 'serving' are wanted .* at most 1; raise max_workers"
    ):
        placement.require_room(many)
    greedy = dataclasses.replace(config, learner=dataclasses.replace(config.learner, use_gpu=True))
    with pytest.raises(ResourceMissing, match="1 GPUs are wanted and the cluster has at most 0"):
        placement.require_room(greedy)


@pytest.mark.slow
def test_what_an_autoscaler_may_add_counts(cluster, monkeypatch):
    monkeypatch.setenv(LIMITS_VARIABLE, '{"learner": 4, "serving": 16}')
    placement = survey_cluster()
    assert "learner" in placement.roles
    assert placement.options(LEARNER, cpus=1)["resources"] == {"learner": 1.0}
    config = preset("babyai")
    small = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, num_workers=1))
    placement.require_room(dataclasses.replace(small, serving=dataclasses.replace(small.serving, num_replicas=16)))


@pytest.mark.slow
def test_a_store_that_only_this_machine_reaches_is_refused_on_a_cluster(cluster, tmp_path):
    store = Store(redis_url="unix:///nowhere.sock", images_url=None)
    with pytest.raises(ResourceMissing, match=r"other nodes; give --replay\.redis-url"):
        fit_cluster(preset("babyai"), tmp_path, store, Placement(is_cluster=True, roles=frozenset({"gateway"})))


@pytest.mark.slow
def test_other_machines_need_a_token(cluster, tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.setattr("vla_dist.run.launch.require_fit_nodes", lambda *a, **k: None)
    store = Store(redis_url="redis://somewhere:1", images_url=None)
    with pytest.raises(ConfigError, match="without a token"):
        fit_cluster(preset("babyai"), tmp_path, store, Placement(is_cluster=True))
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    assert fit_cluster(preset("babyai"), tmp_path, store, Placement(is_cluster=True)).serving.token == "secret"


def test_a_node_with_another_version_or_without_the_folder_is_named(tmp_path):
    here = versions()
    other = NodeReport(address="10.0.0.7", versions={**here, "torch": "1.0"})
    with pytest.raises(ConfigError, match=r"node 10.0.0.7 has torch 1.0 \(here "):
        _require_fit(here, other, needs_folder=False, folder=tmp_path)
    blind = NodeReport(address="10.0.0.8", versions=here, sees_folder=False)
    _require_fit(here, blind, needs_folder=False, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"10\.0\.0\.8 is to train and does not see"):
        _require_fit(here, blind, needs_folder=True, folder=tmp_path)


@pytest.mark.slow
def test_every_node_is_asked(cluster, tmp_path):
    with EmbeddedServer(tmp_path / "redis") as server:
        require_fit_nodes([server.url], tmp_path / "missing", folder_is_shared=True)
    with pytest.raises(Unreachable, match=r"node \S+ does not reach the replay: .*redis"):
        require_fit_nodes([server.url], tmp_path, folder_is_shared=True)


@pytest.mark.slow
def test_a_node_that_vanishes_while_it_is_asked_is_left_out(cluster, tmp_path, monkeypatch, caplog):
    spot = cluster.add_node(num_cpus=1)
    doomed, asked = spot.node_id, tmp_path / "asked"

    def report(address, urls, folder):
        if ray.get_runtime_context().get_node_id() == doomed:
            asked.touch()
            time.sleep(100)
        return NodeReport(address=address, versions=versions())

    def end_it():
        while not asked.exists():
            time.sleep(0.1)
        cluster.remove_node(spot, allow_graceful=False)

    monkeypatch.setattr(nodes, "_report", report)
    end = threading.Thread(target=end_it, daemon=True)
    end.start()
    require_fit_nodes([], tmp_path, folder_is_shared=False)
    end.join(20)
    assert "vanished while it was asked" in caplog.text
    assert doomed not in {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def fails(address, urls, folder):
        raise ImportError("no module named vla_dist")

    monkeypatch.setattr(nodes, "_report", fails)
    with pytest.raises(ConfigError, match=r"node \S+ cannot run vla-dist \(.*no module named vla_dist"):
        require_fit_nodes([], tmp_path, folder_is_shared=False)


def test_one_machine_asks_for_no_roles():
    placement = Placement()
    assert placement.options(SERVING, cpus=1) == {"num_cpus": 1, "num_gpus": 0.0, "resources": {}}
    assert placement.beside_driver(cpus=1) == {"num_cpus": 1}
    placement.require_room(preset("demo"))


def test_judges_take_the_places_of_rollout_workers():
    config = preset("demo")
    assert largest_load(parts(config), ROLLOUT) == config.rollout.num_workers + 1
    assert largest_load(parts(config), LEARNER) == 1


def test_two_ranks_on_one_gpu_are_refused():
    config = preset("demo")
    learner = dataclasses.replace(config.learner, use_gpu=True, num_workers=2)
    with pytest.raises(ConfigError, match="several ranks on one GPU"):
        dataclasses.replace(config, learner=learner, placement=PlacementSettings(learner_gpus=0.5))
    with pytest.raises(ConfigError, match="a part of one GPU"):
        PlacementSettings(replica_gpus=1.5)
