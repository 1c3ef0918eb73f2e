"""A finished or stopped run, opened again: its store answers as long as the block runs."""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from vla_dist.core.errors import NotFound
from vla_dist.run.composition.place import Place
from vla_dist.run.composition.services import build_services
from vla_dist.run.config_file import load_config
from vla_dist.run.files import CONFIG
from vla_dist.run.priority import answer_promptly
from vla_dist.run.store import existing_store_url, open_store
from vla_dist.serving.authorisation import AccessConfig


@contextlib.contextmanager
def reopen(run_dir: Path) -> Iterator[Place]:
    """The place of a run that is not running now.

    Raises:
        NotFound: no run lies there.
        ResourceMissing: the run is still going on.
    """
    if not (run_dir / CONFIG).exists():
        raise NotFound(f"{run_dir} is not the folder of a run: it has no {CONFIG}; runs lie in runs/<preset>-<time>")
    run_dir = run_dir.resolve()
    config = load_config(run_dir / CONFIG)
    with open_store(config, run_dir, existing_url=existing_store_url(run_dir)) as store:
        yield Place.of(config, run_dir, store)


def service_id(place: Place) -> str:
    """What robots may pin their service to: the same for as long as the run's registry lives."""
    from vla_dist.registry.canaries import RedisCanaries
    from vla_dist.serving.state_sealing import service_id_of

    with contextlib.closing(RedisCanaries(place.redis_url)) as canaries:
        return service_id_of(canaries.service_key())


def serve_single(place: Place, *, host: str, port: int, access: AccessConfig, on_ready: Callable[[str], None]) -> None:
    """One process on plain grpc.aio, until Ctrl-C: for one machine and few robots."""
    from vla_dist.serving.event_log import EventLog
    from vla_dist.serving.server import SingleServer

    tokens = access.token_check()
    service, ingest = build_services(place)
    audit = EventLog(access.audit)
    with SingleServer(service, ingest=ingest, host=host, port=port, tokens=tokens, audit=audit) as server:
        answer_promptly()
        on_ready(server.address)
        _wait_for_ctrl_c()


def serve_fleet(
    place: Place, *, host: str, port: int, access: AccessConfig, num_replicas: int, on_ready: Callable[[str], None]
) -> None:
    """Ray Serve with several replicas, until Ctrl-C."""
    from vla_dist.run.launch import ray_runtime
    from vla_dist.run.serve_app import start_serving

    with (
        ray_runtime(num_cpus=num_replicas + 1),
        start_serving(
            partial(build_services, place), host=host, port=port, num_replicas=num_replicas, num_cpus=1, access=access
        ) as serving,
    ):
        on_ready(serving.address)
        _wait_for_ctrl_c()


def _wait_for_ctrl_c() -> None:
    while True:
        time.sleep(3600)
