import os
import subprocess
import sys

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, ResourceMissing
from vla_dist.core.specs import CameraSpec
from vla_dist.envs import gl
from vla_dist.envs.metaworld import MetaWorldEnv

_STATE_ONLY = """
import sys
from vla_dist.envs.metaworld import MetaWorldEnv
import numpy as np
env = MetaWorldEnv(("reach", "scene/drawer-open"))
for task in env.tasks:
    env.reset(seed=0, task=task)
    env.step(np.zeros(4, np.float32))
env.close()
loaded = open("/proc/self/maps").read()
print([name for name in ("libEGL", "libOSMesa", "libGLX", "swrast") if name in loaded])
"""


@pytest.fixture
def no_backend(monkeypatch: pytest.MonkeyPatch):
    """A machine on which no probe succeeds."""
    gl._find.cache_clear()
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(gl, "_PROBE", "raise SystemExit(1)")
    yield
    gl._find.cache_clear()


@pytest.mark.parametrize("backend", ["", "egl", "osmesa", "disable"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process map of Linux")
def test_state_only_work_starts_no_graphics_whatever_mujoco_gl_says(backend: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    if backend:
        environment["MUJOCO_GL"] = backend
    child = subprocess.run(
        [sys.executable, "-c", _STATE_ONLY], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert child.returncode == 0, child.stderr
    if backend in ("", "disable"):
        assert child.stdout.strip() == "[]"


def test_a_machine_that_cannot_draw_names_the_packages(no_backend: None) -> None:
    assert gl.find_gl() is None
    with pytest.raises(ResourceMissing, match=r"libegl1.*libosmesa6.*without cameras"):
        gl.require_gl()
    env = MetaWorldEnv(("reach",), cameras=(CameraSpec(name="table", height=84, width=84),))
    with pytest.raises(ResourceMissing, match="apt-get install"):
        env.reset(seed=0, task="reach")


def test_a_backend_that_was_asked_for_is_the_only_one_tried(no_backend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    with pytest.raises(ResourceMissing, match=r"MUJOCO_GL=osmesa failed.*unset MUJOCO_GL"):
        gl.require_gl()


def test_a_hanging_probe_counts_as_a_failure(no_backend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gl, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(gl, "_PROBE_TIMEOUT_S", 0.2)
    assert gl.find_gl() is None


@pytest.fixture(scope="module")
def env():
    if gl.find_gl() is None:
        pytest.skip("this machine cannot draw")
    cameras = (CameraSpec(name="table", height=84, width=84), CameraSpec(name="corner2", height=64, width=96))
    env = MetaWorldEnv(("scene/drawer-open", "window-open"), cameras=cameras)
    yield env
    env.close()


@pytest.mark.gl
def test_observations_hold_each_camera_at_its_size(env: MetaWorldEnv) -> None:
    images = env.reset(seed=0, task="scene/drawer-open").observation.images
    assert {name: image.shape for name, image in images.items()} == {"table": (84, 84, 3), "corner2": (64, 96, 3)}
    assert all(image.dtype == np.uint8 and image.std() > 10 for image in images.values())


@pytest.mark.gl
def test_drawer_and_button_are_visible_and_upright(env: MetaWorldEnv) -> None:
    for seed in range(3):
        env.reset(seed=seed, task="scene/drawer-open")
        frame = env.render().astype(int)
        red, green, blue = np.moveaxis(frame, 2, 0)
        drawer = (green > red + 30) & (green > blue + 30)
        box = (red > 150) & (green > 90) & (blue < 60)
        assert drawer.sum() > 400
        assert box.sum() > 400
        # The yellow lid is above the black body: dark pixels lie below the lid's centre, not above it.
        rows, columns = np.nonzero(box)
        row, column = int(np.median(rows)), int(np.median(columns))
        dark = frame.max(axis=2)[:, max(0, column - 8) : column + 8] < 60
        assert dark[row:].sum() > dark[:row].sum()


@pytest.mark.gl
@pytest.mark.parametrize("camera", ["corner", "corner2", "corner3", "corner4"])
def test_corner_views_are_not_upside_down(env: MetaWorldEnv, camera: str) -> None:
    """The red arm stands above the wooden table."""
    env.reset(seed=0, task="window-open")
    red, green, blue = np.moveaxis(env.render(camera).astype(int), 2, 0)
    arm = (red > 90) & (green < 45) & (blue < 45)
    wood = (abs(red - 120) < 50) & (red > green + 10) & (green > blue) & (green > 60)
    assert np.nonzero(arm)[0].mean() < np.nonzero(wood)[0].mean()


@pytest.mark.gl
def test_an_action_changes_the_picture(env: MetaWorldEnv) -> None:
    before = env.reset(seed=0, task="window-open").observation.images["table"]
    for _ in range(10):
        step = env.step(np.array([1, 0, 0, 1], np.float32))
    assert np.abs(step.observation.images["table"].astype(int) - before).max() > 50


@pytest.mark.gl
def test_an_unknown_camera_is_refused(env: MetaWorldEnv) -> None:
    env.reset(seed=0, task="window-open")
    with pytest.raises(ConfigError, match="no camera 'nose'; this scene has table, topview"):
        env.render("nose")


@pytest.mark.gl
def test_a_process_that_forgets_to_close_ends_quietly() -> None:
    if gl.find_gl() is None:
        pytest.skip("this machine cannot draw")
    script = (
        "from vla_dist.envs.metaworld import MetaWorldEnv\n"
        "env = MetaWorldEnv(('reach',)); env.reset(seed=0, task='reach'); env.render()"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (child.returncode, child.stderr) == (0, "")
