from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from vla_dist.core.errors import ConfigError, DataError, ResourceMissing
from vla_dist.core.specs import CameraSpec
from vla_dist.models.composed.presets import PRESETS, tiny
from vla_dist.models.composed.vla import ComposedVLA
from vla_dist.models.fusion import FUSIONS
from vla_dist.models.heads import HEADS
from vla_dist.models.language_encoder import BERT_BASE
from vla_dist.testing.fakes import make_spec
from vla_dist.testing.windows import make_train_batch

G, A = 6, 3
SPEC = make_spec(action_dim=A, cameras=(CameraSpec(name="top", height=32, width=32),))
TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VISUAL = {
    "conv_small": {"width": 8},
    "resnet18": {"trunk": {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}},
    "efficientnet-b0": {"trunk": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320}},
    "vit": {"image_size": 64, "trunk": TRANSFORMER},
}
LANGUAGE = {
    "goals": {"goal_dim": G},
    "reader": {
        "goal_dim": 0,
        "language": {"model_name": BERT_BASE, "trunk": TRANSFORMER, "output_dim": 8, "freeze": False},
    },
}


def build(*, backbone="conv_small", language="goals", spec=SPEC, **changes):
    settings = {"hidden_dim": 16, "tokens_per_frame": 2, "horizon": 2, **LANGUAGE[language], **changes}
    return ComposedVLA(tiny(spec, visual={"backbone": backbone, **VISUAL[backbone]}, **settings))


def words_of(model, batch):
    """What reaches the model of the words, with a gradient."""
    if model.language is None:
        return batch.goals.requires_grad_()
    return model.language.trunk.embeddings.word_embeddings.weight


def require_learning(backbone, language, fusion, head):
    combination = (backbone, language, fusion, head)
    torch.manual_seed(0)
    model = build(backbone=backbone, language=language, fusion_type=fusion, head=head)
    batch = make_train_batch(model.config, num_windows=4, image_size=(64, 64))
    frames = (batch.images["top"].float() / 255).requires_grad_()
    words = words_of(model, batch)
    loss, _ = model.loss(replace(batch, images={"top": frames}))
    loss.backward()
    assert loss.isfinite(), combination
    untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == [], combination
    assert frames.grad.flatten(1).any(1).all(), combination
    assert words.grad.any(), combination
    with torch.inference_mode():
        said = batch.goals if language == "goals" else batch.instructions
        output = model.eval()(batch.images["top"], said, batch.states)
    assert output.shape == (4, A), combination
    assert output.isfinite().all(), combination
    assert head == "discrete" or output.abs().max() <= 1, combination


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("language", LANGUAGE)
def test_any_words_any_fusion_and_any_head_learn_from_both_modalities(language, fusion):
    for head in HEADS:
        require_learning("conv_small", language, fusion, head)


@pytest.mark.parametrize("backbone", sorted(set(VISUAL) - {"conv_small"}))
def test_any_encoder_learns_with_any_fusion_from_both_modalities(backbone):
    for fusion in FUSIONS:
        require_learning(backbone, "goals", fusion, "mse")


@pytest.mark.slow
@pytest.mark.parametrize("backbone", VISUAL)
def test_any_encoder_with_any_words_any_fusion_and_any_head(backbone):
    for language, fusion, head in product(LANGUAGE, FUSIONS, HEADS):
        require_learning(backbone, language, fusion, head)


def test_a_longer_context_is_seen_and_what_is_padded_is_not():
    model = build(context_steps=3, fusion_type="cross_attention").eval()
    features, states = torch.randn(2, 3, *model.feature_shape), torch.randn(2, 3, 5)
    words, valid = model.understand(torch.randn(2, G), 2), torch.ones(2, 3, dtype=torch.bool)
    whole = model.decide(states, features, words, valid)
    assert not torch.allclose(model.decide(states, features.flip(1), words, valid), whole, atol=1e-4)
    valid[:, 0] = False
    padded = model.decide(states, features, words, valid)
    torch.testing.assert_close(padded, model.decide(states[:, 1:], features[:, 1:], words, valid[:, 1:]))
    assert not torch.allclose(padded, whole, atol=1e-4)


def test_two_cameras_are_told_apart():
    spec = replace(SPEC, cameras=(*SPEC.cameras, CameraSpec(name="hand", height=32, width=32)))
    model = build(spec=spec).eval()
    batch = make_train_batch(model.config, num_windows=2)
    swapped = {"top": batch.images["hand"], "hand": batch.images["top"]}
    with torch.inference_mode():
        one, other = (model(images, batch.goals, batch.states) for images in (batch.images, swapped))
    assert not torch.allclose(one, other, atol=1e-4)
    with pytest.raises(DataError, match="by name"):
        model(batch.images["top"], batch.goals, batch.states)


def test_without_a_camera_it_decides_from_proprio_and_words():
    model = build(spec=make_spec(action_dim=A)).eval()
    assert model(None, torch.randn(2, G), torch.randn(2, 5)).shape == (2, A)
    with pytest.raises(DataError, match="give states"):
        model(None, torch.randn(2, G))
    with pytest.raises(DataError, match="no cameras"):
        model.encode_frames({}, None)


def test_a_generator_draws_different_chunks_and_none_gives_the_same_again():
    model = build(head="flow").eval()
    batch = make_train_batch(model.config, num_windows=2)
    words = model.understand(batch.goals, 2)
    features = model.encode_frames(batch.images, words)

    def draw(generator):
        return model.decide(batch.states, features, words, batch.padding_mask, generator)

    assert torch.equal(draw(None), draw(None))
    assert torch.equal(draw(np.random.default_rng(1)), draw(np.random.default_rng(1)))
    assert not torch.equal(draw(np.random.default_rng(1)), draw(np.random.default_rng(2)))


def test_a_frozen_reader_begins_with_the_weights_of_its_name():
    frozen = ComposedVLA(tiny(SPEC, goal_dim=0, language={"output_dim": 8}))
    donor = ComposedVLA(tiny(SPEC, goal_dim=0, language={"output_dim": 8}))
    mine, theirs = (m.language.trunk.state_dict() for m in (frozen, donor))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not any(p.requires_grad for p in frozen.language.trunk.parameters())
    with pytest.raises(ResourceMissing):
        ComposedVLA(tiny(SPEC, goal_dim=0, language={"model_name": BERT_BASE, "trunk": TRANSFORMER}))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_built_for_any_robot(name):
    for spec in (SPEC, replace(SPEC, action_kind="discrete"), make_spec(action_dim=A)):
        with torch.device("meta"):
            model = ComposedVLA(PRESETS[name](spec))
        assert (model.config.head == "discrete") == (spec.action_kind == "discrete")


def test_what_cannot_work_is_named():
    with pytest.raises(ConfigError, match="fusion_type 'sum'"):
        tiny(SPEC, fusion_type="sum")
    with pytest.raises(ConfigError, match="head 'l1'"):
        tiny(SPEC, head="l1")
    with pytest.raises(ConfigError, match="fusion_heads"):
        tiny(SPEC, fusion_type="cross_attention", hidden_dim=18)
    with pytest.raises(ConfigError, match="proprio"):
        tiny(make_spec(), state_dim=0)
    with pytest.raises(ConfigError, match="follows words"):
        tiny(SPEC, goal_dim=0)
