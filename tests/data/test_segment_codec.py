from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_dist.core.errors import ConfigError, DataError, IntegrityError
from vla_dist.core.specs import CameraSpec
from vla_dist.core.types import SOURCES, Segment
from vla_dist.data.image_codec import ImageEncoding
from vla_dist.data.returns import returns_to_go
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
    spec = make_spec(proprio_dim=3, action_dim=2, cameras=(CAMERA,))
    codec = SegmentCodec(spec, 4)
    segment = make_segment(spec, episode_id="e", num_steps=4, length=3, is_last=True, success=True, seed=1)
    batch = pa.ipc.read_record_batch(pa.py_buffer(codec.encode(segment).row), codec.schema)
    batch.validate(full=True)
    (row,) = batch.to_pylist()
    assert row["episode_id"].rstrip(b"\0") == b"e"
    assert row["instruction"].rstrip(b"\0") == b"please go"
    assert (row["length"], row["is_last"], row["success"]) == (3, 1, 1)
    assert row["source"] == SOURCES.index("expert")
    # The schema's metadata says what the numbers of a step are.
    widths = dict(column.split(":") for column in codec.schema.metadata[b"step_columns"].decode().split(","))
    bounds = np.cumsum([0, *map(int, widths.values())])
    steps = np.array(row["steps"], np.float32).reshape(4, bounds[-1])
    columns = {name: steps[:, a:b] for name, a, b in zip(widths, bounds, bounds[1:], strict=False)}
    for name in ("proprio", "actions", "target_actions"):
        np.testing.assert_array_equal(columns[name][:3], getattr(segment, name)[:3])
    assert columns["reward"].ravel().tolist() == [0.0, 1.0, 2.0, 0.0]
    assert columns["segment_return"].ravel().tolist() == [3.0, 3.0, 2.0, 0.0]
    assert not steps[3].any()
    assert codec.schema.metadata[b"spec"] == spec.digest.encode()


@given(st.lists(segments(), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_the_layout_is_constant(cases):
    codec, _ = cases[0]
    fitting = [segment for other, segment in cases if other.schema_id == codec.schema_id]
    rows = [bytes(encoded.row) for encoded in codec.encode_all(fitting)]
    assert len({len(row) for row in rows}) == 1
    header = codec.row_bytes - pa.ipc.read_record_batch(pa.py_buffer(rows[0]), codec.schema).nbytes
    assert len({row[:64] for row in rows}) == 1
    assert header > 64
    for row, segment in zip(rows, fitting, strict=True):
        steps = np.frombuffer(row, "<f4", codec.num_steps * codec.layout.num_columns, codec.steps_offset)
        steps = steps.reshape(codec.num_steps, codec.layout.num_columns)
        np.testing.assert_array_equal(steps[: segment.length, codec.layout.actions], segment.actions[: segment.length])
        assert row == bytes(codec.encode(segment).row), "together or alone"


@given(length=st.integers(1, 40), scale=st.floats(1e-3, 1e6), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_returns_lose_nothing_to_float32(length, scale, seed):
    spec = make_spec()
    rng = np.random.default_rng(seed)
    rewards = np.zeros(40, np.float32)
    rewards[:length] = rng.normal(size=length) * scale ** rng.random(length)
    codec = SegmentCodec(spec, 40)
    segment = make_segment(spec, episode_id="e", num_steps=40, length=length, is_last=True)
    encoded = codec.encode(replace(segment, rewards=rewards))
    steps = codec.decode_rows([encoded.row])[0]["steps"]
    column = codec.layout.segment_return
    found = steps[:, column].astype(np.float64) + steps[:, column + 1]
    expected = returns_to_go(rewards)
    # Two float32 hold 48 bits.
    np.testing.assert_allclose(found, expected, rtol=2.0**-47, atol=1e-30)
    assert encoded.segment_return == expected[0]


def test_an_episode_without_segments_is_encoded_to_nothing():
    assert SegmentCodec(make_spec(), 8).encode_all([]) == []


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
    actions = rows["steps"][..., codec.layout.actions]
    np.testing.assert_array_equal(actions, np.stack([s.actions for s in given_segments]))
    assert rows["segment_index"].tolist() == [0, 1, 2, 3, 4]
    assert np.shares_memory(actions, rows), "a view, not a copy per column"
    assert len(codec.decode_rows([])) == 0


def test_bytes_of_another_size_or_header_are_refused():
    spec = make_spec()
    codec = SegmentCodec(spec, 8)
    row = codec.encode(make_segment(spec, episode_id="e")).row
    with pytest.raises(IntegrityError, match=f"row of {len(row) - 1} bytes, expected {len(row)}"):
        codec.decode_rows([row[:-1]])
    with pytest.raises(IntegrityError, match="row 1 of 2 has another Arrow header"):
        codec.decode_rows([row, bytes(row[:20]) + bytes([row[20] ^ 1]) + bytes(row[21:])])


def test_rows_of_another_spec_with_the_same_layout_are_told_apart():
    # 4 + 2 x 2 and 2 + 2 x 3 numbers a step are as many.
    one, other = make_spec(proprio_dim=4, action_dim=2), make_spec(proprio_dim=2, action_dim=3)
    row = SegmentCodec(one, 8).encode(make_segment(one, episode_id="e")).row
    assert len(row) == SegmentCodec(other, 8).row_bytes, "this test needs two specs with rows of one size"
    with pytest.raises(IntegrityError, match="written for another spec than 'fake'"):
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


@pytest.mark.parametrize("kind", ["raw", "lz4"])
def test_any_flipped_byte_is_found(kind):
    camera = CameraSpec(name="wrist", height=2, width=2)
    spec = make_spec(proprio_dim=1, action_dim=1, cameras=(camera,))
    codec = SegmentCodec(spec, 2, {"wrist": ImageEncoding.parse(kind)})
    segment = make_segment(spec, episode_id="e", num_steps=2, length=1, is_last=True, seed=4)
    encoded = codec.encode(segment)
    row, frames = bytes(encoded.row), bytes(encoded.images["wrist"])
    codec.decode(row, {"wrist": frames})
    for at in range(len(row)):
        damaged = bytearray(row)
        damaged[at] ^= 1 << (at % 8)
        with pytest.raises(IntegrityError):
            codec.decode(bytes(damaged), {"wrist": frames})
    for at in range(len(frames)):
        damaged = bytearray(frames)
        damaged[at] ^= 1 << (at % 8)
        with pytest.raises(IntegrityError, match="camera 'wrist'"):
            codec.decode(row, {"wrist": bytes(damaged)})


def test_the_frames_of_another_segment_are_found():
    spec = make_spec(cameras=(CAMERA,))
    codec = SegmentCodec(spec, 8)
    one, other = (codec.encode(make_segment(spec, episode_id="e", seed=seed)) for seed in (1, 2))
    with pytest.raises(IntegrityError, match="'wrist': the frames differ from their checksum"):
        codec.decode(one.row, other.images)


@pytest.mark.parametrize("kind", ["lz4", "jpeg:95"])
def test_frames_are_stored_as_the_camera_s_encoding_says(kind):
    other = CameraSpec(name="head", height=8, width=8)
    spec = make_spec(cameras=(CAMERA, other))
    codec = SegmentCodec(spec, 8, {"head": ImageEncoding.parse(kind)})
    segment = make_segment(spec, episode_id="e", length=5, is_last=True)
    for frame in segment.images["head"]:
        frame[:] = frame[0, 0]
    encoded = codec.encode(segment)
    assert memoryview(encoded.images["wrist"]).nbytes == 5 * 3 * 5 * 3
    assert codec.image_codecs["wrist"].is_raw
    assert not codec.image_codecs["head"].is_raw
    found = codec.decode(encoded.row, encoded.images).images
    np.testing.assert_array_equal(found["wrist"][:5], segment.images["wrist"][:5])
    assert np.abs(found["head"][:5].astype(int) - segment.images["head"][:5]).max() <= 3
    assert not found["head"][5:].any()
    assert codec.schema_id == SegmentCodec(spec, 8).schema_id, "the row is the same however the frames are stored"


def test_an_encoding_for_a_camera_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"\['wirst'\], which spec 'fake' lacks; it has \['wrist'\]"):
        SegmentCodec(make_spec(cameras=(CAMERA,)), 8, {"wirst": ImageEncoding()})


@pytest.mark.parametrize("name", ["proprio", "actions", "target_actions", "rewards"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_numbers_that_are_not_finite_are_refused(name, bad):
    spec = make_spec()
    segment = make_segment(spec, episode_id="e", length=3, is_last=True)
    array = getattr(segment, name).astype(np.float64)
    array.reshape(8, -1)[2, 0] = bad
    with pytest.raises(DataError, match=f"{name} holds NaN or infinity"):
        SegmentCodec(spec, 8).encode(replace(segment, **{name: array}))


def test_rewards_whose_sum_float32_cannot_hold_are_refused():
    spec = make_spec()
    segment = make_segment(spec, episode_id="e")
    with pytest.raises(DataError, match=r"e/0: rewards holds .* the sum of the rewards must be finite"):
        SegmentCodec(spec, 8).encode(replace(segment, rewards=np.full(8, 3e38, np.float32)))


def test_the_one_bad_segment_of_many_is_named():
    spec = make_spec()
    good, bad = make_segment(spec, episode_id="good"), make_segment(spec, episode_id="bad", segment_index=3)
    bad.actions[1, 1] = np.nan
    with pytest.raises(DataError, match="bad/3: actions holds NaN"):
        SegmentCodec(spec, 8).encode_all([good, bad, good])


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
