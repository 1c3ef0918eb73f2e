"""From a robot's spool to the fleet's replay: in order, again after any break, stored once.

who            consumes       waits for             unblocked by
sender         the spool      a segment, the acks   the recorder, the stream, close
gRPC sender    the queue      a message             the sender
"""

import contextlib
import logging
import queue
import random
import threading
import time
from dataclasses import dataclass
from typing import Any

import grpc

from vla_dist.core.errors import ConfigError, NotFound, ResourceMissing, VlaDistError, WaitTimeout
from vla_dist.core.types import Metrics
from vla_dist.protocol.fleet_conversion import decode_ack_status, encode_claim
from vla_dist.protocol.records import Ack, AckStatus, SegmentKey
from vla_dist.protocol.status import error_of
from vla_dist.protocol.v1 import fleet_pb2
from vla_dist.robot.bandwidth import Bandwidth
from vla_dist.robot.fleet_client import FleetClient
from vla_dist.robot.spool import Spool

_log = logging.getLogger(__name__)

_LINGER_S = 0.25
"""An idle stream is closed after this."""
_CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadConfig:
    """Bounds of the uploader."""

    window: int = 8
    """Segments sent and not yet acknowledged."""
    bytes_per_s: float | None = None
    """Most that is sent, on average over seconds; None: no limit."""
    retry_s: float = 0.25
    """Pause after a first broken stream, and before a segment that was answered RETRY goes again; doubles with each."""
    max_retry_s: float = 5.0
    ack_timeout_s: float = 30.0
    """A stream that acknowledges nothing for so long is opened anew."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigError(f"window {self.window} must be at least 1")
        if not 0 < self.retry_s <= self.max_retry_s or self.ack_timeout_s <= 0:
            raise ConfigError(
                f"retry_s {self.retry_s} and max_retry_s {self.max_retry_s} must be positive and in this order, "
                f"ack_timeout_s {self.ack_timeout_s} positive"
            )
        Bandwidth(self.bytes_per_s)


class SpoolUploader:
    """Sends what a spool holds in the background until the server has stored or refused all of it.

    Nothing is lost with the process: the next one goes on with the same spool.
    """

    def __init__(self, client: FleetClient, spool: Spool, config: UploadConfig | None = None) -> None:
        self._config = config or UploadConfig()
        self._client = client
        self._spool = spool
        self._bandwidth = Bandwidth(self._config.bytes_per_s)
        self._closed = threading.Event()
        self._counts: dict[AckStatus, int] = {"stored": 0, "duplicate": 0, "quarantined": 0, "retry": 0}
        self._num_breaks = 0
        self._num_bytes = 0
        self._problem = ""
        self._failures = 0
        self._thread = threading.Thread(target=self._send_until_closed, name="spool-uploader", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str:
        """Why nothing goes out; empty when all is well."""
        return self._problem

    def flush(self, *, timeout_s: float) -> None:
        """Wait until the server has every closed episode. Raises WaitTimeout with the reason of the last failure."""
        end = time.monotonic() + timeout_s
        while waiting := int(self._spool.metrics()["closed_episodes"]):
            if time.monotonic() > end:
                raise WaitTimeout(
                    f"{waiting} episodes are still unacknowledged by {self._client.address} after {timeout_s} s: "
                    f"{self._problem or 'no answer yet'}. They stay in the spool"
                )
            self._spool.wait_for_pending(min(0.1, timeout_s))

    def metrics(self) -> Metrics:
        """Counts of this uploader since its start."""
        return {
            "stored": self._counts["stored"],
            "duplicates": self._counts["duplicate"],
            "quarantined": self._counts["quarantined"],
            "retries": self._counts["retry"],
            "stream_breaks": self._num_breaks,
            "bytes_sent": self._num_bytes,
        }

    def close(self) -> None:
        """End the thread; what is not acknowledged stays in the spool."""
        self._closed.set()
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _send_until_closed(self) -> None:
        while not self._closed.is_set():
            try:
                if not self._spool.pending(limit=1):
                    self._spool.wait_for_pending(_LINGER_S)
                    continue
                went_well = self._send_over_one_stream()
            except VlaDistError as error:
                self._note_break(str(error))
                went_well = False
            if went_well:
                self._failures = 0
                continue
            pause_s = min(self._config.max_retry_s, self._config.retry_s * 2 ** min(self._failures, 10))
            self._failures += 1
            # Robots that lost one server must not all come back in the same moment.
            self._closed.wait(pause_s * random.uniform(0.5, 1.0))

    def _send_over_one_stream(self) -> bool:
        """Send what is pending and what comes meanwhile. False: the stream broke or the server wants a pause."""
        self._offer_retained()
        requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        requests.put(fleet_pb2.UploadRequest(claim=encode_claim(self._client.claim)).SerializeToString())
        call = self._client.upload(iter(requests.get, None))
        acks = _AckReader(call)
        sent: set[SegmentKey] = set()
        try:
            while not self._closed.is_set():
                for segment in self._unsent(sent):
                    if not self._bandwidth.take(len(segment.request), stop=self._closed):
                        return True
                    requests.put(segment.request)
                    self._num_bytes += len(segment.request)
                    sent.add(segment.key)
                if not sent:
                    return True
                ack = acks.next(self._config.ack_timeout_s)
                sent.discard(ack.key)
                self._settle(ack)
                if ack.status == "retry":
                    return False
            return True
        except grpc.RpcError as error:
            failure: Any = error
            with contextlib.suppress(AttributeError):
                self._note_break(str(error_of(failure.code(), failure.details(), address=self._client.address)))
            return False
        except WaitTimeout as error:
            self._note_break(str(error))
            return False
        finally:
            requests.put(None)
            call.cancel()

    def _offer_retained(self) -> None:
        """After a break the server may have forgotten what it acknowledged last."""
        if not self._failures:
            return
        with contextlib.suppress(NotFound):  # an older server cannot say
            self._spool.send_again(self._client.find_missing(self._spool.retained()))

    def _unsent(self, sent: set[SegmentKey]) -> list[Any]:
        """Waits a while for the first, so that a stream serves more than one segment."""
        room = self._config.window - len(sent)
        if room <= 0:
            return []
        found = self._spool.pending(exclude=tuple(sent), limit=room)
        if not found and not sent:
            self._spool.wait_for_pending(_LINGER_S)
            found = self._spool.pending(limit=room)
        return found

    def _settle(self, ack: Ack) -> None:
        if ack.status == "quarantined":
            _log.error("segment %s/%d can never be stored: %s", ack.episode_id, ack.segment_index, ack.reason)
        self._counts[ack.status] += 1
        self._problem = ack.reason if ack.status == "retry" else ""
        try:
            self._spool.settle(ack)
        except ResourceMissing as error:
            # It will be sent again, and the server knows it.
            self._problem = str(error)

    def _note_break(self, problem: str) -> None:
        self._num_breaks += 1
        if problem != self._problem:
            _log.warning("upload to %s: %s", self._client.address, problem)
        self._problem = problem


class _AckReader:
    """Acknowledgements of one call with a timeout, which gRPC's own iterator has not."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._arrived: queue.SimpleQueue[Ack | Exception] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="upload-acks", daemon=True).start()

    def next(self, timeout_s: float) -> Ack:
        """The next one. Raises what ended the call, or WaitTimeout."""
        try:
            arrived = self._arrived.get(timeout=timeout_s)
        except queue.Empty as error:
            raise WaitTimeout(f"the server acknowledged nothing for {timeout_s} s") from error
        if isinstance(arrived, Exception):
            raise arrived
        return arrived

    def _read(self) -> None:
        try:
            for response in self._call:
                self._arrived.put(
                    Ack(
                        episode_id=response.episode_id,
                        segment_index=response.segment_index,
                        status=decode_ack_status(response.status),
                        reason=response.reason,
                    )
                )
            self._arrived.put(WaitTimeout("the server ended the upload; it goes on over a new stream"))
        except grpc.RpcError as error:
            self._arrived.put(error)
