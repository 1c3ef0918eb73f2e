"""The policy service as an application of ``serve deploy`` and of KubeRay's RayService: deploy/serve.yaml names it.

A run serves by itself while it lasts; this serves what a run has learnt, for as long as the cluster lives, and follows
what is published under the same name later.
"""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ray import serve

from vla_dist.core.errors import ConfigError, NotFound
from vla_dist.run.access import access_of
from vla_dist.run.composition.place import Place
from vla_dist.run.composition.services import build_services
from vla_dist.run.config_file import load_config
from vla_dist.run.files import CONFIG
from vla_dist.run.serve_app import FleetReplica
from vla_dist.run.serve_settings import TOKEN_VARIABLE
from vla_dist.run.store import open_store

_ARGUMENTS = {"run", "tokens"}


def build(args: dict[str, Any]) -> serve.Application:
    """The application.

    Args:
        args: ``run`` is the folder of a run on a file system that serving nodes share; ``tokens``, where it is given,
            a file of tokens with roles there.

    Raises:
        ConfigError: other arguments, a run whose replay lies on a socket of its own machine, or no token.
        NotFound: no run lies there.
    """
    if not {"run"} <= set(args) <= _ARGUMENTS:
        raise ConfigError(
            f"args {sorted(args)} of the Serve config must be 'run', and 'tokens' at most; see deploy/serve.yaml"
        )
    run_dir = Path(args["run"])
    if not (run_dir / CONFIG).exists():
        raise NotFound(f"{run_dir} is not the folder of a run: it has no {CONFIG}; name one that all serving nodes see")
    place = _place(run_dir)
    settings = place.config.serving
    token = settings.token or os.environ.get(TOKEN_VARIABLE, "")
    access = access_of(replace(settings, token=token, tokens=args.get("tokens", settings.tokens)), run_dir)
    if access.token is access.tokens_file is None:
        raise ConfigError(f"robots would need no token; set {TOKEN_VARIABLE} in the environment of the head node")
    shares = place.config.placement
    deployment = serve.deployment(FleetReplica).options(
        name="FleetReplica",
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=1.0,
        health_check_period_s=2.0,
        ray_actor_options={
            "num_cpus": shares.replica_cpus,
            "num_gpus": shares.replica_gpus,
            "resources": {"serving": 1},
        },
    )
    return deployment.bind(partial(build_services, place), access)


def _place(run_dir: Path) -> Place:
    config = load_config(run_dir / CONFIG)
    with open_store(config, run_dir) as store:
        if store.is_local:
            raise ConfigError(
                f"the replay of {run_dir} is a socket of the machine it ran on; serve it there: vla-dist serve"
            )
        return Place.of(config, run_dir, store)
