from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vla_dist.core.errors import DataError, IntegrityError
from vla_dist.core.specs import CameraSpec
from vla_dist.core.types import PolicyManifest
from vla_dist.registry.manifests import (
    manifest_from_json,
    manifest_to_json,
    same_but_version,
    tensors_from_bytes,
    tensors_to_bytes,
)
from vla_dist.testing.fakes import make_spec

MANIFEST = PolicyManifest(
    name="p",
    architecture="decision_transformer",
    config={"hidden_dim": 64, "vision": None, "layers": [1, 2]},
    spec=make_spec(cameras=(CameraSpec(name="c", height=2, width=3),)),
    horizon=4,
    version=7,
    parent=6,
    metrics={"loss": 0.1},
    tensors_sha256="ab" * 32,
    num_bytes=10,
    created_unix_s=1_700_000_000.123456,
    git_revision="abc",
)


def test_a_manifest_comes_back_equal():
    assert manifest_from_json(manifest_to_json(MANIFEST)) == MANIFEST


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", manifest_to_json(MANIFEST)[:-5], '{"spec": {}}'], ids=str)
def test_what_is_no_manifest_is_refused(text):
    with pytest.raises(IntegrityError, match="not a policy manifest"):
        manifest_from_json(text)


@pytest.mark.parametrize(
    "change", [{"config": {"x": float("inf")}}, {"metrics": {"loss": float("nan")}}, {"config": {"x": {1, 2}}}]
)
def test_what_json_cannot_hold_is_refused(change):
    with pytest.raises(DataError, match="not plain JSON"):
        manifest_to_json(replace(MANIFEST, **change))


def test_sameness_looks_past_version_and_tuples():
    assert same_but_version(MANIFEST, replace(MANIFEST, version=8, config={**MANIFEST.config, "layers": (1, 2)}))
    assert not same_but_version(MANIFEST, replace(MANIFEST, tensors_sha256="cd" * 32))
    assert not same_but_version(MANIFEST, replace(MANIFEST, created_unix_s=1.0))


DTYPES = st.sampled_from(["float32", "float64", "float16", "int64", "int32", "uint8", "bool"])


@given(st.dictionaries(st.text(max_size=5), DTYPES.flatmap(lambda d: arrays.arrays(d, (2, 3))), min_size=1, max_size=3))
def test_tensors_come_back_equal(tensors):
    data = tensors_to_bytes(tensors)
    assert tensors_to_bytes(dict(reversed(tensors.items()))) == data, "the order of the names does not matter"
    found = tensors_from_bytes(data)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)


def test_views_are_stored_as_they_look():
    matrix = np.arange(6.0).reshape(2, 3)
    tensors = {"transposed": matrix.T, "strided": matrix[:, ::2], "scalar": np.float32(3).reshape(())}
    found = tensors_from_bytes(tensors_to_bytes(tensors))
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
        assert found[name].shape == tensor.shape


def test_tensors_that_cannot_be_stored_are_refused():
    with pytest.raises(DataError, match="without tensors"):
        tensors_to_bytes({})
    with pytest.raises(DataError, match="cannot hold"):
        tensors_to_bytes({"x": np.array(["text"])})
    with pytest.raises(IntegrityError, match="not a safetensors file"):
        tensors_from_bytes(b"no tensors at all")
