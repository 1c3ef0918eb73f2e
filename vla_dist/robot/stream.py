"""One Control call: requests go in from the robot's thread, answers come out on a thread of this module.

who            consumes            waits for                 unblocked by
robot thread   events              opened, answer, break     the reader, or its deadline
gRPC sender    the request queue   a request                 send, end
reader         the call            a response                the server, cancel
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from vla_dist.core.errors import Unreachable, VlaDistError
from vla_dist.protocol.status import error_of
from vla_dist.protocol.v1 import policy_pb2

Requests = Iterator[policy_pb2.ControlRequest]
StartCall = Callable[[Requests], Any]
"""Starts the bidirectional call on an iterator of requests; returns gRPC's call object."""


class ControlStream:
    """A Control call from its start to its end.

    ``on_change`` is called on the reader's thread after each response and at the end; it must not block for long.
    """

    def __init__(
        self,
        start_call: StartCall,
        first: policy_pb2.ControlRequest,
        *,
        address: str,
        on_response: Callable[["ControlStream", policy_pb2.ControlResponse], None],
        on_end: Callable[["ControlStream"], None],
    ) -> None:
        self.error: VlaDistError | None = None
        """Why the stream ended; None while it runs, or where the server ended it without an error."""
        self.code: grpc.StatusCode | None = None
        self.is_open = False
        """Whether the server granted the session."""
        self.has_ended = False
        self._address = address
        self._on_response = on_response
        self._on_end = on_end
        self._requests: queue.SimpleQueue[policy_pb2.ControlRequest | None] = queue.SimpleQueue()
        self._requests.put(first)
        self._call = start_call(iter(self._requests.get, None))
        self._reader = threading.Thread(target=self._read, name="control-stream", daemon=True)

    def start(self) -> None:
        """Begin to read; the owner knows the stream by now, so no response is taken for a stranger's."""
        self._reader.start()

    def send(self, request: policy_pb2.ControlRequest) -> None:
        self._requests.put(request)

    def leave(self, goodbye: policy_pb2.ControlGoodbye | None = None) -> None:
        """Say goodbye and do not wait for the server's."""
        self.send(policy_pb2.ControlRequest(goodbye=goodbye or policy_pb2.ControlGoodbye()))
        self._requests.put(None)

    def end(self, *, timeout_s: float, goodbye: policy_pb2.ControlGoodbye | None = None) -> None:
        """Say goodbye and let the server end the call; cancel it where it does not."""
        self.leave(goodbye)
        self._reader.join(timeout_s)
        self.cancel()

    def cancel(self) -> None:
        self._requests.put(None)
        self._call.cancel()

    def _read(self) -> None:
        try:
            for response in self._call:
                self._on_response(self, response)
            self.code = grpc.StatusCode.OK
        except grpc.RpcError as error:
            with contextlib.suppress(AttributeError):
                self.code = error.code()  # type: ignore[attr-defined]
                self.error = error_of(self.code, error.details(), address=self._address)  # type: ignore[attr-defined]
        except VlaDistError as error:
            # Whoever answered is not who was asked: the right one may answer the next time.
            is_stranger = isinstance(error, Unreachable)
            self.code = grpc.StatusCode.UNAVAILABLE if is_stranger else grpc.StatusCode.INTERNAL
            self.error = error
            self._call.cancel()
        finally:
            self._requests.put(None)
            self.has_ended = True
            self._on_end(self)
