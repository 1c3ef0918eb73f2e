"""From a config to a finished run: checks the machine, starts or joins the store and Ray, and ends all it began."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import ray

from vla_dist.core.errors import ConfigError, ResourceMissing
from vla_dist.run import preflight
from vla_dist.run.access import require_access
from vla_dist.run.children import end_when_orphaned
from vla_dist.run.composition.learning import build_model_config
from vla_dist.run.composition.place import Place, build_spec
from vla_dist.run.config import RunConfig
from vla_dist.run.config_file import load_config
from vla_dist.run.controller import RunController
from vla_dist.run.files import CONFIG, SUMMARY, new_run_dir, write_atomically
from vla_dist.run.nodes import require_fit_nodes
from vla_dist.run.placement import Placement, survey_cluster
from vla_dist.run.prior_data import settle_archives
from vla_dist.run.serve_app import LOOPBACK, apply_serving_environment, has_serving_environment
from vla_dist.run.serve_settings import TOKEN_VARIABLE
from vla_dist.run.status import RunStatus
from vla_dist.run.store import STORE_VARIABLE, Store, open_store
from vla_dist.run.summary import RunSummary

_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""In the environment of drivers that Ray's jobs started."""
_NODE_START_S = 1800.0
"""What an autoscaler may take to launch the nodes that learner and replicas wait for, and to set them up."""


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
    if _JOB_VARIABLE in os.environ:
        end_when_orphaned()
    preflight.require(config, joins=is_joined())
    spec = build_spec(config)
    build_model_config(config, spec)  # What cannot work is refused before anything starts.
    if resume is None:
        config = settle_archives(config, spec)
    run_dir = _begin(config) if resume is None else _require_resumable(config, resume)
    on_status(RunStatus(preset=config.preset, run_dir=run_dir))
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(open_store(config, run_dir))
        stack.enter_context(ray_runtime(num_cpus=cpus_wanted(config), object_store_mb=config.object_store_mb))
        placement = survey_cluster() if is_joined() else Placement()
        if placement.is_cluster:
            config = fit_cluster(config, run_dir, store, placement)
        require_access(config)
        place = Place.of(config, run_dir, store, spec=spec)
        return RunController(place, placement, on_status, started_s=started_s, store_notes=store.notes).execute()


def fit_cluster(config: RunConfig, run_dir: Path, store: Store, placement: Placement) -> RunConfig:
    """The config with what a cluster's environment adds to it, once it is known that the cluster can run it.

    Raises:
        ConfigError, Unreachable: see ``require_fit_nodes``; or robots would need no token.
        ResourceMissing: no node takes a part, nor could; or only this machine reaches the store.
    """
    placement.require_room(config)
    alone = sum(node["Alive"] for node in ray.nodes()) == 1 and not placement.roles
    if store.is_local and not alone:
        raise ResourceMissing(
            f"the store of the run is a socket of this machine, and the cluster has other nodes; give "
            f"--replay.redis-url, or start the head with 'vla-dist cluster start-head', which sets {STORE_VARIABLE}"
        )
    if not alone:
        is_shared = not config.learner.checkpoints
        require_fit_nodes(store.urls, run_dir, folder_is_shared=is_shared)
    token = config.serving.token or os.environ.get(TOKEN_VARIABLE, "")
    if not (token or config.serving.tokens) and config.serving.host not in LOOPBACK:
        raise ConfigError(
            f"robots would reach the policy service without a token; give --serving.token, or {TOKEN_VARIABLE} in the "
            "environment of the head node (cluster files ship one)"
        )
    patience_s = max(config.serving.startup_timeout_s, _NODE_START_S)
    return replace(config, serving=replace(config.serving, token=token, startup_timeout_s=patience_s))


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


def is_joined() -> bool:
    """Whether Ray runs already, and this process only joins it."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextlib.contextmanager
def ray_runtime(*, num_cpus: int, object_store_mb: int = 100) -> Iterator[None]:
    """Ray embedded in this process, or the cluster that RAY_ADDRESS names, ready for Serve.

    Args:
        num_cpus: logical ones that the parts will ask for. They may share cores: on one machine Ray's count is an
            address book, not a limit.
    """
    joined = is_joined()
    if not (joined and has_serving_environment()):
        apply_serving_environment()
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
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
