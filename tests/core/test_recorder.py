import numpy as np
import pytest

from vla_dist.core.errors import DataError
from vla_dist.core.recorder import EpisodeRecorder
from vla_dist.core.specs import CameraSpec
from vla_dist.core.types import Observation
from vla_dist.testing.fakes import make_spec


def record(num_steps, *, segment_steps=4, spec=None):
    spec = spec or make_spec()
    recorder = EpisodeRecorder(
        spec,
        num_steps=segment_steps,
        episode_id="e",
        robot_id="r",
        task="go",
        instruction="go on",
        policy_version=3,
        source="policy",
    )
    segments = []
    for t in range(num_steps):
        observation = Observation(proprio=np.full(spec.proprio_dim, t, np.float32))
        emitted = recorder.add(observation, action=np.full(spec.action_dim, -t, np.float32), reward=float(t))
        segments += [emitted] if emitted else []
    return recorder, segments


@pytest.mark.parametrize(("steps", "lengths"), [(1, [1]), (4, [4]), (5, [4, 1]), (12, [4, 4, 4])])
def test_every_step_lands_in_exactly_one_segment_and_only_the_last_says_so(steps, lengths):
    recorder, segments = record(steps)
    segments.append(recorder.finish(success=True))
    assert [s.length for s in segments] == lengths
    assert [s.segment_index for s in segments] == list(range(len(lengths)))
    assert [s.is_last for s in segments] == [False] * (len(lengths) - 1) + [True]
    rewards = np.concatenate([s.rewards[: s.length] for s in segments])
    np.testing.assert_array_equal(rewards, np.arange(steps))
    np.testing.assert_array_equal(np.concatenate([s.actions[: s.length, 0] for s in segments]), -np.arange(steps))
    assert recorder.total_steps == steps
    assert segments[-1].success


def test_targets_default_to_the_executed_action():
    recorder, _ = record(2)
    segment = recorder.finish(success=False)
    np.testing.assert_array_equal(segment.target_actions, segment.actions)


def test_an_unplugged_camera_is_named():
    spec = make_spec(cameras=(CameraSpec(name="wrist", height=2, width=2),))
    with pytest.raises(DataError, match="lacks camera 'wrist'"):
        record(1, spec=spec)


def test_an_episode_without_steps_is_refused():
    recorder, _ = record(0)
    with pytest.raises(DataError, match="before its first step"):
        recorder.finish(success=False)


def test_a_wrong_shape_says_what_was_expected():
    recorder, _ = record(0)
    with pytest.raises(DataError, match=r"action has shape \(3,\), expected \(2,\)"):
        recorder.add(Observation(proprio=np.zeros(5, np.float32)), action=np.zeros(3, np.float32), reward=0.0)
