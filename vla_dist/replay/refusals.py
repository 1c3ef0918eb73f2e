"""In words, why the server of a buffer refused; see ``functions.lua``."""

from collections.abc import Sequence

from vla_dist.core.errors import DataError
from vla_dist.core.types import Segment


def wait_reason(side: str, reply: Sequence[bytes]) -> str:
    """Why ``inserts`` or ``samples`` must wait, from ``wait_reply``."""
    drawable, min_steps, balance, ratio, buffer, stored, capacity, behind = (float(field) for field in reply[3:11])
    if reply[1] == b"archive":
        return (
            f"the buffer is full ({stored:.0f} of {capacity:.0f} steps) and its oldest episode is not archived yet, "
            f"{behind:.0f} are not; is the archiver running?"
        )
    text = (
        f"the limiter makes {side} wait: {drawable:.0f} steps of complete episodes stored, min_steps {min_steps:.0f}; "
        f"{stored:.0f} steps in all, capacity {capacity:.0f}"
    )
    if ratio >= 0:
        text += f"; balance {balance:.1f} windows, error buffer {buffer:.1f}, samples_per_insert {ratio}"
    if drawable < min_steps and stored > 0.9 * capacity:
        text += "; the buffer is full of open episodes, raise capacity_steps"
    return text


def contradiction(segment: Segment, last_index: int) -> DataError:
    """Of a segment that does not fit the last index of its episode."""
    return DataError(
        f"segment {segment.episode_id}/{segment.segment_index} (is_last {segment.is_last}) contradicts index "
        f"{last_index}, the last of its episode so far; give a new episode its own id"
    )
