import hashlib
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from vla_dist.core.errors import ConfigError, IntegrityError, NotFound
from vla_dist.registry.comparison import MANIFEST, TENSORS, compare, read_files, write_files
from vla_dist.registry.manifests import manifest_from_json


def test_a_version_is_equal_to_itself(make_artifact):
    found = compare(make_artifact(1.0), make_artifact(1.0))
    assert found.fields == {}
    assert found.tensors == ()


def test_settings_and_tensors_that_differ_are_found(make_artifact):
    left = make_artifact(2.0, config={"model": {"hidden_dim": 32, "head": "tanh"}}, metrics={"updates": 1.0})
    right = make_artifact(3.0, config={"model": {"hidden_dim": 64, "head": "tanh"}}, metrics={"updates": 1.0})
    del right.tensors["steps"]
    right.tensors["new"] = np.zeros(2)
    found = compare(left, right)
    assert dict(found.fields) == {"config.model.hidden_dim": (32, 64)}
    assert {(change.name, change.what) for change in found.tensors} == {
        ("bias", "values"),
        ("steps", "only left"),
        ("new", "only right"),
    }
    (bias,) = [change for change in found.tensors if change.name == "bias"]
    assert bias.relative_change == pytest.approx(0.5)


def test_a_version_as_files_is_the_version(make_artifact, tmp_path):
    artifact = make_artifact(5.0)
    write_files(artifact, tmp_path / "deep" / "folder")
    folder = tmp_path / "deep" / "folder"
    data = (folder / TENSORS).read_bytes()
    expected = replace(artifact.manifest, tensors_sha256=hashlib.sha256(data).hexdigest(), num_bytes=len(data))
    assert manifest_from_json((folder / MANIFEST).read_text()) == expected
    assert read_files(folder).manifest == expected
    assert load_file(folder / TENSORS)["bias"][0] == 5.0
    with pytest.raises(ConfigError, match="another folder"):
        write_files(artifact, folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="may write to"):
        write_files(artifact, tmp_path / "file")


def test_files_come_back_whole_or_not_at_all(make_artifact, tmp_path):
    with pytest.raises(NotFound, match="registry pull"):
        read_files(tmp_path)
    artifact = make_artifact(5.0)
    write_files(artifact, tmp_path / "policy")
    found = read_files(tmp_path / "policy")
    for name, tensor in artifact.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], tensor)
    weights = tmp_path / "policy" / TENSORS
    whole = weights.read_bytes()
    for damaged in (whole[:-9], whole[:-1] + bytes([whole[-1] ^ 1])):
        weights.write_bytes(damaged)
        with pytest.raises(IntegrityError, match="pull the version again"):
            read_files(tmp_path / "policy")
