"""Links that say nothing, or say it late: a session is opened where one can be, and no wait is longer than asked."""

import asyncio
import socket
import threading
import time
from typing import Any

import pytest

from vla_dist.core.errors import Unreachable
from vla_dist.robot.client import PolicyClient
from vla_dist.testing.fakes import FakeEnv, make_spec
from vla_dist.testing.serving import REFERENCE

SPEC = make_spec()


class SilentServer:
    """Accepts and never says a word, as a half-dead link does."""

    def __enter__(self) -> int:
        self._socket = socket.create_server(("127.0.0.1", 0))
        return self._socket.getsockname()[1]

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def test_a_silent_server_costs_no_more_than_the_timeout() -> None:
    with SilentServer() as port, PolicyClient(f"127.0.0.1:{port}", timeout_s=0.5) as client:
        started = time.monotonic()
        with pytest.raises(Unreachable, match=r"within 0\.5 s"):
            client.open_session(SPEC, policy=REFERENCE, robot_id="r")
        assert time.monotonic() - started < 2.0


class SlowLink:
    """Relays one address to another; every chunk of bytes takes ``delay_s`` on its way, in either direction."""

    def __init__(self, port: int, delay_s: float) -> None:
        self._target, self._delay_s = port, delay_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> int:
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._relay, "127.0.0.1", 0))
        return self._server.sockets[0].getsockname()[1]

    def __exit__(self, *_: object) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(5)

    async def _stop(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", self._target)
        try:
            await asyncio.gather(self._pump(reader, onward_writer), self._pump(onward_reader, writer))
        finally:
            for each in (writer, onward_writer):
                each.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await asyncio.sleep(self._delay_s)
            writer.write(data)
        writer.close()


def test_a_slow_link_is_no_dead_link(site) -> None:  # type: ignore[no-untyped-def]
    """A connect was given up after 250 ms, so that a robot far away, or beside a busy server, never got one."""
    observation = FakeEnv(SPEC).reset(seed=0, task="go").observation
    with (
        SlowLink(site.port, 0.4) as port,
        PolicyClient(f"127.0.0.1:{port}", timeout_s=8.0) as client,
        client.open_session(SPEC, policy=REFERENCE, robot_id="far") as session,
    ):
        assert session.act(observation, deadline_s=5.0).policy_version == 1
        assert session.latencies_s[0] > 0.8


class SilentAtFirst(SlowLink):
    """Takes the first connection and says nothing on it, as a server that is just being ended does."""

    def __init__(self, port: int) -> None:
        super().__init__(port, 0.0)
        self._has_been_silent = False

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._has_been_silent:
            return await super()._relay(reader, writer)
        self._has_been_silent = True
        try:
            await asyncio.sleep(60)
        finally:
            writer.close()


def test_a_first_stream_that_hangs_leaves_time_for_another(site) -> None:  # type: ignore[no-untyped-def]
    """No session came within 5 s after a server's restart: all of them were spent on one silent stream."""
    with (
        SilentAtFirst(site.port) as port,
        PolicyClient(f"127.0.0.1:{port}", timeout_s=4.0) as client,
        client.open_session(SPEC, policy=REFERENCE, robot_id="r") as session,
    ):
        assert session.grant.policy_version == 1
