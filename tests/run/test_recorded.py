"""Robots that are no simulator: what they recorded is imported, learnt from, and served to one of their contract."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from vla_dist.cli.data import main as data_main
from vla_dist.core.errors import ConfigError, NotFound
from vla_dist.core.types import Observation
from vla_dist.data.formats.lerobot_writer import write_lerobot
from vla_dist.learner.config import Rank
from vla_dist.robot.client import PolicyClient
from vla_dist.run.composition.learning import build_learner, build_policy_loader
from vla_dist.run.composition.place import Place, build_env, build_spec
from vla_dist.run.composition.rollouts import build_rollout_worker
from vla_dist.run.composition.stores import build_registry
from vla_dist.run.config import RunConfig
from vla_dist.run.presets import preset
from vla_dist.run.prior_data import settle_archives
from vla_dist.run.serve_app import free_ports
from vla_dist.run.store import open_store
from vla_dist.testing.fakes import make_episode, make_spec

SPEC = make_spec(proprio_dim=3, action_dim=2)


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    """An archive of twelve episodes that came from a LeRobot set."""
    episodes = (make_episode(SPEC, number, num_steps=20) for number in range(12))
    write_lerobot(episodes, SPEC, tmp_path / "lerobot")
    data_main(["import", str(tmp_path / "lerobot"), "--to", str(tmp_path / "imported")])
    return tmp_path / "imported"


def test_contract_and_tasks_are_those_of_the_archive(imported: Path, tmp_path: Path) -> None:
    def run(*archives: Path, tasks: tuple[str, ...] = ()) -> RunConfig:
        config = preset("recorded")
        rollout = replace(config.rollout, archives=tuple(map(str, archives)))
        return replace(config, env=replace(config.env, tasks=tasks), rollout=rollout)

    spec = build_spec(run(imported))
    assert spec.differences(SPEC) == []
    settled = settle_archives(run(imported), spec)
    assert settled.env.tasks == ("open",)
    assert settled.rollout.archives == (str(imported),)
    with pytest.raises(ConfigError, match=r"\['close'\] are in none of the archives; they hold open"):
        settle_archives(run(imported, tasks=("close",)), spec)
    with pytest.raises(ConfigError, match=r"takes its contract from rollout\.archives"):
        build_spec(run())
    with pytest.raises(ConfigError, match="leaves nothing to learn from"):
        settle_archives(run(), spec)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match="holds no episode"):
        build_spec(run(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="has no simulator; serve what it has learnt"):
        build_env(run(imported))


def test_recordings_go_through_the_same_replay_and_learner(imported: Path, tmp_path: Path) -> None:
    config = preset("recorded")
    config = replace(
        config,
        rollout=replace(config.rollout, archives=(str(imported),)),
        learner=replace(config.learner, total_updates=4, publish_updates=(0, 4), updates_per_step=2, batch_size=4),
    )
    spec = build_spec(config)
    config = settle_archives(config, spec)
    with open_store(config, tmp_path) as store, contextlib.ExitStack() as opened:
        place = Place.of(config, tmp_path, store, spec=spec)
        (filler,) = build_rollout_worker(place, 0, opened=opened)
        opened.callback(filler.close)
        filled = filler.step()
        assert (filled["done"], filled["episodes"], filled["steps"]) == (1.0, 12.0, 240.0)
        registry = build_registry(place)
        opened.callback(registry.close)
        learner = build_learner(place, Rank(), registry=registry, opened=opened)
        opened.callback(learner.close)
        while not learner.done:
            learner.step()
        artifact = registry.fetch("recorded", registry.resolve("recorded@stable"))
    assert artifact.manifest.version == 2
    policy = build_policy_loader(config)(artifact)
    assert policy.spec.differences(SPEC) == []
    seen = Observation(proprio=make_episode(SPEC, 0).proprio[0], instruction="open the drawer")
    (chunk,), _ = policy.act([seen], [policy.initial_state()])
    assert chunk.shape[1] == SPEC.action_dim


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(400)
def test_what_was_imported_is_learnt_from_and_served(imported: Path, child) -> None:  # type: ignore[no-untyped-def]
    ports = free_ports(2)
    child.start(
        *("recorded", "--rollout.archives", str(imported), "--min-memory-gib", "2"),
        *("--learner.total-updates", "40", "--learner.publish-updates", "0", "40", "--learner.batch-size", "8"),
        *("--serving.port", str(ports[0])),
    )
    summary = child.finish(timeout_s=250)
    assert (summary["updates"], summary["versions"], summary["steps_collected"]) == (40, [], 240)
    (run,) = child.folder.glob("runs/*")
    assert "judged by nobody: v1 (0 updates), v2 (40 updates)" in (run / "report.md").read_text()
    assert json.loads((run / "config.json").read_text())["env"]["tasks"] == ["open"]
    child.start(str(run), "--single", "--port", str(ports[1]), verb="serve")
    child.wait_for(lambda: "serving recorded@stable" in child.log, what="server")
    with PolicyClient(f"127.0.0.1:{ports[1]}") as client:
        grant = client.check(SPEC, policy="recorded@stable", robot_id="arm-1")
    assert grant.policy_version == 2
