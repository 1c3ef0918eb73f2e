import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_dist.core.errors import ConfigError, DataError, IntegrityError
from vla_dist.core.specs import CameraSpec
from vla_dist.data.image_codec import ImageCodec, ImageEncoding

CAMERA = CameraSpec(name="wrist", height=12, width=10)
KINDS = ["raw", "lz4", "jpeg"]


def codec_of(kind, camera=CAMERA):
    return ImageCodec(camera, ImageEncoding.parse(kind))


def smooth_frames(num, camera=CAMERA):
    """Slow gradients of other colours in each frame, which JPEG hardly changes."""
    rows, columns = np.mgrid[: camera.height, : camera.width]
    frames = [
        np.stack([20 * n + 5 * rows, 200 - 9 * n - 4 * columns, 7 * n + 2 * (rows + columns)], -1) for n in range(num)
    ]
    return np.array(frames, np.uint8).reshape(num, camera.height, camera.width, 3)


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    num=st.integers(1, 6),
    kind=st.sampled_from(["raw", "lz4"]),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_frames_come_back_as_they_were(height, width, num, kind, data):
    codec = codec_of(kind, CameraSpec(name="c", height=height, width=width))
    frames = np.random.default_rng(num).integers(0, 256, (num, height, width, 3), dtype=np.uint8)
    packed = bytes(codec.pack(frames))
    np.testing.assert_array_equal(codec.unpack(packed, num), frames)
    first = data.draw(st.integers(0, num - 1))
    count = data.draw(st.integers(0, num - first))
    np.testing.assert_array_equal(codec.unpack(packed, num, first, count), frames[first : first + count])
    np.testing.assert_array_equal(codec.unpack(memoryview(packed), num, first), frames[first:])


def test_raw_frames_have_one_stride_and_are_not_copied():
    codec, frames = codec_of("raw"), smooth_frames(3)
    packed = codec.pack(frames)
    assert codec.is_raw
    assert np.shares_memory(np.frombuffer(packed, np.uint8), frames)
    assert bytes(packed[codec.frame_bytes : 2 * codec.frame_bytes]) == frames[1].tobytes()
    assert codec.unpack(bytes(codec.pack(frames[:, ::-1])), 3)[0, 0].tolist() == frames[0, -1].tolist(), "turned over"


def test_jpeg_keeps_what_the_eye_sees_and_lower_quality_less_of_it():
    frames = smooth_frames(4)
    errors, sizes = [], []
    for quality in (95, 20):
        codec = codec_of(f"jpeg:{quality}")
        packed = codec.pack(frames)
        errors.append(np.abs(codec.unpack(packed, 4).astype(int) - frames).max())
        sizes.append(len(packed))
    assert errors[0] <= 6 < errors[1]
    assert sizes[1] < sizes[0]


def test_jpeg_does_not_mix_neighbouring_colours():
    camera = CameraSpec(name="c", height=8, width=8)
    frames = np.zeros((1, 8, 8, 3), np.uint8)
    frames[0, :, ::2, 0] = 255  # Columns of red between columns of blue: chroma subsampling would make them purple.
    frames[0, :, 1::2, 2] = 255
    codec = codec_of("jpeg:95", camera)
    assert np.abs(codec.unpack(codec.pack(frames), 1).astype(int) - frames).max() < 40


def test_clean_frames_take_less_room_in_lz4():
    camera = CameraSpec(name="c", height=64, width=64)
    frames = np.zeros((2, 64, 64, 3), np.uint8)
    frames[:, 10:20] = 9
    assert len(codec_of("lz4", camera).pack(frames)) < frames.nbytes / 10


@pytest.mark.parametrize("kind", KINDS)
def test_frames_of_another_camera_are_refused(kind):
    codec = codec_of(kind)
    with pytest.raises(
        DataError, match=r"'wrist' has uint8 frames of shape \(2, 10, 12, 3\), expected uint8 of \(L, 12, 10, 3\)"
    ):
        codec.pack(smooth_frames(2).transpose(0, 2, 1, 3))
    with pytest.raises(DataError, match="'wrist' has float32 frames"):
        codec.pack(smooth_frames(2).astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_another_length_are_named(kind):
    codec = codec_of(kind)
    packed = bytes(codec.pack(smooth_frames(3)))
    for data in (b"", packed[:-1], packed + b"x", packed[:7]):
        with pytest.raises(IntegrityError, match=r"camera 'wrist' has .* bytes"):
            codec.unpack(data, 3)
    with pytest.raises(IntegrityError, match="camera 'wrist'"):
        codec.unpack(packed, 2)


@pytest.mark.parametrize("kind", ["lz4", "jpeg"])
def test_no_flipped_byte_gives_frames_of_another_shape_or_another_error(kind):
    codec = codec_of(kind)
    packed = bytes(codec.pack(smooth_frames(2)))
    refused = []
    for at in range(len(packed)):
        for bit in (0, 7):
            damaged = bytearray(packed)
            damaged[at] ^= 1 << bit
            try:
                assert codec.unpack(bytes(damaged), 2).shape == (2, *codec.frame_shape)
            except IntegrityError as error:
                refused.append(str(error))
    assert len(refused) >= 2 * 8, "the table of frames is checked, and what the compression itself notices"
    assert all("camera 'wrist'" in message for message in refused)


def test_a_frame_of_another_size_within_jpeg_is_named():
    other = codec_of("jpeg", CameraSpec(name="c", height=6, width=10))
    data = bytes(other.pack(smooth_frames(2, other.camera)))
    with pytest.raises(IntegrityError, match=r"'wrist' has a frame of shape \(6, 10, 3\), expected \(12, 10, 3\)"):
        codec_of("jpeg").unpack(data, 2)


@pytest.mark.parametrize(
    ("text", "kind", "quality"),
    [("raw", "raw", 90), ("lz4", "lz4", 90), ("jpeg", "jpeg", 90), ("jpeg:1", "jpeg", 1), ("jpeg:100", "jpeg", 100)],
)
def test_texts_are_parsed_and_written(text, kind, quality):
    encoding = ImageEncoding.parse(text)
    assert (encoding.kind, encoding.quality) == (kind, quality)
    assert ImageEncoding.parse(str(encoding)) == encoding


@pytest.mark.parametrize(
    "text", ["", "png", "RAW", "raw:3", "lz4:9", "jpeg:", "jpeg:x", "jpeg:0", "jpeg:101", "jpeg:-1", " raw"]
)
def test_texts_that_name_no_encoding_are_refused(text):
    with pytest.raises(ConfigError, match=r"must be raw, lz4, jpeg or|must be within 1\.\.100"):
        ImageEncoding.parse(text)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="'png' must be raw"):
        ImageEncoding(kind="png")
    with pytest.raises(ConfigError, match="quality 0"):
        ImageEncoding(kind="jpeg", quality=0)
