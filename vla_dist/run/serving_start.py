"""Serve started beside everything else, and given up without a trace when the run ends first."""

import threading
from collections.abc import Callable
from functools import partial

from vla_dist.core.errors import WaitTimeout
from vla_dist.run.access import access_of
from vla_dist.run.composition.place import Place
from vla_dist.run.composition.services import build_services
from vla_dist.run.placement import Placement
from vla_dist.run.roles import SERVING
from vla_dist.run.serve_app import ServingHandle, start_serving

_JOIN_TIMEOUT_S = 60.0

Start = Callable[[Callable[[], bool]], ServingHandle]
"""Starts the service; asks its argument now and then whether to give up."""


class ServingStart:
    """Runs ``start`` in a thread.

    ``close`` waits for that thread: a call to Serve after Ray is gone would start another Ray.
    """

    def __init__(self, start: Start) -> None:
        self._start = start
        self._cancelled = threading.Event()
        self._handle: ServingHandle | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="serving-start", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> ServingHandle:
        """The running service. Raises what starting it raised, or WaitTimeout when it is not done."""
        if self._error is not None:
            raise self._error
        if self._handle is None:
            raise WaitTimeout("the policy service is still starting; wait until is_done")
        return self._handle

    def close(self) -> None:
        """End the service, or the start of it."""
        self._cancelled.set()
        self._thread.join(_JOIN_TIMEOUT_S)
        if self._handle is not None:
            self._handle.close()

    def _run(self) -> None:
        try:
            self._handle = self._start(self._cancelled.is_set)
        except BaseException as error:  # noqa: BLE001  result() hands it to the run controller
            self._error = error


def serve_place(
    place: Place,
    placement: Placement,
    is_cancelled: Callable[[], bool],
    *,
    port: int | None = None,
    explores: bool = False,
) -> ServingHandle:
    """The policy service of a run, as its config wants it. Raises what ``start_serving`` raises.

    Args:
        port: in place of the config's.
        explores: see ``build_services``.
    """
    settings, shares = place.config.serving, place.config.placement
    return start_serving(
        partial(build_services, place, explores=explores),
        host=settings.host or ("0.0.0.0" if placement.is_cluster else "127.0.0.1"),
        public_host=placement.gateway_ip,
        port=settings.port if port is None else port,
        num_replicas=settings.num_replicas,
        num_cpus=shares.replica_cpus,
        num_gpus=shares.replica_gpus,
        resources=placement.slot(SERVING),
        access=access_of(settings, place.run_dir),
        timeout_s=settings.startup_timeout_s,
        is_cancelled=is_cancelled,
    )
