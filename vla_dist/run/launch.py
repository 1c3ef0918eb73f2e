"""From a config to a finished run: checks the machine, starts or joins the store and Ray, and ends all it began."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ray

from vla_dist.core.errors import ConfigError
from vla_dist.run import preflight
from vla_dist.run.build import Place, build_model_config, build_spec
from vla_dist.run.config import RunConfig, load_config
from vla_dist.run.controller import RunController
from vla_dist.run.files import CONFIG, SUMMARY, new_run_dir, write_atomically
from vla_dist.run.serve_app import apply_serving_environment
from vla_dist.run.status import RunStatus
from vla_dist.run.store import open_store
from vla_dist.run.summary import RunSummary


def launch(config: RunConfig, on_status: Callable[[RunStatus], None], *, resume: Path | None = None) -> RunSummary:
    """Run to the end. Ctrl-C ends everything within seconds and leaves what ``resume`` needs.

    Args:
        resume: folder of an earlier run, whose config must be this one.

    Raises:
        ConfigError: the folder's run has another config, or is finished; or no such model can be built.
        ResourceMissing: memory, a port or a program is missing.
        Unreachable: the given Redis does not answer.
        WorkerFailed: a part failed more often than allowed.
    """
    started_s = time.monotonic()
    preflight.require(config)
    spec = build_spec(config)
    build_model_config(config, spec)  # What cannot work is refused before anything starts.
    run_dir = _begin(config) if resume is None else _require_resumable(config, resume)
    on_status(RunStatus(preset=config.preset, run_dir=run_dir))
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(open_store(config, run_dir))
        stack.enter_context(ray_runtime(num_cpus=cpus_wanted(config), object_store_mb=config.object_store_mb))
        place = Place.of(config, run_dir, store, spec=spec)
        return RunController(place, on_status, started_s=started_s).execute()


def _begin(config: RunConfig) -> Path:
    run_dir = new_run_dir(Path(config.runs_dir), config.preset)
    write_atomically(run_dir / CONFIG, config.to_json())
    return run_dir


def _require_resumable(config: RunConfig, run_dir: Path) -> Path:
    if load_config(run_dir / CONFIG) != config:
        raise ConfigError(f"{run_dir} was run with another config; resume it without options, or start a new run")
    if (run_dir / SUMMARY).exists():
        raise ConfigError(f"{run_dir.name} is finished, its report is {run_dir / SUMMARY}; start a new run")
    return run_dir


@contextlib.contextmanager
def ray_runtime(*, num_cpus: int, object_store_mb: int = 100) -> Iterator[None]:
    """Ray embedded in this process, or the cluster that RAY_ADDRESS names, ready for Serve.

    Args:
        num_cpus: logical ones that the parts will ask for. They may share cores: on one machine Ray's count is an
            address book, not a limit.
    """
    apply_serving_environment()
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    joined = bool(os.environ.get("RAY_ADDRESS"))
    settings = (
        {}
        if joined
        else {
            "num_cpus": max(os.cpu_count() or 1, num_cpus),
            "object_store_memory": object_store_mb * 2**20,
            "include_dashboard": False,
        }
    )
    for name in ("ray", "ray.serve", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler would end this process at once, without ending what it started.
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        ray.shutdown()


def cpus_wanted(config: RunConfig) -> int:
    """Logical CPUs that all parts of a run ask Ray for at once."""
    return (
        config.rollout.num_workers
        + config.learner.num_workers
        + config.serving.num_replicas
        + config.evaluation.num_workers
        + bool(config.replay.archive)
        + 2  # the fleet, and the film
    )
