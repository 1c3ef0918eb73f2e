"""Packed commands that read ranges of steps out of many stored values."""

from collections.abc import Sequence

from vla_dist.core.types import Array

_DIGEST_BYTES = 16


class RangeRequests:
    """Packs GETRANGE commands of ``prefix DIGEST:SEGMENT suffix``; every part but the digest comes out of a table."""

    def __init__(self, prefix: str, suffix: str, *, offset: int, stride: int, num_steps: int) -> None:
        """
        Args:
            offset: of the first step within a value.
            stride: bytes of a step.
            num_steps: T.
        """
        self._prefix = prefix.encode()
        self._suffix = suffix.encode()
        self._segments: list[tuple[bytes, bytes]] = []
        self._width = num_steps + 1
        ends = [
            (str(offset + first * stride), str(offset + (first + count) * stride - 1))
            for first in range(num_steps)
            for count in range(self._width)
        ]
        self._ranges = [f"\r\n${len(a)}\r\n{a}\r\n${len(b)}\r\n{b}\r\n".encode() for a, b in ends]

    def pack(self, digests: Sequence[bytes], segments: Array, firsts: Array, counts: Array) -> bytes:
        """One command for each of N ranges of ``counts`` steps, each within one segment."""
        numbers = segments.tolist()
        for segment in range(len(self._segments), max(numbers) + 1):
            end = b":%d%b" % (segment, self._suffix)
            size = len(self._prefix) + _DIGEST_BYTES + len(end)
            self._segments.append((b"*4\r\n$8\r\nGETRANGE\r\n$%d\r\n%b" % (size, self._prefix), end))
        table, ranges = self._segments, self._ranges
        parts: list[bytes] = []
        for segment, digest, place in zip(numbers, digests, (firsts * self._width + counts).tolist(), strict=True):
            head, end = table[segment]
            parts += (head, digest, end, ranges[place])
        return b"".join(parts)
