"""Segments are stored once; bad ones are kept aside with a reason; a replay that is busy costs nothing."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, IntegrityError, ReplayWait, Unreachable
from vla_dist.protocol.conversion import encode_segment
from vla_dist.protocol.v1 import types_pb2
from vla_dist.serving.ingest import FleetIngest, IngestConfig
from vla_dist.serving.quarantine import QuarantineFolder
from vla_dist.testing.fakes import make_segment, make_spec
from vla_dist.testing.serving import ListTable

SPEC = make_spec()


@pytest.fixture
def table() -> ListTable:
    return ListTable()


@pytest.fixture
def quarantine(tmp_path: Path) -> QuarantineFolder:
    return QuarantineFolder(tmp_path / "quarantine", max_bytes=2000)


@pytest.fixture
def ingest(table: ListTable, quarantine: QuarantineFolder) -> Iterator[FleetIngest]:
    ingest = FleetIngest(
        table,
        SPEC,
        IngestConfig(num_steps=8),
        quarantine=quarantine,
        commands=lambda robot_id: "drain" if robot_id == "tired" else "continue",
    )
    yield ingest
    ingest.shut_down()


async def test_stored_once(ingest: FleetIngest, table: ListTable) -> None:
    segment = make_segment(SPEC, episode_id="e")
    statuses = [(await ingest.receive(encode_segment(segment))).status for _ in range(2)]
    assert statuses == ["stored", "duplicate"]
    assert np.array_equal(table.segments["e", 0].proprio, segment.proprio)


async def test_a_bad_segment_is_quarantined_with_its_reason(
    ingest: FleetIngest, table: ListTable, quarantine: QuarantineFolder
) -> None:
    bad = encode_segment(make_segment(SPEC, episode_id="e", num_steps=4))
    for _ in range(2):
        ack = await ingest.receive(bad)
    assert ack.key == ("e", 0)
    assert ack.status == "quarantined"
    assert "shape (4, 5), expected (8, 5)" in ack.reason
    assert not table.segments
    (kept,) = quarantine.folder.glob("*.segment")
    assert types_pb2.Segment.FromString(kept.read_bytes()) == bad
    assert kept.with_suffix(".reason").read_text() == ack.reason


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("length", 9, "must be within 1..8"),
        ("length", 3, "is not the last of its episode"),
        ("episode_id", "x" * 65, "1 to 64 ASCII"),
        ("source", 17, "source is 17"),
        ("task", "t" * 2000, "task has 2000 bytes"),
    ],
)
async def test_headers_are_checked(ingest: FleetIngest, field: str, value: object, words: str) -> None:
    message = encode_segment(make_segment(SPEC, episode_id="e"))
    setattr(message, field, value)
    ack = await ingest.receive(message)
    assert (ack.status, words in ack.reason) == ("quarantined", True), ack.reason


@pytest.mark.parametrize("error", [ReplayWait("learner is behind"), Unreachable("redis is away")])
async def test_what_cannot_be_stored_now_is_asked_for_again(
    ingest: FleetIngest, table: ListTable, error: Exception
) -> None:
    table.fail_with.append(error)
    message = encode_segment(make_segment(SPEC, episode_id="e"))
    first, second = await ingest.receive(message), await ingest.receive(message)
    assert (first.status, first.reason, second.status) == ("retry", str(error), "stored")


async def test_the_tables_own_refusal_is_final(ingest: FleetIngest, table: ListTable) -> None:
    table.fail_with.append(IntegrityError("segment 0 is missing"))
    ack = await ingest.receive(encode_segment(make_segment(SPEC, episode_id="e")))
    assert (ack.status, ack.reason) == ("quarantined", "segment 0 is missing")


def test_commands_come_with_the_heartbeat(ingest: FleetIngest) -> None:
    assert ingest.heartbeat("tired", {"steps": 1}) == "drain"
    assert ingest.heartbeat("fresh", {}) == "continue"


def test_a_full_quarantine_keeps_the_first(quarantine: QuarantineFolder) -> None:
    assert quarantine.keep(b"a" * 1500, reason="one")
    assert not quarantine.keep(b"b" * 1500, reason="two")
    assert quarantine.keep(b"a" * 1500, reason="one")
    again = QuarantineFolder(quarantine.folder, max_bytes=2000)
    assert not again.keep(b"c" * 1500, reason="three")
    assert len(list(quarantine.folder.iterdir())) == 2


@pytest.mark.parametrize("settings", [{"num_steps": 0}, {"append_timeout_s": 0.0}, {"num_threads": 0}])
def test_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        replace(IngestConfig(), **settings)  # type: ignore[arg-type]
