"""What a machine has, asked before anything is started: each lack is one sentence that says what to do."""

import importlib.util
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import psutil

from vla_dist.core.errors import ResourceMissing, VlaDistError
from vla_dist.envs.gl import find_gl, require_gl
from vla_dist.replay.server import find_server_program
from vla_dist.run.config import RunConfig
from vla_dist.run.serve_app import remove_orphans, require_free_port
from vla_dist.run.store import STORE_VARIABLE

_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of ``vla-dist doctor``."""

    name: str
    ok: bool
    text: str
    needed_for: str = "everything"


def require(config: RunConfig, *, joins: bool = False) -> None:
    """Raise ResourceMissing for the first thing that this run cannot do without.

    Args:
        joins: a cluster, whose other nodes do the work, and whose Serve may hold the port for this run already.
    """
    if not joins:
        require_memory(config.min_memory_gib)
        remove_orphans()
        require_free_port("127.0.0.1", config.serving.port)
    if not (config.replay.redis_url or os.environ.get(STORE_VARIABLE)):
        find_server_program()
    if config.env.cameras:
        require_gl()


def require_memory(min_gib: float) -> None:
    available = available_memory_bytes() / _GIB
    if available < min_gib:
        raise ResourceMissing(
            f"{available:.1f} GiB of memory are available, this run needs {min_gib:.1f}; close other programs, "
            "choose a smaller preset, or lower --min-memory-gib at your own risk"
        )


def available_memory_bytes() -> int:
    """Free memory of the machine, or what its container's limit leaves, if that is less."""
    available = psutil.virtual_memory().available
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            text = limit.read().strip()
            if text != "max":
                available = min(available, max(0, int(text) - int(used.read())))
    except OSError:
        pass
    return available


def findings(port: int = 9000) -> Iterator[Finding]:
    """Everything ``vla-dist doctor`` tells, one at a time: some take a second."""
    yield Finding(
        name="Python",
        ok=tuple(map(int, platform.python_version_tuple()[:2])) >= (3, 10),
        text=f"{platform.python_version()} on {platform.platform()}; 3.10 or newer is needed",
    )
    yield Finding(name="processor", ok=True, text=f"{os.cpu_count()} cores; the demo is made for 2")
    available = available_memory_bytes() / _GIB
    yield Finding(
        name="memory", ok=available >= 5, text=f"{available:.1f} GiB available; the demo needs 5", needed_for="demo"
    )
    for package, use in _PACKAGES.items():
        found = importlib.util.find_spec(package) is not None
        text = "installed" if found else f"missing: pip install 'vla-dist[{use}]'"
        yield Finding(name=package, ok=found, text=text, needed_for=use)
    yield _attempt("Redis server", "replay", find_server_program)
    yield _attempt("language model", "models", _language_model)
    yield _graphics()
    yield _accelerator()
    yield _attempt("gRPC port", "serving", partial(_free_port, port))


_PACKAGES = {
    "numpy": "robot",
    "grpc": "robot",
    "ray": "cluster",
    "torch": "cluster",
    "transformers": "cluster",
    "pyarrow": "cluster",
    "redis": "cluster",
    "metaworld": "sim",
    "mujoco": "sim",
    "minigrid": "sim",
}


def _attempt(name: str, needed_for: str, action) -> Finding:
    try:
        return Finding(name=name, ok=True, text=str(action()), needed_for=needed_for)
    except VlaDistError as error:
        return Finding(name=name, ok=False, text=str(error), needed_for=needed_for)


def _free_port(port: int) -> str:
    require_free_port("127.0.0.1", port)
    return f"{port} is free"


def _language_model() -> str:
    from vla_dist.models.language_encoder import MINILM, language_model_path

    return f"{MINILM} at {language_model_path(MINILM)}"


def _graphics() -> Finding:
    found = find_gl()
    text = (
        f"MuJoCo draws with {found}"
        if found
        else (
            "MuJoCo cannot draw; state-only work does not need it. For cameras and videos: "
            "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri (or libosmesa6)"
        )
    )
    return Finding(name="graphics", ok=found is not None, text=text, needed_for="cameras and videos")


def _accelerator() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding(name="GPU", ok=False, text="torch is not installed", needed_for="speed")
    import torch

    if torch.cuda.is_available():
        return Finding(name="GPU", ok=True, text=torch.cuda.get_device_name(0), needed_for="speed")
    return Finding(name="GPU", ok=True, text="none; everything runs on the CPU", needed_for="speed")
