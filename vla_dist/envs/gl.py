"""Which OpenGL a machine without a screen can draw with, found without risking this process.

Drawing needs a system library (EGL or OSMesa) that pip cannot install. A missing or broken one may abort the process
that tries it, so each is tried in a child. Work on state alone needs none of this: importing this module before any
other one that imports MuJoCo keeps it so, whatever ``MUJOCO_GL`` says.
"""

import ctypes
import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Mapping
from types import MappingProxyType, ModuleType

from vla_dist.core.errors import ResourceMissing

_LIBRARIES: Mapping[str, str] = MappingProxyType({"egl": "libEGL.so.1", "osmesa": "libOSMesa.so.8"})
_PROBE_TIMEOUT_S = 60.0
_PACKAGES = "sudo apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri (or libosmesa6)"

# Draws one red pixel's worth of scene; run as `python -c`, with MUJOCO_GL naming the backend.
_PROBE = """
import importlib, os, numpy, mujoco
context = importlib.import_module("mujoco." + os.environ["MUJOCO_GL"]).GLContext(16, 16)
context.make_current()
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><light pos='0 0 3'/><geom size='1' rgba='1 0 0 1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
scene = mujoco.MjvScene(model, 10)
mujoco.mjv_updateScene(model, data, mujoco.MjvOption(), None, mujoco.MjvCamera(), 7, scene)
drawing = mujoco.MjrContext(model, 100)
mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, drawing)
pixels = numpy.zeros((16, 16, 3), numpy.uint8)
mujoco.mjr_render(mujoco.MjrRect(0, 0, 16, 16), scene, drawing)
mujoco.mjr_readPixels(pixels, None, mujoco.MjrRect(0, 0, 16, 16), drawing)
drawing.free()
context.free()
os._exit(0 if pixels.any() else 3)
"""


def _import_mujoco() -> ModuleType:
    """The ``mujoco`` module, also where ``MUJOCO_GL`` names a library that this machine lacks.

    ``import mujoco`` would fail there even for work on state alone; GL is then switched off for the import only.
    Renderers of this package name their backend themselves (``require_gl``) and do not mind.
    """
    wanted = _wanted()
    library = _LIBRARIES.get(wanted)
    if "mujoco" in sys.modules or library is None or _loads(library):
        return importlib.import_module("mujoco")
    os.environ["MUJOCO_GL"] = "disable"
    try:
        return importlib.import_module("mujoco")
    finally:
        os.environ["MUJOCO_GL"] = wanted


def find_gl() -> str | None:
    """``"egl"``, ``"osmesa"`` or None: the first that truly draws here; ``MUJOCO_GL`` limits the choice to its own.

    Blocking: about a second for each backend tried, once in a process for each value of ``MUJOCO_GL``.
    """
    return _find(_wanted())


def require_gl() -> str:
    """The backend of ``find_gl``, also written to ``MUJOCO_GL`` for simulators that draw by themselves.

    Raises:
        ResourceMissing: nothing draws; the message names the Debian packages.
    """
    wanted = _wanted()
    found = _find(wanted)
    if found is None:
        tried = f"MUJOCO_GL={wanted}" if wanted else "EGL and OSMesa"
        unset = " and unset MUJOCO_GL" if wanted else ""
        raise ResourceMissing(
            f"this machine cannot draw images ({tried} failed), which cameras and videos need: "
            f"{_PACKAGES}{unset}, or run on state alone without cameras"
        )
    os.environ["MUJOCO_GL"] = found
    return found


def _wanted() -> str:
    return os.environ.get("MUJOCO_GL", "").lower().strip()


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


@functools.cache
def _find(wanted: str) -> str | None:
    candidates = [wanted] if wanted else list(_LIBRARIES)
    return next((name for name in candidates if name in _LIBRARIES and _draws(name)), None)


def _draws(backend: str) -> bool:
    environment = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
    try:
        child = subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return child.returncode == 0


mujoco = _import_mujoco()
