"""A drawer and a button in ONE scene: three tasks that only the words tell apart.

In Meta-World every task has a scene of its own, so a policy can ignore the instruction and still do the right thing.
Here opening the drawer, closing it and pressing the button start from the same distribution of states: the drawer is
half open, and drawer and button stand left and right of the robot's middle in either order.

Two of them in a row, joined by ``+`` (``scene/drawer-open+scene/button-press``), are a task as well: done when the
second one is done after the first one was. A button springs back, so what was done may no longer be seen.

The scene is built from Meta-World's assets on its robot; control, observation layout and time step are Meta-World's.
"""

from vla_dist.envs.gl import mujoco  # first: it guards the import of MuJoCo

# isort: split
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from metaworld.asset_path_utils import full_V3_path_for
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from metaworld.utils.reward_utils import tolerance

from vla_dist.core.types import Array

PREFIX = "scene/"
DRAWER_OPEN, DRAWER_CLOSE, BUTTON_PRESS = f"{PREFIX}drawer-open", f"{PREFIX}drawer-close", f"{PREFIX}button-press"
SCENE_TASKS = (DRAWER_OPEN, DRAWER_CLOSE, BUTTON_PRESS)
JOINT = "+"
SCENE_SEQUENCES = tuple(f"{first}{JOINT}{second}" for first in SCENE_TASKS for second in SCENE_TASKS if first != second)

_HAND_START = np.array([0.0, 0.6, 0.2])
_HANDLE_OFFSET = np.array([0.0, -0.16, 0.0])
"""From the drawer's link to its handle, m."""
_BUTTON_OFFSET = np.array([0.0, 0.0, 0.193])
"""From the button's link to its cap, m."""
_SIDE = (0.14, 0.32)
"""Distance of drawer and button from the middle, m: each one varies over 18 cm on its side."""
_DRAWER_Y, _BUTTON_Y = (0.86, 0.9), (0.78, 0.88)
_DRAWER_START = (-0.10, -0.06)
"""Joint range in which the drawer starts, m; 0 is closed and -0.16 fully open."""
_OPEN, _CLOSED, _PRESSED = -0.145, -0.015, -0.05
"""Joint values, m, from which a task counts as done; the button travels to -0.06."""


class DrawerButtonSimulator(SawyerXYZEnv):
    """Answers to the same calls as a Meta-World task class; ``task`` selects what ``step`` rewards.

    Its observation has the handle in the first object slot, the button's cap in the second, and a goal of zeros.
    """

    task: str = DRAWER_OPEN

    def __init__(self) -> None:
        super().__init__(hand_low=(-0.5, 0.40, 0.05), hand_high=(0.5, 1, 0.5))
        self.hand_init_pos = _HAND_START
        self._target_pos = np.zeros(3)
        self.goal_space = Box(self.hand_low, self.hand_high, dtype=np.float64)
        self._drawer = self.model.joint("goal_slidey").qposadr[0]
        self._button = self.model.joint(f"{PREFIX}btnbox_joint").qposadr[0]
        self._start = np.zeros(2)
        self._num_done = 0

    @property
    def skill(self) -> str:
        """The single task that is to be done now."""
        skills = self.task.split(JOINT)
        return skills[min(self._num_done, len(skills) - 1)]

    @property
    def model_name(self) -> str:
        return full_V3_path_for("sawyer_xyz/sawyer_drawer.xml")

    def _initialize_simulation(self) -> tuple[Any, Any]:
        scene = mujoco.MjSpec.from_file(self.model_name)
        button = mujoco.MjSpec.from_file(full_V3_path_for("sawyer_xyz/sawyer_button_press_topdown.xml"))
        scene.worldbody.add_frame().attach_body(button.body("box"), PREFIX, "")
        # Attaching copies every asset of the button's own scene, a second robot among them: 20 MiB that nothing shows.
        shown = {geom.meshname for geom in scene.geoms}
        for mesh in [mesh for mesh in scene.meshes if mesh.name not in shown]:
            mesh.delete()
        # The green marks that Meta-World draws at its goals would tell the task to a policy that sees.
        for site in (scene.site("goal"), scene.site(f"{PREFIX}hole"), scene.site(f"{PREFIX}buttonStart")):
            site.rgba = np.zeros(4)
        model = scene.compile()
        return model, mujoco.MjData(model)

    @property
    def achieved(self) -> tuple[str, ...]:
        """Every task of the scene whose condition holds now, whichever was asked for."""
        drawer, button = self.data.qpos[self._drawer], self.data.qpos[self._button]
        done = (drawer <= _OPEN, drawer >= _CLOSED, button <= _PRESSED)
        return tuple(task for task, is_done in zip(SCENE_TASKS, done, strict=True) if is_done)

    @property
    def _target_site_config(self) -> list[tuple[str, Array]]:
        return []

    def _get_pos_objects(self) -> Array:
        return np.concatenate((self._handle(), self._cap()))

    def _get_quat_objects(self) -> Array:
        return np.concatenate((self.data.body("drawer_link").xquat, self.data.body(f"{PREFIX}button").xquat))

    def _handle(self) -> Array:
        return self.data.body("drawer_link").xpos + _HANDLE_OFFSET

    def _cap(self) -> Array:
        return self.data.body(f"{PREFIX}button").xpos + _BUTTON_OFFSET

    def reset_model(self) -> Array:
        """The layout is drawn from ``np_random`` alone, so equal seeds give equal layouts for all three tasks."""
        self._reset_hand()
        rng = self.np_random
        side = 1.0 if rng.random() < 0.5 else -1.0
        self.model.body("drawer").pos = (side * rng.uniform(*_SIDE), rng.uniform(*_DRAWER_Y), 0.0)
        self.model.body(f"{PREFIX}box").pos = (-side * rng.uniform(*_SIDE), rng.uniform(*_BUTTON_Y), 0.115)
        self.data.qpos[self._drawer] = rng.uniform(*_DRAWER_START)
        self.data.qvel[self._drawer] = 0.0
        mujoco.mj_forward(self.model, self.data)
        self._start, self._num_done = self._joints(), 0
        return self._get_obs()

    def evaluate_state(self, obs: Array, action: Array) -> tuple[float, dict[str, Any]]:
        """Reward in [0, 10]: up to 2 for the fingers near the right object, up to 8 for moving it; 10 when done. Of two
        tasks in a row each gives half.
        """
        del obs, action
        achieved, count = self.achieved, 1 + self.task.count(JOINT)
        if self._num_done < count and self.skill in achieved:
            self._start, self._num_done = self._joints(), self._num_done + 1
        success = self._num_done == count
        if success and count > 1:
            achieved = (*achieved, self.task)
        progress, touch = self._progress()
        near = tolerance(
            float(np.linalg.norm(self.tcp_center - touch)), bounds=(0, 0.03), margin=0.4, sigmoid="long_tail"
        )
        reward = 10.0 if success else 10.0 * self._num_done / count + (2.0 * near + 8.0 * progress) / count
        return reward, {"success": float(success), "achieved": achieved}

    def _joints(self) -> Array:
        """(2,) m, of the drawer and of the button."""
        return self.data.qpos[[self._drawer, self._button]].copy()

    def _progress(self) -> tuple[float, Array]:
        """The share of the way done in [0, 1], and the (3,) point to touch."""
        drawer, button = self._start
        if self.skill == BUTTON_PRESS:
            now, start, end, touch = self.data.qpos[self._button], button, _PRESSED, self._cap()
        else:
            end = _OPEN if self.skill == DRAWER_OPEN else _CLOSED
            now, start, touch = self.data.qpos[self._drawer], drawer, self._handle()
        if end == start:
            return 1.0, touch
        return float(np.clip((now - start) / (end - start), 0.0, 1.0)), touch
