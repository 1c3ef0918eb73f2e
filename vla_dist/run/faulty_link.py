"""A TCP relay on loopback that delays, cuts and mends the link between a robot and its server."""

import asyncio
import contextlib
import random
import threading

from vla_dist.core.errors import ConfigError, ResourceMissing

_CHUNK = 1 << 16
_CLOSE_TIMEOUT_S = 5.0


class FaultyLink:
    """Listens on ``address`` and passes everything on to a server, badly.

    Args:
        server: ``host:port``.
        delay_s: added to each direction.
        cuts_per_s: how often all its connections are cut, on average; none can be made meanwhile.
        cut_s: how long that lasts, on average.
        seed: of when.
    """

    def __init__(
        self, server: str, *, delay_s: float = 0.0, cuts_per_s: float = 0.0, cut_s: float = 1.0, seed: int = 0
    ) -> None:
        host, colon, port = server.rpartition(":")
        if not colon or not port.isdigit():
            raise ConfigError(f"server {server!r} must be written host:port")
        self._target = (host, int(port))
        self._delay_s = delay_s
        self._cuts_per_s, self._cut_s = cuts_per_s, cut_s
        self._random = random.Random(seed)
        self._connections: set[asyncio.Task[None]] = set()
        self.is_cut = False
        self.num_cuts = 0
        self.num_bytes = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._error: OSError | None = None
        self._port = 0
        self._thread = threading.Thread(target=self._run, name="faulty-link", daemon=True)
        self._thread.start()
        self._ready.wait(_CLOSE_TIMEOUT_S)
        if self._error is not None or not self._port:
            raise ResourceMissing(f"cannot listen on loopback: {self._error}")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def cut(self) -> None:
        """Break every connection and refuse new ones until ``mend``."""
        self._loop.call_soon_threadsafe(self._cut)

    def mend(self) -> None:
        self._loop.call_soon_threadsafe(self._mend)

    def close(self) -> None:
        """A second time does nothing."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_TIMEOUT_S)

    def _cut(self) -> None:
        self.is_cut = True
        self.num_cuts += 1
        for task in self._connections:
            task.cancel()

    def _mend(self) -> None:
        self.is_cut = False

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        except OSError as error:
            self._error = error
            self._ready.set()
            return
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        if self._cuts_per_s:
            self._loop.create_task(self._break_now_and_then())
        self._loop.run_forever()
        server.close()
        leftover = asyncio.all_tasks(self._loop)
        for task in leftover:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*leftover, return_exceptions=True))
        self._loop.close()

    async def _break_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(self._random.expovariate(self._cuts_per_s))
            self._cut()
            await asyncio.sleep(self._random.expovariate(1.0 / self._cut_s) if self._cut_s else 0.0)
            self._mend()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        upstream: asyncio.StreamWriter | None = None
        try:
            if self.is_cut:
                return
            far, upstream = await asyncio.open_connection(*self._target)
            await asyncio.wait(
                [
                    asyncio.ensure_future(self._pass_on(reader, upstream)),
                    asyncio.ensure_future(self._pass_on(far, writer)),
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            for one in (writer, upstream):
                if one is not None:
                    with contextlib.suppress(OSError, RuntimeError):
                        one.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Each chunk leaves ``delay_s`` after it came, however many are under way."""
        pending: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        sender = asyncio.ensure_future(self._send_late(pending, writer))
        try:
            while data := await reader.read(_CHUNK):
                self.num_bytes += len(data)
                pending.put_nowait((self._loop.time() + self._delay_s, data))
            pending.put_nowait((self._loop.time(), b""))
            await sender
        except OSError:
            pass
        finally:
            sender.cancel()

    async def _send_late(self, pending: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter) -> None:
        while True:
            due, data = await pending.get()
            if not data:
                return
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            writer.write(data)
            await writer.drain()
