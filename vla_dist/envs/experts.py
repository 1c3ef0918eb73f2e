"""Scripted teachers: Meta-World's own policies, also in the drawer-and-button scene."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from metaworld.policies import ENV_POLICY_MAP

from vla_dist.core.types import Array, Observation
from vla_dist.envs.drawer_button import BUTTON_PRESS, DRAWER_CLOSE, DRAWER_OPEN, JOINT
from vla_dist.envs.metaworld import MetaWorldEnv
from vla_dist.envs.requirements import require_task

_SAME_MOTION = {
    DRAWER_OPEN: ("drawer-open", slice(4, 7), (0.0, 0.0, 0.0)),
    DRAWER_CLOSE: ("drawer-close", slice(4, 7), (0.0, 0.0, 0.05)),
    BUTTON_PRESS: ("button-press-topdown", slice(11, 14), (0.0, 0.0, 0.0)),
}
"""Scene task -> Meta-World's policy, where the scene's observation holds its object, and the offset it expects, m."""
_BEFORE_HANDLE, _WITHIN, _ABOVE = -0.028, 0.06, (0.1, 0.2)
"""m. A hand that pulls is at most 25 mm before the handle, one that has just pushed the drawer shut at least 32."""


class MetaWorldExpert:
    """Acts on the simulator's full observation, goal included; it must be given the env that it acts in.

    Its action is a pure function of that observation: no memory, no noise.
    """

    def __init__(self, env: MetaWorldEnv) -> None:
        self._env = env
        self._policies: dict[str, Any] = {}
        self._task = ""

    def reset(self, *, task: str, seed: int) -> None:
        """Raises ConfigError when ``task`` is not one of the env's."""
        del seed  # scripted policies draw nothing
        require_task(task, self._env.tasks)
        self._task = task

    def act(self, observation: Observation) -> Array:
        del observation  # the goal is masked there
        if not self._task:
            raise RuntimeError("the expert was not told its task; call reset")
        skill = self._env.skill if JOINT in self._task else self._task
        full = self._env.full_observation()
        if skill in _SAME_MOTION:
            _, where, offset = _SAME_MOTION[skill]
            full = full.copy()
            full[4:7] = full[where] + offset
        if skill == DRAWER_OPEN and (over := _over_the_handle(full)) is not None:
            return over
        with warnings.catch_warnings():
            # "Constant(s) may be too high": the clipping that it announces is done here.
            warnings.simplefilter("ignore")
            action = self._policy(skill)(full)
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def _policy(self, skill: str) -> Callable[[Array], Array]:
        name = _SAME_MOTION[skill][0] if skill in _SAME_MOTION else skill
        if name not in self._policies:
            self._policies[name] = ENV_POLICY_MAP[f"{name}-v3"]()
        return self._policies[name].get_action


def _over_the_handle(full: Array) -> Array | None:
    """The action of a hand that is before the handle, as after closing; None elsewhere.

    Meta-World's policy never begins there: it takes the hand to be behind the handle and pulls at nothing for ever.
    """
    x, y, z = full[:3] - full[4:7]
    if y >= _BEFORE_HANDLE or np.hypot(x, y) > _WITHIN or z >= _ABOVE[1]:
        return None
    aside = (0.0, 0.0) if z < _ABOVE[0] else (-x, -y)
    return np.clip([10.0 * aside[0], 10.0 * aside[1], 1.0, -1.0], -1.0, 1.0).astype(np.float32)
