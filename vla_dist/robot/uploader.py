"""Segments to the fleet's replay: kept until acknowledged, sent again after any break, stored once.

who            consumes       waits for             unblocked by
submit         -              room                  an acknowledgement, or its timeout
sender         pending        a segment, the acks   submit, the stream, close
gRPC sender    the queue      a message             the sender
"""

import contextlib
import logging
import queue
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import grpc

from vla_dist.core.errors import ConfigError, ReplayWait, WaitTimeout
from vla_dist.core.types import Metrics, Segment
from vla_dist.protocol.conversion import encode_segment
from vla_dist.protocol.records import Ack, AckStatus, SegmentKey, segment_key
from vla_dist.protocol.status import error_of
from vla_dist.protocol.v1 import fleet_pb2, fleet_pb2_grpc
from vla_dist.robot.client import PolicyClient

_log = logging.getLogger(__name__)

_LINGER_S = 1.0
"""An idle stream is closed after this."""

_STATUSES: dict[int, AckStatus] = {
    fleet_pb2.ACK_STATUS_STORED: "stored",
    fleet_pb2.ACK_STATUS_DUPLICATE: "duplicate",
    fleet_pb2.ACK_STATUS_QUARANTINED: "quarantined",
    fleet_pb2.ACK_STATUS_RETRY: "retry",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadConfig:
    """Bounds of the uploader."""

    max_pending: int = 64
    """Segments in memory; ``submit`` waits when there are so many."""
    retry_s: float = 0.5
    """Pause after a broken stream, and before a segment that was answered RETRY goes again."""
    ack_timeout_s: float = 30.0
    """A stream that acknowledges nothing for so long is opened anew."""

    def __post_init__(self) -> None:
        if self.max_pending < 1:
            raise ConfigError(f"max_pending {self.max_pending} must be at least 1")
        if self.retry_s <= 0 or self.ack_timeout_s <= 0:
            raise ConfigError(f"retry_s {self.retry_s} and ack_timeout_s {self.ack_timeout_s} must be positive")


class SegmentUploader:
    """Sends segments in the background, in order, until each is stored or quarantined.

    What is pending is lost with the process: an episode counts as given once ``flush`` has returned.
    """

    def __init__(self, client: PolicyClient, config: UploadConfig | None = None) -> None:
        self._config = config or UploadConfig()
        self._address = client.address
        self._metadata = client.call_metadata
        self._stub = fleet_pb2_grpc.FleetServiceStub(client.channel)
        self._pending: OrderedDict[SegmentKey, Segment] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False
        self._counts: dict[AckStatus, int] = dict.fromkeys(_STATUSES.values(), 0)
        self._num_breaks = 0
        self._problem = ""
        self._thread = threading.Thread(target=self._send_until_closed, name="segment-uploader", daemon=True)
        self._thread.start()

    def submit(self, segment: Segment, *, timeout_s: float) -> None:
        """Take a segment over.

        Raises:
            ReplayWait: ``max_pending`` segments are unacknowledged, for ``timeout_s``; the caller keeps this one.
        """
        with self._changed:
            room = self._changed.wait_for(lambda: len(self._pending) < self._config.max_pending, timeout_s)
            if not room:
                raise ReplayWait(
                    f"{len(self._pending)} segments wait for {self._address}, the most allowed "
                    f"({self._problem or 'it is slow'}); submit this one again later"
                )
            self._pending[segment_key(segment)] = segment
            self._changed.notify_all()

    def flush(self, *, timeout_s: float) -> None:
        """Wait until nothing is pending. Raises WaitTimeout with the reason of the last failure."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._pending, timeout_s):
                raise WaitTimeout(
                    f"{len(self._pending)} segments are still unacknowledged by {self._address} after {timeout_s} s: "
                    f"{self._problem or 'no answer yet'}"
                )

    def metrics(self) -> Metrics:
        with self._changed:
            return {
                "stored": self._counts["stored"],
                "duplicates": self._counts["duplicate"],
                "quarantined": self._counts["quarantined"],
                "retries": self._counts["retry"],
                "stream_breaks": self._num_breaks,
                "pending": len(self._pending),
            }

    def close(self, *, timeout_s: float = 5.0) -> None:
        """End the thread; what is pending is dropped, so ``flush`` first."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _send_until_closed(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closed, 1.0)
                if self._closed:
                    return
                if not self._pending:
                    continue
            if not self._send_over_one_stream():
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, self._config.retry_s)

    def _send_over_one_stream(self) -> bool:
        """Send what is pending and what comes meanwhile. False: the stream broke or the server wants a pause."""
        requests: queue.SimpleQueue[fleet_pb2.UploadRequest | None] = queue.SimpleQueue()
        call = self._stub.Upload(iter(requests.get, None), metadata=self._metadata)
        acks = _AckReader(call)
        sent: set[SegmentKey] = set()
        try:
            while not self._closed:
                for key, segment in self._unsent(sent):
                    requests.put(fleet_pb2.UploadRequest(segment=encode_segment(segment)))
                    sent.add(key)
                if not sent:
                    return True
                ack = acks.next(self._config.ack_timeout_s)
                sent.discard(ack.key)
                self._settle(ack)
                if ack.status == "retry":
                    return False
            return True
        except (grpc.RpcError, WaitTimeout) as error:
            self._note_break(error)
            return False
        finally:
            requests.put(None)
            call.cancel()

    def _unsent(self, sent: set[SegmentKey]) -> list[tuple[SegmentKey, Segment]]:
        """Waits a while for the first, so that a stream serves more than one segment."""
        with self._changed:
            if not sent:
                self._changed.wait_for(lambda: self._pending or self._closed, _LINGER_S)
            return [(key, segment) for key, segment in self._pending.items() if key not in sent]

    def _settle(self, ack: Ack) -> None:
        if ack.status == "quarantined":
            _log.error("segment %s/%d can never be stored: %s", ack.episode_id, ack.segment_index, ack.reason)
        with self._changed:
            self._counts[ack.status] += 1
            if ack.status == "retry":
                self._problem = ack.reason
            else:
                self._pending.pop(ack.key, None)
                self._problem = ""
            self._changed.notify_all()

    def _note_break(self, error: Any) -> None:
        with self._changed:
            self._num_breaks += 1
            self._problem = str(error)
            with contextlib.suppress(AttributeError):
                self._problem = str(error_of(error.code(), error.details(), address=self._address))
        _log.warning("upload to %s broke: %s", self._address, self._problem)


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
                status = _STATUSES.get(response.status, "retry")
                self._arrived.put(
                    Ack(
                        episode_id=response.episode_id,
                        segment_index=response.segment_index,
                        status=status,
                        reason=response.reason,
                    )
                )
            self._arrived.put(WaitTimeout("the server ended the upload; it goes on over a new stream"))
        except grpc.RpcError as error:
            self._arrived.put(error)
