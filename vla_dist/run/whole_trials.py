"""Trials that are runs of their own: they collect, train, serve and judge with other settings, each in a child process
with a Ray and a Redis of its own."""

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune

from vla_dist.core.errors import WorkerFailed
from vla_dist.run.children import die_with_parent
from vla_dist.run.config import RunConfig
from vla_dist.run.files import CONFIG, SUMMARY
from vla_dist.run.serve_app import free_ports
from vla_dist.run.tuning import with_settings

_MAX_S = 24 * 3600.0
_LOG = "log.txt"
_SHOWN = 600
"""Last characters of a log that tell why a trial failed."""


def trial_of_run(config: RunConfig, environment: Mapping[str, str]) -> Any:
    """For ``search``.

    Args:
        config: what the points change.
        environment: of the child processes; not that of Ray's workers, in which a Ray is running already.
    """
    return tune.with_parameters(_run_trial, config=config, environment=dict(environment))


def _run_trial(settings: dict[str, Any], *, config: RunConfig, environment: dict[str, str]) -> None:
    folder = Path(tune.get_context().get_trial_dir()) / "run"
    summary = run_to_the_end(with_settings(config, settings), folder, environment)
    last = summary["versions"][-1]
    tune.report({"updates": float(last["updates"]), "loss": math.nan, "success": float(last["success_mean"])})


def run_to_the_end(config: RunConfig, folder: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """The summary of a run in a folder of its own, which another call with the same folder goes on with.

    Raises:
        WorkerFailed: with the end of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CONFIG).exists():
        (port,) = free_ports(1)
        own = replace(config, runs_dir=str(folder.parent), serving=replace(config.serving, port=port))
        (folder / CONFIG).write_text(own.to_json())
    words = [sys.executable, "-m", "vla_dist.cli", "run", config.preset, "--resume", str(folder)]
    with (folder / _LOG).open("a") as log:
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(environment), preexec_fn=die_with_parent
        )
        try:
            status = child.wait(_MAX_S)
        finally:
            child.terminate()
    if status:
        told = (folder / _LOG).read_text()[-_SHOWN:].strip()
        raise WorkerFailed(f"the run in {folder} ended with status {status}: {told}")
    return dict(json.loads((folder / SUMMARY).read_text()))
