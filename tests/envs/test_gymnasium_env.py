import numpy as np
import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.core.specs import CameraSpec
from vla_dist.envs.gymnasium_env import GymnasiumEnv


def test_spec_of_a_continuous_environment() -> None:
    env = GymnasiumEnv("Pendulum-v1")
    assert env.tasks == ("Pendulum-v1",)
    assert (env.spec.proprio_dim, env.spec.action_dim, env.spec.action_kind) == (3, 1, "continuous")
    assert (env.spec.action[0].low, env.spec.action[0].high) == (-2.0, 2.0)
    assert env.spec.max_episode_steps == 200
    assert env.spec.control_hz == pytest.approx(20.0)


def test_discrete_actions_are_the_largest_of_the_numbers() -> None:
    env = GymnasiumEnv("CartPole-v1")
    assert (env.spec.action_dim, env.spec.action_kind) == (2, "discrete")
    pushed = []
    for action in ([0.1, 0.9], [5.0, -5.0]):
        env.reset(seed=0, task="CartPole-v1")
        step = env.step(np.array(action, np.float32))
        pushed.append(step.observation.proprio[1])
        assert step.observation.previous_action is not None
        assert step.observation.previous_action.tolist() == [float(action[0] > action[1]), float(action[1] > action[0])]
    assert pushed[0] > 0 > pushed[1]


def test_step_limit_can_be_set() -> None:
    env = GymnasiumEnv("Pendulum-v1", max_episode_steps=4)
    assert env.spec.max_episode_steps == 4
    env.reset(seed=0, task="Pendulum-v1")
    steps = [env.step(np.zeros(1, np.float32)) for _ in range(4)]
    assert [s.truncated for s in steps] == [False, False, False, True]


def test_what_it_cannot_have_is_refused_with_a_reason() -> None:
    with pytest.raises(ConfigError, match=r"cannot make 'Pendulun-v1'.*Pendulum"):
        GymnasiumEnv("Pendulun-v1")
    with pytest.raises(ConfigError, match="only a flat Box"):
        GymnasiumEnv("FrozenLake-v1")
    with pytest.raises(ConfigError, match="one task"):
        GymnasiumEnv("Pendulum-v1", ("swing",))
    with pytest.raises(ConfigError, match="state alone"):
        GymnasiumEnv("Pendulum-v1", cameras=(CameraSpec(name="front", height=8, width=8),))
    with pytest.raises(ConfigError, match="no wordings"):
        GymnasiumEnv("Pendulum-v1", instructions="held_out")


def test_render_draws() -> None:
    env = GymnasiumEnv("CartPole-v1")
    env.reset(seed=0, task="CartPole-v1")
    frame = env.render()
    assert frame.ndim == 3
    assert frame.shape[2] == 3
    assert frame.std() > 0
    with pytest.raises(ConfigError, match="one view"):
        env.render("top")
    env.close()
