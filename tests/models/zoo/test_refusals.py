"""Bad input of every kind gets one clear error from every member."""

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from vla_dist.core.errors import ConfigError, DataError, IntegrityError, ResourceMissing
from vla_dist.core.specs import CameraSpec
from vla_dist.core.types import PolicyArtifact
from vla_dist.models.auto import build_policy, make_artifact
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.member import setting_types
from vla_dist.models.zoo import ARCHITECTURES
from vla_dist.testing.fakes import make_spec
from vla_dist.testing.zoo import zoo_cases

MEMBERS = [case for case in zoo_cases() if case.name.endswith("-default")]
SEEING = make_spec(cameras=(CameraSpec(name="top", height=32, width=32),))
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(params=MEMBERS, ids=lambda case: case.architecture.name)
def member(request):
    return request.param


@pytest.fixture
def saved(member, tmp_path):
    member.build().save_pretrained(tmp_path)
    return tmp_path


def wrong_types(batch, config):
    yield "actions", replace(batch, actions=batch.actions.long())
    yield "target_chunks", replace(batch, target_chunks=batch.target_chunks.int())
    yield "timesteps", replace(batch, timesteps=batch.timesteps.float())
    yield "padding_mask", replace(batch, padding_mask=batch.padding_mask.float())
    if config.state_dim:
        yield "states", replace(batch, states=batch.states.long())
    if config.goal_dim:
        yield "goals", replace(batch, goals=batch.goals.long())
    for camera in config.cameras or ():
        yield camera, replace(batch, images={camera: batch.images[camera].int()})
        yield "divide 0..255 by 255", replace(batch, images={camera: batch.images[camera].float()})


def test_a_batch_of_other_types_or_ranges_is_refused(case):
    model = case.build()
    for named, wrong in wrong_types(case.batch(), case.config):
        with pytest.raises(DataError, match=named):
            model.loss(wrong)


def wrong_observations(case):
    good = case.observation(0)
    yield "finite numbers", replace(good, proprio=np.full(good.proprio.shape, "open"))
    yield "finite numbers", replace(good, proprio=good.proprio.astype(complex))
    yield "finite numbers", replace(good, proprio=good.proprio[None])
    for name in case.config.cameras or ():
        frame = good.images[name]
        yield "got nothing", replace(good, images={})
        yield "got float32", replace(good, images={name: (frame / 255).astype(np.float32)})
        yield "of shape", replace(good, images={name: frame[..., :1]})


def test_observations_of_other_types_are_refused_and_the_state_is_kept(case):
    policy = case.build_policy(case.build())
    _, (state,) = policy.act([case.observation(0, is_first=True)], [policy.initial_state()])
    expected = policy.act([case.observation(1)], [state])[0][0]
    for said, wrong in wrong_observations(case):
        with pytest.raises(DataError, match=said):
            policy.act([wrong], [state])
        with pytest.raises(DataError, match=said):
            policy.act([case.observation(1), wrong], [state, state])
    np.testing.assert_allclose(policy.act([case.observation(1)], [state])[0][0], expected, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_numbers_out_of_range_and_names_that_do_not_exist_are_refused(name):
    architecture = ARCHITECTURES[name]
    known = setting_types(architecture.config)
    for setting, kind in known.items():
        if kind is int:
            with pytest.raises(ConfigError):
                architecture.configure("tiny", SEEING, **{setting: -1})
        if "dropout" in setting:
            for wrong in (-0.1, 1.0, float("nan")):
                with pytest.raises(ConfigError, match="dropout"):
                    architecture.configure("tiny", SEEING, **{setting: wrong})
    with pytest.raises(ConfigError, match="has no setting 'wings'"):
        architecture.configure("tiny", SEEING, wings=2)
    with pytest.raises(ConfigError, match="head"):
        architecture.configure("tiny", SEEING, head="antlers")
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        architecture.configure("tini", SEEING)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_backbones_and_their_settings_that_do_not_exist_are_refused_before_anything_is_built(name):
    architecture = ARCHITECTURES[name]
    for visual, said in (
        ({"backbone": "resnet5"}, "did you mean 'resnet50'"),
        ({"backbon": "vit"}, "did you mean 'backbone'"),
        ({"backbone": "conv_small", "width": 7}, "multiple of 8"),
        ({"batch_norm": "none"}, "'group' or 'frozen'"),
    ):
        with pytest.raises(ConfigError, match=said):
            architecture.configure("tiny", SEEING, visual=visual)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("decision_transformer", {"n_heads": 7}, "7 heads do not divide hidden_dim 64"),
        ("memory", {"num_heads": 7}, "7 heads do not divide memory_dim 32"),
        ("vla", {"fusion_type": "cross_attention", "fusion_heads": 7}, "7 fusion_heads do not divide hidden_dim 64"),
        ("vla", {"fusion_type": "blend"}, "concat, cross_attention, gated_fusion, film"),
        ("rt1", {"conditioning": "fusion", "fusion_type": "blend"}, "concat, cross_attention, gated_fusion, film"),
        ("rt1", {"goal_dim": 0, "language": {"freez": True}}, "did you mean 'freeze'"),
        ("vla", {"goal_dim": 0, "language": {"freez": True}}, "did you mean 'freeze'"),
        ("bcz", {"goal_dim": 0, "language": {"freez": True}}, "did you mean 'freeze'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(name, changes, said):
    with pytest.raises(ConfigError, match=said):
        ARCHITECTURES[name].configure("tiny", SEEING, **changes)


@pytest.mark.parametrize("trunk", [{"num_attention_heads": 7}, {"hidden_size": "wide"}, {"layers": 3}])
def test_a_trunk_that_cannot_be_built_is_one_error(trunk):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    visual = {"backbone": "vit", "image_size": 32, "trunk": {**small, **trunk}}
    config = ARCHITECTURES["vla"].configure("tiny", SEEING, visual=visual)
    with pytest.raises(ConfigError, match="backbone 'vit'"):
        ARCHITECTURES["vla"].model(config)


def test_a_checkpoint_of_another_config_is_refused(member, saved):
    settings = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**settings, "action_dim": settings["action_dim"] + 1}))
    with pytest.raises((DataError, ConfigError), match=r"expected|must name"):
        AutoModel.from_pretrained(saved)


def test_a_checkpoint_of_another_member_is_refused(member, saved):
    other = MEMBERS[MEMBERS.index(member) - 1]
    with pytest.raises(ConfigError, match=f"expected '{other.config.model_type}'"):
        other.architecture.model.from_pretrained(saved)
    other.config.save_pretrained(saved)
    with pytest.raises(DataError, match="is missing"):
        AutoModel.from_pretrained(saved)


def test_a_tampered_checkpoint_is_refused(member, saved):
    tensors = load_file(saved / WEIGHTS)
    whole = (saved / WEIGHTS).read_bytes()
    name = max(tensors, key=lambda key: tensors[key].numel())
    for changed, said in (
        ({key: value for key, value in tensors.items() if key != name}, f"{name} is missing"),
        ({**tensors, "surplus": torch.zeros(2)}, "surplus is unknown"),
        ({**tensors, name: torch.full_like(tensors[name], torch.nan)}, f"{name} is not finite"),
        ({**tensors, name: torch.zeros(3, 2)}, rf"{name} has shape \(3, 2\)"),
    ):
        save_file(changed, saved / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(DataError, match=said):
            AutoModel.from_pretrained(saved)
    for damaged in (whole[: len(whole) // 2], b"\xff" * 64 + whole[64:], b""):
        (saved / WEIGHTS).write_bytes(damaged)
        with pytest.raises(IntegrityError, match="damaged"):
            AutoModel.from_pretrained(saved)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def test_a_pickled_checkpoint_is_not_opened(member, saved):
    (saved / WEIGHTS).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(IntegrityError, match="damaged"):
        AutoModel.from_pretrained(saved)
    shutil.move(saved / WEIGHTS, saved / "pytorch_model.bin")
    with pytest.raises(ResourceMissing, match="Pickles are not read"):
        AutoModel.from_pretrained(saved)
    with pytest.raises(ResourceMissing, match="save_pretrained"):
        member.architecture.model.from_pretrained(saved / "nowhere")


def test_an_artifact_of_other_types_is_refused(member):
    artifact = make_artifact(member.build(), name="p", spec=member.spec, conditioning=ReturnConditioning())
    name = next(key for key, value in artifact.tensors.items() if value.dtype == np.float32 and value.size)
    for kind in (object, np.int64, "U4"):
        tensors = {**artifact.tensors, name: artifact.tensors[name].astype(kind)}
        with pytest.raises(DataError, match=f"{name} is of"):
            build_policy(PolicyArtifact(manifest=artifact.manifest, tensors=tensors), embed=member.embed)
