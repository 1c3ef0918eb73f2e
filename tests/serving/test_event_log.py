"""A log that tells what happened, and cannot be made to fill a disk or forget."""

from pathlib import Path

import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.serving.event_log import EventLog, read_events


def test_entries_come_back_in_order_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "audit.jsonl")
    for index in range(3):
        log.write("refused", number=index)
    with (tmp_path / "audit.jsonl").open("a") as file:
        file.write('{"event": "half')
    assert [entry["number"] for entry in read_events(tmp_path / "audit.jsonl")] == [0, 1, 2]
    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o077 == 0


def test_a_flood_is_counted_and_not_written(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "audit.jsonl", max_per_s=5.0)
    for _ in range(1000):
        log.write("refused")
    assert len(read_events(tmp_path / "audit.jsonl")) <= 6


def test_the_file_is_turned_and_stays_bounded(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = EventLog(path, max_bytes=4096, max_per_s=1e6)
    for index in range(500):
        log.write("refused", number=index, reason="x" * 50)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 3 * 4096
    numbers = [entry["number"] for entry in read_events(path)]
    assert numbers == list(range(numbers[0], 500))
    with pytest.raises(ConfigError, match="max_bytes"):
        EventLog(path, max_bytes=1)
