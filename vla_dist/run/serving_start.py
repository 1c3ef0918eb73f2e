"""Serve started beside everything else, and given up without a trace when the run ends first."""

import threading
from collections.abc import Callable

from vla_dist.core.errors import WaitTimeout
from vla_dist.run.serve_app import ServingHandle

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
