"""A relay of Control streams that loses, doubles and delays whole messages, in either direction.

TCP does none of that to a stream; proxies, radio bridges and message buses between a robot and its server may.
"""

import asyncio
import contextlib
import random
import threading
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

import grpc

_CONTROL = "/vla_dist.v1.PolicyService/Control"


class MessageLink(grpc.GenericRpcHandler):
    """Listens on loopback; the faults may be changed at any time.

    ::

        with MessageLink(server_address) as link:
            client = PolicyClient(link.address)
            link.drop_share = 0.2

    """

    def __init__(self, target: str, *, seed: int = 0) -> None:
        self.drop_share = 0.0
        """Of the messages that never arrive."""
        self.duplicate_share = 0.0
        """Of the messages that arrive twice."""
        self.most_delay_s = 0.0
        """Each message waits between 0 and this long; order is kept."""
        self.num_dropped = 0
        self.num_doubled = 0
        self.address = ""
        self._target = target
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="message-link", daemon=True)

    def service(self, handler_call_details: Any) -> Any:
        if handler_call_details.method != _CONTROL:
            return None
        return grpc.stream_stream_rpc_method_handler(self._relay)

    def __enter__(self) -> "MessageLink":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _start(self) -> None:
        self._upstream = grpc.aio.insecure_channel(self._target)
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def _stop(self) -> None:
        await self._server.stop(None)
        await self._upstream.close()

    async def _relay(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        call: Any = self._upstream.stream_stream(_CONTROL)(metadata=context.invocation_metadata())

        async def forward() -> None:
            async for raw in self._spoiled(requests):
                await call.write(raw)
            await call.done_writing()

        forwarding = asyncio.ensure_future(forward())
        try:
            async for raw in self._spoiled(call):
                yield raw
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "")
        finally:
            forwarding.cancel()
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError, grpc.RpcError, asyncio.InvalidStateError):
                await forwarding

    async def _spoiled(self, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for raw in messages:
            if self._random.random() < self.drop_share:
                self.num_dropped += 1
                continue
            if self.most_delay_s:
                await asyncio.sleep(self._random.uniform(0.0, self.most_delay_s))
            yield raw
            if self._random.random() < self.duplicate_share:
                self.num_doubled += 1
                yield raw
