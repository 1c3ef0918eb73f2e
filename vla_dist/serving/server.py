"""One gRPC server in this process: for a single robot, for tests, and for a machine without Ray."""

import asyncio
import concurrent.futures
import threading
from types import TracebackType

import grpc

from vla_dist.core.errors import ConfigError, ResourceMissing, Unreachable, WaitTimeout
from vla_dist.protocol.v1 import channels_pb2_grpc, fleet_pb2_grpc, policy_pb2_grpc
from vla_dist.serving.authorisation import TokenCheck
from vla_dist.serving.channel_servicer import ChannelServicer
from vla_dist.serving.event_log import EventLog
from vla_dist.serving.fleet_servicer import FleetServicer
from vla_dist.serving.gate import Gate
from vla_dist.serving.ingest import FleetIngest
from vla_dist.serving.policy_servicer import PolicyServicer
from vla_dist.serving.service import PolicyService

MAX_MESSAGE_BYTES = 64 * 2**20
"""A segment of 32 steps with two 224 x 224 cameras has 10 MB, gRPC's own limit is 4 MB."""


class SingleServer:
    """``grpc.aio`` on an event loop in a thread of its own; it owns and shuts down what it serves.

    Args:
        service: the policies; its ``versions`` must be started. None offers no PolicyService.
        ingest: where the fleet's segments go; None offers no FleetService.
        host: address to bind, loopback unless told otherwise.
        port: 0 picks a free one, see ``port``.
        token: bearer token that every call must bring; None lets everybody in.
        tokens: who may call, in place of ``token``: several tokens with roles.
        audit: where refusals go; None: the process's log.
        max_message_bytes: larger messages are refused before they are read.
    """

    def __init__(
        self,
        service: PolicyService | None,
        *,
        ingest: FleetIngest | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        tokens: TokenCheck | None = None,
        audit: EventLog | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        if token is not None and tokens is not None:
            raise ConfigError("token and tokens are two ways to say who may call; give one of them")
        self.host = host
        self.port = port
        self._service = service
        self._ingest = ingest
        self._tokens = tokens or TokenCheck(token)
        self._audit = audit or EventLog(None)
        self._max_message_bytes = max_message_bytes
        self._loop = asyncio.new_event_loop()
        self._server: grpc.aio.Server | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run_loop, name="policy-server", daemon=True)

    @property
    def service(self) -> PolicyService | None:
        return self._service

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def start(self, *, timeout_s: float = 10.0) -> "SingleServer":
        """Bind and serve.

        Raises:
            ResourceMissing: the port is taken; the service is shut down then.
        """
        self._thread.start()
        try:
            self._call(self._start(), timeout_s)
        except BaseException:
            self.close(timeout_s=timeout_s)
            raise
        return self

    def close(self, *, grace_s: float = 0.0, timeout_s: float = 10.0) -> None:
        """Stop; running streams get ``grace_s`` to be renewed elsewhere or to end. A second time does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._service is not None and grace_s > 0:
            self._service.leave(within_s=grace_s)
        if self._server is not None:
            self._call(self._server.stop(grace_s), grace_s + timeout_s)
        if self._thread.is_alive():
            self._stop_loop(timeout_s)
        else:
            self._loop.close()
        if self._service is not None:
            self._service.shut_down()
        if self._ingest is not None:
            self._ingest.shut_down()

    def __enter__(self) -> "SingleServer":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def _start(self) -> None:
        server = grpc.aio.server(
            interceptors=[Gate(self._tokens, self._audit)],
            options=[
                # Without this two servers share a port in silence and each gets some of the robots.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", self._max_message_bytes),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ],
        )
        if self._service is not None:
            policy_pb2_grpc.add_PolicyServiceServicer_to_server(
                PolicyServicer(self._service, self._tokens, audit=self._audit), server
            )
            channels_pb2_grpc.add_ChannelServiceServicer_to_server(
                ChannelServicer(self._service.moves, self._tokens, audit=self._audit), server
            )
        if self._ingest is not None:
            fleet_pb2_grpc.add_FleetServiceServicer_to_server(
                FleetServicer(self._ingest, self._tokens, audit=self._audit), server
            )
        try:
            self.port = server.add_insecure_port(self.address)
        except RuntimeError as error:
            raise ResourceMissing(
                f"cannot listen on {self.address}: the port is taken or the address is not this machine's; "
                "stop the other server or choose another port"
            ) from error
        await server.start()
        self._server = server

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        # Handlers of streams that were cut are still on their way out.
        leftover = asyncio.all_tasks(self._loop)
        for task in leftover:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*leftover, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def _call(self, coroutine, timeout_s: float):  # type: ignore[no-untyped-def]
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError as error:
            raise WaitTimeout(f"the server at {self.address} did not start or stop within {timeout_s} s") from error

    def _stop_loop(self, timeout_s: float) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise Unreachable(f"the event loop of the server at {self.address} did not end within {timeout_s} s")
