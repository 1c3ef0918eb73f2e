"""The store and the registry of a run, whether the run lives or has ended: for those who only look at them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from vla_dist.core.errors import NotFound
from vla_dist.registry.blobs import open_blobs
from vla_dist.registry.store import RedisPolicyRegistry
from vla_dist.replay.external import require_server
from vla_dist.replay.server import running_server_url
from vla_dist.run.composition.stores import blobs_location
from vla_dist.run.config_file import load_config
from vla_dist.run.files import CONFIG, IMAGES, REDIS, find_run_dir
from vla_dist.run.store import Store, existing_store_url, open_store


@contextlib.contextmanager
def reach_store(run_dir: Path | None) -> Iterator[Store]:
    """A store that answers for as long as the block runs: the one in use by a run, or else one opened again.

    Args:
        run_dir: folder of the run; None: the newest one in ``runs/``.

    Raises:
        NotFound: no run lies there.
        ConfigError: a config of another version.
        ResourceMissing, Unreachable: as ``open_store``.
    """
    run_dir = (run_dir or find_run_dir(Path("runs"))).resolve()
    if not (run_dir / CONFIG).exists():
        raise NotFound(f"{run_dir} is not the folder of a run: it has no {CONFIG}; runs lie in runs/<preset>-<time>")
    config = load_config(run_dir / CONFIG)
    running = None if config.replay.redis_url else running_server_url(run_dir / REDIS)
    if running is None:
        with open_store(config, run_dir, existing_url=existing_store_url(run_dir)) as store:
            yield store
    else:
        images = config.replay.images_redis_url or running_server_url(run_dir / IMAGES)
        yield Store(redis_url=running, images_url=images)


@contextlib.contextmanager
def reach_registry(run_dir: Path | None, *, redis_url: str = "", blobs: str = "") -> Iterator[RedisPolicyRegistry]:
    """The registry of a run, or the one at ``redis_url``.

    Args:
        run_dir: as in ``reach_store``.
        blobs: where its tensors lie; empty: where the run's config says, or in ``redis_url``.

    Raises:
        Unreachable: nothing answers at ``redis_url``.
        NotFound, ConfigError, ResourceMissing: as ``reach_store``.
    """
    with contextlib.ExitStack() as stack:
        if redis_url:
            require_server(redis_url)
            location = blobs or redis_url
        else:
            run_dir = (run_dir or find_run_dir(Path("runs"))).resolve()
            redis_url = stack.enter_context(reach_store(run_dir)).redis_url
            location = blobs or blobs_location(load_config(run_dir / CONFIG), run_dir, redis_url)
        yield stack.enter_context(contextlib.closing(RedisPolicyRegistry(redis_url, open_blobs(location))))
