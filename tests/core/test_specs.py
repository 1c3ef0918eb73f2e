import dataclasses
import math

import pytest

from vla_dist.core.errors import ConfigError, ContractMismatch
from vla_dist.core.specs import CameraSpec, Dimension, EnvSpec
from vla_dist.testing.fakes import make_spec


def test_json_round_trip_keeps_digest_and_open_bounds():
    spec = make_spec(cameras=(CameraSpec(name="wrist", height=8, width=9),))
    again = EnvSpec.from_json(spec.to_json())
    assert again == spec
    assert again.digest == spec.digest
    assert again.proprio[0].high == math.inf


def test_name_is_not_part_of_the_contract():
    spec = make_spec()
    other = dataclasses.replace(spec, name="another arm")
    assert other.digest == spec.digest
    spec.require_match(other)


def test_every_difference_is_named_in_one_sentence():
    spec = make_spec()
    joints = (dataclasses.replace(spec.proprio[0], unit="rad"), *spec.proprio[1:])
    other = dataclasses.replace(
        spec, proprio=joints, control_hz=25.0, cameras=(CameraSpec(name="top", height=4, width=4),)
    )
    with pytest.raises(ContractMismatch) as caught:
        spec.require_match(other)
    message = str(caught.value)
    assert "control_hz 10.0 against 25.0" in message
    assert "proprio[0].unit '1' against 'rad'" in message
    assert "cameras has 0 entries against 1" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"action": ()}, "no action dimension"),
        ({"control_hz": 0.0}, "must be positive"),
        ({"max_episode_steps": 0}, "at least 1"),
        ({"proprio": (Dimension(name="x"), Dimension(name="x"))}, "appear twice"),
        ({"action_kind": "fuzzy"}, "continuous"),
    ],
)
def test_impossible_specs_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(make_spec(), **change)


@pytest.mark.parametrize("text", ["", "{}", '{"name": 3}', "[1]"])
def test_foreign_json_is_refused(text):
    with pytest.raises(ConfigError, match="not the JSON of an EnvSpec"):
        EnvSpec.from_json(text)


def test_bounds_must_be_ordered():
    with pytest.raises(ConfigError, match="must be below"):
        Dimension(name="x", low=1.0, high=1.0)
