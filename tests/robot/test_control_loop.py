"""Episodes at a rate and as fast as possible, and what the motors see when the network fails."""

import itertools
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, ContractMismatch, Unreachable
from vla_dist.core.specs import Dimension, EnvSpec
from vla_dist.core.types import Array, PolicyArtifact, Segment, Step
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.control_loop import ControlConfig, ControlLoop
from vla_dist.robot.reconnect_config import ReconnectConfig
from vla_dist.serving.service_config import ServiceConfig
from vla_dist.testing.fakes import FakeEnv, FakePolicy, make_spec
from vla_dist.testing.registry import fake_artifact
from vla_dist.testing.serving import REFERENCE

SPEC = make_spec()
FREE = ControlConfig(policy=REFERENCE, robot_id="r", control_hz=None, segment_steps=8)
AT_20_HZ = replace(FREE, control_hz=20.0)


class Motors(FakeEnv):
    """Remembers when it was told what."""

    def __init__(self, spec: EnvSpec = SPEC) -> None:
        super().__init__(spec)
        self.commands: list[tuple[float, Array]] = []

    def step(self, action: Array) -> Step:
        self.commands.append((time.monotonic(), action.copy()))
        return super().step(action)

    @property
    def gaps_s(self) -> list[float]:
        times = [at for at, _ in self.commands]
        return [after - before for before, after in itertools.pairwise(times)]


class StallingPolicy(FakePolicy):
    """A policy whose forward pass can be frozen, as a stalled GPU would."""

    free = threading.Event()

    def act(self, observations, states, *, generator=None):  # type: ignore[no-untyped-def]
        assert self.free.wait(20)
        return super().act(observations, states)


def load_stalling(artifact: PolicyArtifact) -> StallingPolicy:
    return StallingPolicy(artifact.manifest.spec, horizon=artifact.manifest.horizon, bias=0.05)


@pytest.fixture(autouse=True)
def _free() -> None:
    StallingPolicy.free.set()


def test_an_episode_is_recorded_as_it_was_executed(client: PolicyClient) -> None:
    segments: list[Segment] = []
    motors = Motors()
    report = ControlLoop(motors, client, FREE, on_segment=segments.append).run_episode(
        seed=1, task="go", episode_id="e1"
    )
    assert (report.episode_id, report.policy_version, report.lost) == ("e1", 1, "")
    assert report.num_steps == report.num_calls == len(report.latencies_s) == SPEC.max_episode_steps
    assert report.num_failures == report.num_fallbacks == 0
    assert [(s.segment_index, s.length, s.is_last) for s in segments] == [(0, 8, False), (1, 8, False), (2, 4, True)]
    recorded = np.concatenate([s.actions[: s.length] for s in segments])
    assert np.array_equal(recorded, np.stack([action for _, action in motors.commands]))
    assert report.total_reward == pytest.approx(sum(float(s.rewards.sum()) for s in segments), abs=1e-4)
    assert all(s.policy_version == 1 and s.source == "policy" and s.robot_id == "r" for s in segments)


def test_a_chunk_is_executed_to_its_end(site, client: PolicyClient) -> None:  # type: ignore[no-untyped-def]
    site.registry.publish(fake_artifact(SPEC, bias=0.05, horizon=4), channel="stable")
    deadline = time.monotonic() + 5
    while client.check(SPEC, policy=REFERENCE).horizon != 4:
        assert time.monotonic() < deadline
    report = ControlLoop(FakeEnv(SPEC), client, FREE).run_episode(seed=1, task="go")
    assert (report.num_steps, report.num_calls) == (20, 5)


def test_the_rate_is_kept(client: PolicyClient) -> None:
    motors = Motors()
    report = ControlLoop(motors, client, AT_20_HZ).run_episode(seed=1, task="go")
    assert report.num_fallbacks <= 2
    assert np.median(motors.gaps_s) == pytest.approx(0.05, abs=0.01)


def test_a_stalled_server_stops_the_robot_within_the_bound(make_site) -> None:  # type: ignore[no-untyped-def]
    """Frozen in the middle of an episode: every period still ends with a command, and soon it is the neutral one."""
    site = make_site(load=load_stalling, config=ServiceConfig(grace_ms=50))
    motors = Motors()
    freeze = threading.Timer(0.4, StallingPolicy.free.clear)
    thaw = threading.Timer(0.8, StallingPolicy.free.set)
    with PolicyClient(f"127.0.0.1:{site.port}") as client:
        freeze.start()
        thaw.start()
        report = ControlLoop(motors, client, AT_20_HZ).run_episode(seed=1, task="go")
    thaw.join()
    neutral = [bool((action == 0).all()) for _, action in motors.commands]
    first = neutral.index(True)
    assert 0 < first < len(neutral) - 1
    assert 4 <= report.num_fallbacks <= 12
    assert not neutral[-1], "the robot did not take up work again"
    assert max(motors.gaps_s) < 0.15 + 0.1, "the last command stood for longer than valid_for_ms and a margin"
    assert report.lost == ""
    assert report.num_steps == SPEC.max_episode_steps


def test_a_cut_network_stops_the_robot_and_the_episode_is_reported_lost(site) -> None:  # type: ignore[no-untyped-def]
    motors = Motors()
    segments: list[Segment] = []
    reconnect = ReconnectConfig(budget_s=0.3, longest_pause_s=0.1)
    with PolicyClient(f"127.0.0.1:{site.port}", reconnect=reconnect) as client:
        cut = threading.Timer(0.3, site.kill)
        cut.start()
        report = ControlLoop(motors, client, AT_20_HZ, on_segment=segments.append).run_episode(seed=1, task="go")
        cut.join()
    assert "the episode cannot go on" in report.lost
    assert not report.success
    assert (motors.commands[-1][1] == 0).all()
    assert max(motors.gaps_s) < 0.25
    assert segments[-1].is_last
    assert not segments[-1].success


@pytest.mark.parametrize("config", [FREE, replace(AT_20_HZ, waits=True)], ids=["no rate", "a rate that waits"])
def test_a_world_that_waits_needs_no_fallback(make_site, config: ControlConfig) -> None:  # type: ignore[no-untyped-def]
    site = make_site(load=load_stalling)
    StallingPolicy.free.set()
    freeze = threading.Timer(0.01, StallingPolicy.free.clear)
    thaw = threading.Timer(0.4, StallingPolicy.free.set)
    with PolicyClient(f"127.0.0.1:{site.port}") as client:
        freeze.start()
        thaw.start()
        report = ControlLoop(FakeEnv(SPEC), client, replace(config, deadline_s=0.1)).run_episode(seed=1, task="go")
    thaw.join()
    assert report.num_fallbacks == 0
    assert report.num_steps == SPEC.max_episode_steps


def test_an_always_late_server_does_not_hold_an_episode_for_ever(make_site) -> None:  # type: ignore[no-untyped-def]
    site = make_site(load=load_stalling)
    StallingPolicy.free.clear()
    config = replace(FREE, deadline_s=0.05, give_up_s=0.3)
    with PolicyClient(f"127.0.0.1:{site.port}") as client:
        report = ControlLoop(FakeEnv(SPEC), client, config).run_episode(seed=1, task="go")
    StallingPolicy.free.set()
    assert "no chunk for 0.3 s" in report.lost


def test_the_server_learns_what_was_really_executed(make_site) -> None:  # type: ignore[no-untyped-def]
    """After a fallback, previous_action is the fallback and not the action the policy would have liked."""
    seen: list[Array | None] = []

    class Curious(FakePolicy):
        def act(self, observations, states, *, generator=None):  # type: ignore[no-untyped-def]
            seen.extend(o.previous_action for o in observations)
            return super().act(observations, states)

    class Mute(FakeEnv):
        def step(self, action: Array) -> Step:
            step = super().step(action)
            return replace(step, observation=replace(step.observation, previous_action=None))

    site = make_site(load=lambda artifact: Curious(artifact.manifest.spec, bias=0.05))
    with PolicyClient(f"127.0.0.1:{site.port}") as client:
        segments: list[Segment] = []
        ControlLoop(Mute(SPEC), client, FREE, on_segment=segments.append).run_episode(seed=1, task="go")
    executed = np.concatenate([s.actions[: s.length] for s in segments])
    told = [action for action in seen if action is not None]
    assert np.array_equal(np.stack(told), executed[:-1])


def test_a_mismatched_robot_never_moves(client: PolicyClient) -> None:
    other = replace(SPEC, action=(Dimension(name="a0"), Dimension(name="a1")))
    motors = Motors(other)
    with pytest.raises(ContractMismatch, match=r"action\[0\].low -1.0 against None"):
        ControlLoop(motors, client, FREE).run_episode(seed=1, task="go")
    assert motors.commands == []


def test_no_server_no_motion(site, client: PolicyClient) -> None:  # type: ignore[no-untyped-def]
    site.kill()
    motors = Motors()
    with PolicyClient(f"127.0.0.1:{site.port}", timeout_s=0.3) as impatient, pytest.raises(Unreachable):
        ControlLoop(motors, impatient, FREE).run_episode(seed=1, task="go")
    assert motors.commands == []


@pytest.mark.parametrize("settings", [{"control_hz": 0.0}, {"deadline_s": 0.0}, {"segment_steps": 0}, {"give_up_s": 0}])
def test_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        replace(FREE, **settings)  # type: ignore[arg-type]
