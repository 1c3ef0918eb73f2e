import subprocess
import sys

import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.envs.babyai import BabyAIExpert
from vla_dist.envs.experts import MetaWorldExpert
from vla_dist.envs.make import every_task, make_env, make_expert
from vla_dist.testing.fakes import FakeEnv, make_spec

_WITHOUT = """
import sys
sys.modules[{package!r}] = None
from vla_dist.core.errors import ResourceMissing
from vla_dist.envs.make import make_env
try:
    make_env({name!r}, tasks=({task!r},))
except ResourceMissing as error:
    print(error)
"""


def test_each_family_is_built_by_name() -> None:
    assert make_env("metaworld", tasks=("reach",)).spec.max_episode_steps == 200
    assert make_env("metaworld", tasks=("reach",), max_episode_steps=77).spec.max_episode_steps == 77
    assert make_env("babyai", tasks=("GoToLocal",)).spec.action_kind == "discrete"
    assert make_env("gymnasium:Pendulum-v1").tasks == ("Pendulum-v1",)


@pytest.mark.parametrize("name", ["metaworld", "babyai", "key-to-door", "gymnasium:Pendulum-v1"])
def test_every_task_of_a_family_can_be_built(name: str) -> None:
    env = make_env(name, tasks=every_task(name))
    assert len(env.tasks) == len(every_task(name) or ("Pendulum-v1",))


def test_mazes_of_any_length_are_not_all_built() -> None:
    with pytest.raises(ConfigError, match="for example length-5-30"):
        every_task("t-maze")


def test_experts_are_built_for_their_environment() -> None:
    assert isinstance(make_expert(make_env("metaworld", tasks=("reach",))), MetaWorldExpert)
    assert isinstance(make_expert(make_env("babyai", tasks=("GoToLocal",))), BabyAIExpert)
    with pytest.raises(ConfigError, match="FakeEnv has no scripted expert"):
        make_expert(FakeEnv(make_spec()))


@pytest.mark.parametrize(("wrong", "near"), [("metawrld", "metaworld"), ("babyAI", "babyai"), ("gym:Ant-v5", "")])
def test_an_unknown_name_gets_the_nearest_ones(wrong: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"{near}.*The families are metaworld, babyai, .*gymnasium:<id>"):
        make_env(wrong, tasks=("reach",))


@pytest.mark.parametrize(
    ("package", "name", "task"),
    [("metaworld", "metaworld", "reach"), ("mujoco", "metaworld", "reach"), ("minigrid", "babyai", "GoToLocal")],
)
def test_a_missing_simulator_names_the_extra_to_install(package: str, name: str, task: str) -> None:
    script = _WITHOUT.format(package=package, name=name, task=task)
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert child.returncode == 0, child.stderr
    assert repr(package) in child.stdout
    assert "pip install 'vla-dist[sim]'" in child.stdout
