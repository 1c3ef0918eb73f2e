"""Unary calls that may be asked again: the death of a replica costs a pause, not an error."""

import random
import time
from collections.abc import Callable
from typing import Any

import grpc

from vla_dist.core.errors import DeadlineExceeded
from vla_dist.protocol.status import RETRYABLE_CODES, error_of

_ATTEMPTS = 3
_FIRST_PAUSE_S = 0.1


def call_idempotent(
    method: Callable[..., Any],
    request: Any,
    *,
    timeout_s: float,
    metadata: tuple[tuple[str, str], ...],
    address: str,
) -> Any:
    """The response; a call that found no server, or lost it, is made up to three times within its time.

    Args:
        method: of a stub; asking it twice must do no harm.

    Raises:
        DeadlineExceeded: no answer within ``timeout_s``, pauses included.
        Unreachable: nobody answered, the third time too. Whatever else the server answered, at once.
    """
    deadline = time.monotonic() + timeout_s
    pause_s = _FIRST_PAUSE_S
    for attempts_left in reversed(range(_ATTEMPTS)):
        try:
            return method(request, timeout=max(0.0, deadline - time.monotonic()), metadata=metadata)
        except grpc.RpcError as error:
            failure: Any = error
            if failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED and failure.details() == "Deadline Exceeded":
                raise DeadlineExceeded(
                    f"{address} did not answer in time; check its load, or allow more time"
                ) from error
            # Robots that lost the same replica must not come back together.
            pause_s *= random.uniform(1.0, 2.0)
            is_over = not attempts_left or time.monotonic() + pause_s >= deadline
            if failure.code() not in RETRYABLE_CODES or is_over:
                raise error_of(failure.code(), failure.details(), address=address) from error
            time.sleep(pause_s)
    raise AssertionError("the last attempt returns or raises")
