"""Records survive the wire unchanged, and what does not fit is refused before it is decoded."""

import math
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest

from vla_dist.core.errors import DataError
from vla_dist.core.specs import CameraSpec, Dimension, EnvSpec
from vla_dist.core.types import ActionChunk, Observation
from vla_dist.protocol.arrays import decode_array, encode_array
from vla_dist.protocol.conversion import (
    MAX_DIMENSIONS,
    decode_chunk,
    decode_grant,
    decode_history,
    decode_observation,
    decode_request,
    decode_segment,
    decode_spec,
    encode_chunk,
    encode_grant,
    encode_observation,
    encode_request,
    encode_segment,
    encode_spec,
)
from vla_dist.protocol.records import SessionGrant, SessionLimits, SessionRequest
from vla_dist.protocol.v1 import types_pb2
from vla_dist.testing.fakes import make_segment, make_spec

CAMERAS = (CameraSpec(name="front", height=4, width=6), CameraSpec(name="wrist", height=2, width=2))
SPEC = make_spec(cameras=CAMERAS)


def make_observation(spec: EnvSpec = SPEC, *, previous: bool = True) -> Observation:
    rng = np.random.default_rng(0)
    return Observation(
        proprio=rng.normal(size=spec.proprio_dim).astype(np.float32),
        instruction="öffne die Schublade",
        images={c.name: rng.integers(0, 256, (c.height, c.width, 3), dtype=np.uint8) for c in spec.cameras},
        previous_action=np.array([0.5, -0.25], np.float32) if previous else None,
        previous_reward=0.1,
    )


def same(left: object, right: object) -> bool:
    if isinstance(left, np.ndarray):
        return isinstance(right, np.ndarray) and left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    return left == right


def assert_same(left: object, right: object) -> None:
    for field in fields(left):  # type: ignore[arg-type]
        assert same(getattr(left, field.name), getattr(right, field.name)), field.name


@pytest.mark.parametrize("previous", [True, False])
def test_observation_round_trip(previous: bool) -> None:
    observation = make_observation(previous=previous)
    wire = encode_observation(observation).SerializeToString()
    assert_same(observation, decode_observation(types_pb2.Observation.FromString(wire), SPEC))


def test_spec_round_trip_keeps_the_digest_and_open_bounds() -> None:
    spec = replace(
        SPEC,
        proprio=(Dimension(name="x", unit="m", low=-1.5), Dimension(name="y", unit="rad", high=math.pi)),
        action_kind="discrete",
        normalisation_hash="abc",
    )
    decoded = decode_spec(types_pb2.EnvSpec.FromString(encode_spec(spec).SerializeToString()))
    assert decoded == spec
    assert decoded.digest == spec.digest


def test_segment_round_trip() -> None:
    segment = make_segment(SPEC, episode_id="e1", segment_index=3, num_steps=8, length=5, is_last=True, success=True)
    wire = encode_segment(segment).SerializeToString()
    assert_same(segment, decode_segment(types_pb2.Segment.FromString(wire), SPEC, num_steps=8))


def test_chunk_and_session_round_trips() -> None:
    chunk = ActionChunk(
        actions=np.ones((3, 2), np.float32), policy_version=4, observation_id=9, valid_for_ms=12.5, fallback="zero"
    )
    assert_same(chunk, decode_chunk(encode_chunk(chunk), SPEC, horizon=3))
    request = SessionRequest(spec=SPEC, policy="demo@stable", robot_id="r", task="go", policy_version=2)
    assert decode_request(encode_request(request)) == request
    grant = SessionGrant(
        policy_version=2, horizon=3, context_steps=4, limits=SessionLimits(idle_timeout_s=1.5), spec_digest=SPEC.digest
    )
    assert decode_grant(encode_grant(grant)) == grant


def test_a_decoded_array_is_the_receivers_own() -> None:
    array = decode_array(encode_array(np.zeros(2, np.float32), label="x"), label="x", dtype=np.float32, shape=(2,))
    array[0] = 1.0
    assert array.flags.owndata


def bad_type(message: types_pb2.Observation) -> None:
    message.proprio.data_type = types_pb2.DATA_TYPE_UINT8


def no_type(message: types_pb2.Observation) -> None:
    message.proprio.data_type = types_pb2.DATA_TYPE_UNSPECIFIED


def other_shape(message: types_pb2.Observation) -> None:
    message.proprio.shape[0] = 6


def more_axes(message: types_pb2.Observation) -> None:
    message.proprio.shape.extend([1] * 2000)


def short_bytes(message: types_pb2.Observation) -> None:
    message.proprio.data = message.proprio.data[:-1]


def huge_claim(message: types_pb2.Observation) -> None:
    message.images["front"].shape[0] = 2**32 - 1


def not_a_number(message: types_pb2.Observation) -> None:
    message.proprio.data = np.full(5, np.nan, "<f4").tobytes()


def infinite_reward(message: types_pb2.Observation) -> None:
    message.previous_reward = math.inf


def missing_camera(message: types_pb2.Observation) -> None:
    del message.images["wrist"]


def unknown_camera(message: types_pb2.Observation) -> None:
    message.images["rear"].CopyFrom(message.images["wrist"])


def long_instruction(message: types_pb2.Observation) -> None:
    message.instruction = "x" * 2000


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (bad_type, ["proprio", "uint8", "expected float32"]),
        (no_type, ["proprio", "unspecified"]),
        (other_shape, ["proprio", "(6)", "expected (5)"]),
        (more_axes, ["proprio", "2001 axes"]),
        (short_bytes, ["proprio", "19 bytes", "expected 20"]),
        (huge_claim, ["front", "expected (4, 6, 3)"]),
        (not_a_number, ["proprio", "not finite"]),
        (infinite_reward, ["previous_reward", "inf"]),
        (missing_camera, ["cameras", "missing ['wrist']"]),
        (unknown_camera, ["cameras", "unknown ['rear']"]),
        (long_instruction, ["instruction", "2000 bytes", "at most 1024"]),
    ],
)
def test_an_observation_that_does_not_fit_is_refused(
    spoil: Callable[[types_pb2.Observation], None], words: list[str]
) -> None:
    message = encode_observation(make_observation())
    spoil(message)
    with pytest.raises(DataError) as caught:
        decode_observation(message, SPEC)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_history_is_counted_before_it_is_decoded() -> None:
    garbage = types_pb2.Observation()
    with pytest.raises(DataError, match="3 observations, expected at most 2"):
        decode_history([garbage] * 3, SPEC, context_steps=2, max_instruction_bytes=10)


def test_an_endless_spec_is_refused() -> None:
    message = encode_spec(SPEC)
    message.action.extend([message.action[0]] * MAX_DIMENSIONS)
    with pytest.raises(DataError, match="action dimensions, expected at most"):
        decode_spec(message)


def test_a_spec_without_rate_is_refused() -> None:
    message = encode_spec(SPEC)
    message.control_hz = math.nan
    with pytest.raises(DataError, match="control_hz"):
        decode_spec(message)


@pytest.mark.parametrize("name", ["", "demo", "@stable", "demo@", "../../etc/passwd"])
def test_a_policy_is_a_name_and_a_channel(name: str) -> None:
    with pytest.raises(DataError, match="name@channel"):
        SessionRequest(spec=SPEC, policy=name)


def test_booleans_hold_only_zero_and_one() -> None:
    message = encode_segment(make_segment(SPEC, episode_id="e"))
    message.interventions.data = b"\2" * 8
    with pytest.raises(DataError, match="interventions"):
        decode_segment(message, SPEC, num_steps=8)


def test_float64_is_not_sent_in_silence() -> None:
    with pytest.raises(DataError, match="float64"):
        encode_array(np.zeros(2), label="proprio")
