from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_dist.core.errors import ConfigError, DataError, IntegrityError
from vla_dist.core.specs import CameraSpec
from vla_dist.core.types import SOURCES, Segment
from vla_dist.data.segment_codec import SegmentCodec
from vla_dist.testing.fakes import make_segment, make_spec

CAMERA = CameraSpec(name="wrist", height=3, width=5)
TEXT = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=16)
ARRAYS = ("proprio", "actions", "target_actions", "rewards", "interventions")


@st.composite
def segments(draw) -> tuple[SegmentCodec, Segment]:
    cameras = (CAMERA,) if draw(st.booleans()) else ()
    spec = make_spec(
        proprio_dim=draw(st.integers(0, 4)), action_dim=draw(st.integers(1, 3)), cameras=cameras, max_episode_steps=9
    )
    num_steps = draw(st.integers(1, 5))
    is_last = draw(st.booleans())
    segment = make_segment(
        spec,
        episode_id=draw(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=64)),
        segment_index=draw(st.integers(0, 60_000)),
        num_steps=num_steps,
        length=draw(st.integers(1, num_steps)) if is_last else None,
        is_last=is_last,
        success=draw(st.booleans()),
        task=draw(TEXT),
        seed=draw(st.integers(0, 99)),
    )
    segment = replace(
        segment,
        robot_id=draw(TEXT),
        instruction=draw(TEXT),
        policy_version=draw(st.integers(0, 2**50)),
        source=draw(st.sampled_from(SOURCES)),
        interventions=np.array(draw(st.lists(st.booleans(), min_size=num_steps, max_size=num_steps))),
    )
    return SegmentCodec(spec, num_steps), segment


@given(segments())
@settings(max_examples=60, deadline=None)
def test_what_was_encoded_is_decoded(case):
    codec, segment = case
    encoded = codec.encode(segment)
    decoded = codec.decode(encoded.row, encoded.images)
    assert len(encoded.row) == codec.row_bytes
    for name in Segment.__dataclass_fields__:
        if name in ARRAYS:
            array = getattr(decoded, name)
            np.testing.assert_array_equal(array[: segment.length], getattr(segment, name)[: segment.length])
            assert not array[segment.length :].any(), f"{name}: padding is stored as zeros"
        elif name == "images":
            assert set(decoded.images) == set(segment.images)
            for camera, frames in segment.images.items():
                np.testing.assert_array_equal(decoded.images[camera][: segment.length], frames[: segment.length])
        else:
            assert getattr(decoded, name) == getattr(segment, name)
    assert decoded.interventions.dtype == bool


def test_any_arrow_reader_can_read_a_row():
    spec = make_spec(proprio_dim=3, action_dim=2)
    codec = SegmentCodec(spec, 4)
    segment = make_segment(spec, episode_id="e", num_steps=4, length=3, is_last=True, success=True, seed=1)
    batch = pa.ipc.read_record_batch(pa.py_buffer(codec.encode(segment).row), codec.schema)
    batch.validate(full=True)
    (row,) = batch.to_pylist()
    assert row["episode_id"].rstrip(b"\0") == b"e"
    assert row["instruction"].rstrip(b"\0") == b"please go"
    assert (row["length"], row["is_last"], row["success"]) == (3, 1, 1)
    assert row["source"] == SOURCES.index("expert")
    expected = np.where(np.arange(4)[:, None] < 3, segment.proprio, 0).ravel()
    np.testing.assert_array_equal(np.array(row["proprio"], np.float32), expected)
    assert row["rewards"] == [0.0, 1.0, 2.0, 0.0]
    assert codec.schema.field("actions").type.list_size == 4 * 2
    assert codec.schema.metadata[b"spec"] == spec.digest.encode()


def test_a_stream_of_rows_is_an_arrow_file():
    spec = make_spec()
    codec = SegmentCodec(spec, 8)
    rows = [codec.encode(make_segment(spec, episode_id=f"e{i}", seed=i)).row for i in range(3)]
    reader = pa.ipc.open_stream(codec.schema.serialize().to_pybytes() + b"".join(rows))
    assert reader.read_all().num_rows == 3


def test_many_rows_are_decoded_at_once():
    spec = make_spec()
    codec = SegmentCodec(spec, 8)
    given_segments = [make_segment(spec, episode_id=f"e{i}", segment_index=i, seed=i) for i in range(5)]
    rows = codec.decode_rows([codec.encode(segment).row for segment in given_segments])
    np.testing.assert_array_equal(rows["actions"], np.stack([s.actions for s in given_segments]))
    assert rows["segment_index"].tolist() == [0, 1, 2, 3, 4]
    assert rows["proprio"].base is not None, "a view, not a copy per column"
    assert len(codec.decode_rows([])) == 0


def test_bytes_of_another_size_or_header_are_refused():
    spec = make_spec()
    codec = SegmentCodec(spec, 8)
    row = codec.encode(make_segment(spec, episode_id="e")).row
    with pytest.raises(IntegrityError, match=f"row of {len(row) - 1} bytes, expected {len(row)}"):
        codec.decode_rows([row[:-1]])
    with pytest.raises(IntegrityError, match="row 1 of 2 has another Arrow header"):
        codec.decode_rows([row, row[:20] + bytes([row[20] ^ 1]) + row[21:]])


def test_equal_sizes_of_another_shape_are_told_apart():
    one, other = make_spec(proprio_dim=4, action_dim=2), make_spec(proprio_dim=2, action_dim=3)
    row = SegmentCodec(one, 8).encode(make_segment(one, episode_id="e")).row
    assert len(row) == SegmentCodec(other, 8).row_bytes, "this test needs two specs with rows of one size"
    with pytest.raises(IntegrityError, match="another Arrow header"):
        SegmentCodec(other, 8).decode(row)
    assert SegmentCodec(one, 8).schema_id != SegmentCodec(other, 8).schema_id


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("length", 9, "length 9"),
        ("length", 0, "length 0"),
        ("length", 7, "only the last one may be padded"),
        ("source", 3, "source 3"),
        ("task", b"\xff\xfe", "not UTF-8"),
        ("episode_id", b"", "1 to 64 ASCII"),
        ("segment_index", -1, "must not be negative"),
    ],
)
def test_a_damaged_field_is_refused(field, value, message):
    spec = make_spec()
    codec = SegmentCodec(spec, 8)
    row = np.frombuffer(codec.encode(make_segment(spec, episode_id="e")).row, np.uint8).copy()
    row.view(codec.row_dtype)[0][field] = value
    with pytest.raises(IntegrityError, match=message):
        codec.decode(row.tobytes())


@pytest.mark.parametrize("name", ["proprio", "actions", "target_actions", "rewards"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_numbers_that_are_not_finite_are_refused(name, bad):
    spec = make_spec()
    segment = make_segment(spec, episode_id="e", length=3, is_last=True)
    array = getattr(segment, name).astype(np.float64)
    array.reshape(8, -1)[2, 0] = bad
    with pytest.raises(DataError, match=f"{name} holds NaN or infinity"):
        SegmentCodec(spec, 8).encode(replace(segment, **{name: array}))


def test_padding_may_hold_anything():
    spec = make_spec()
    segment = make_segment(spec, episode_id="e", length=3, is_last=True)
    segment.proprio[3:] = np.nan
    codec = SegmentCodec(spec, 8)
    assert not codec.decode(codec.encode(segment).row).proprio[3:].any()


@pytest.mark.parametrize(
    "change",
    [{"instruction": "x" * 257}, {"instruction": "é" * 129}, {"task": "t" * 65}, {"robot_id": "r\0"}],
    ids=["long", "long in UTF-8", "long task", "NUL"],
)
def test_texts_that_do_not_fit_are_refused_not_cut(change):
    spec = make_spec()
    (name,) = change
    with pytest.raises(DataError, match=f"{name} .* expected at most"):
        SegmentCodec(spec, 8).encode(replace(make_segment(spec, episode_id="e"), **change))


def test_shapes_and_cameras_must_be_the_spec_s():
    spec = make_spec(cameras=(CAMERA,))
    codec, segment = SegmentCodec(spec, 8), make_segment(spec, episode_id="e")
    with pytest.raises(DataError, match=r"proprio has shape \(8, 4\).* expects \(8, 5\)"):
        codec.encode(replace(segment, proprio=segment.proprio[:, :4]))
    with pytest.raises(DataError, match=r"has cameras \[\].* expects \['wrist'\]"):
        codec.encode(replace(segment, images={}))
    with pytest.raises(DataError, match="'wrist' has float64 frames"):
        codec.encode(replace(segment, images={"wrist": segment.images["wrist"].astype(float)}))
    encoded = codec.encode(segment)
    with pytest.raises(IntegrityError, match="'wrist' has 0 bytes"):
        codec.decode(encoded.row)
    with pytest.raises(ConfigError, match="num_steps 0"):
        SegmentCodec(spec, 0)
