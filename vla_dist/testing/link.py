"""A network between a robot and a server that can be slow, silent, broken, or mad."""

import asyncio
import random
import threading
from types import TracebackType


class Link:
    """Forwards TCP on loopback; every fault is one attribute or call, at any time.

    ::

        with Link(server_port) as link:
            client = PolicyClient(link.address)
            link.delay_s = 0.2

    """

    def __init__(self, target_port: int, *, seed: int = 0) -> None:
        self.target_port = target_port
        self.delay_s = 0.0
        """Added to each direction; order is kept."""
        self.is_silent = False
        """Nothing arrives and connections stay, as with a pulled cable; what was sent arrives when it is over."""
        self.refuses = False
        """New connections are closed at once."""
        self.duplicate_share = 0.0
        """Of the pieces that are sent twice: no network does, but a bad middlebox may."""
        self.num_bytes = 0
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    @property
    def port(self) -> int:
        assert self._server is not None
        return self._server.sockets[0].getsockname()[1]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Reset every connection that runs now."""
        self._loop.call_soon_threadsafe(self._abort_all)

    def __enter__(self) -> "Link":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self._ready.set()
        self._loop.run_forever()
        self._server.close()
        self._abort_all()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def _abort_all(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuses:
            writer.transport.abort()
            return
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, upstream_writer}
        try:
            await asyncio.gather(self._pump(reader, upstream_writer), self._pump(upstream_reader, writer))
        except asyncio.CancelledError:
            pass  # the link is closed; asyncio would print it
        finally:
            for one in (writer, upstream_writer):
                one.transport.abort()
                self._writers.discard(one)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        sender = asyncio.ensure_future(self._send(pieces, writer))
        try:
            while data := await reader.read(65536):
                pieces.put_nowait((self._loop.time() + self.delay_s, data))
        except (ConnectionError, OSError):
            pass
        finally:
            sender.cancel()
            writer.transport.abort()

    async def _send(self, pieces: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter) -> None:
        while True:
            due, data = await pieces.get()
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            while self.is_silent:
                await asyncio.sleep(0.005)
            if writer.transport.is_closing():
                continue
            copies = 2 if self._random.random() < self.duplicate_share else 1
            writer.write(data * copies)
            self.num_bytes += len(data)
