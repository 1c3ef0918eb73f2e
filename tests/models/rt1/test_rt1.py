from dataclasses import replace

import numpy as np
import pytest
import torch

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.specs import CameraSpec
from vla_dist.core.types import Observation
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.film import FiLM
from vla_dist.models.goals import GoalTable
from vla_dist.models.heads import from_bins
from vla_dist.models.language_encoder import BERT_BASE
from vla_dist.models.rt1.presets import PRESETS, tiny
from vla_dist.models.rt1.rt1 import RT1, token_by_token
from vla_dist.models.token_learner import TokenLearner
from vla_dist.models.visuomotor_policy import VisuomotorPolicy
from vla_dist.testing.fakes import make_spec
from vla_dist.testing.windows import make_train_batch

B, K, A, G = 3, 3, 8, 6
SPEC = make_spec(action_dim=A, cameras=(CameraSpec(name="top", height=32, width=32),))
SMALL_BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
SMALL_VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def build(**changes):
    """In eval mode, with FiLM away from the identity."""
    model = RT1(tiny(SPEC, goal_dim=G, **changes)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FiLM):
                module.weight.normal_(std=0.1)
    return model


def build_with_text_encoder():
    config = tiny(
        SPEC,
        goal_dim=0,
        conditioning="fusion",
        language={"model_name": BERT_BASE, "trunk": SMALL_BERT, "output_dim": 16, "freeze": False},
        visual={"backbone": "vit", "image_size": 32, "trunk": SMALL_VIT},
    )
    return RT1(config).eval()


def inputs(model, *, steps=K):
    features = torch.randn(B, steps, *model.feature_shape)
    return torch.randn(B, steps, model.config.state_dim), features, torch.ones(B, steps, dtype=torch.bool)


def test_the_full_size_is_the_papers():
    with torch.device("meta"):
        model = RT1(PRESETS["full"](replace(SPEC, action=SPEC.action[:7])))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(35e6, rel=0.03)
    assert sum(p.numel() for p in model.layers.parameters()) == pytest.approx(19e6, rel=0.01)
    assert sum(p.numel() for p in model.token_learner.parameters()) == pytest.approx(34e3, rel=0.02)
    assert (model.num_tokens, model.num_slots, len(model.visual.films)) == (8, 7, 26)


def test_one_pass_gives_the_actions_of_as_many_passes_as_dimensions():
    for seed in range(5):
        torch.manual_seed(seed)
        model = build()
        states, features, valid = inputs(model)
        valid[0, 0] = False
        together = model.decide(states, features, None, valid)[:, 0]
        assert torch.equal(together, token_by_token(model, states, features, valid))
    assert together.unique().numel() > A


def test_no_action_token_sees_another_one():
    model = build()
    states, features, valid = inputs(model)
    expected = model.slot_logits(states, features, valid)

    def write_values(_, arguments):
        hidden = arguments[0].clone()
        hidden[:, -A + 3] += torch.randn(hidden.shape[-1])
        return hidden, arguments[1]

    handle = model.layers[0].register_forward_pre_hook(write_values)
    written = model.slot_logits(states, features, valid)
    handle.remove()
    same = (written == expected).flatten(3).all(-1).all(0)[0]
    assert same.tolist() == [True] * 3 + [False] + [True] * 4


def test_the_past_does_not_see_the_future():
    model = build()
    states, features, valid = inputs(model)
    features.requires_grad_()
    logits = model.slot_logits(states, features, valid, every_step=True)
    (grad,) = torch.autograd.grad(logits[:, 1].square().sum(), features, retain_graph=True)
    assert grad[:, 0].any()
    assert grad[:, 1].any()
    assert not grad[:, 2].any()
    later = features.detach().clone()
    later[:, 2] += 1
    changed = model.slot_logits(states, later, valid, every_step=True)
    torch.testing.assert_close(changed[:, :2], logits[:, :2])
    assert not torch.allclose(changed[:, 2], logits[:, 2])


def test_acting_computes_what_training_computed():
    model = build()
    states, features, valid = inputs(model)
    newest = model.slot_logits(states, features, valid)
    torch.testing.assert_close(newest, model.slot_logits(states, features, valid, every_step=True)[:, -1:])


def test_padding_on_the_left_changes_nothing():
    model = build()
    states, features, valid = inputs(model)
    valid[:, 0] = False
    padded = model.slot_logits(states, features, valid)
    short = model.slot_logits(states[:, 1:], features[:, 1:], valid[:, 1:])
    torch.testing.assert_close(padded, short)
    assert model.slot_logits(states, features, torch.zeros_like(valid)).isfinite().all()


def fake_embed(texts):
    return np.stack([np.random.default_rng(list(t.encode())).normal(size=G) for t in texts]).astype(np.float32)


def observe(seed, instruction="go"):
    rng = np.random.default_rng(seed)
    frame = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Observation(proprio=rng.normal(size=5).astype(np.float32), instruction=instruction, images={"top": frame})


def test_each_frame_is_encoded_once_and_the_answer_is_that_of_the_whole_window():
    model = build()
    policy = VisuomotorPolicy(model, SPEC, conditioning=ReturnConditioning(), goals=GoalTable(fake_embed))
    encoded = []
    model.visual.register_forward_hook(lambda _, arguments, __: encoded.append(arguments[0].shape[1]))
    state, observations, chunks = policy.initial_state(), [observe(i) for i in range(5)], []
    for observation in observations:
        (chunk,), (state,) = policy.act([observation], [state])
        chunks.append(chunk)
    assert encoded == [1] * 5
    for step, chunk in enumerate(chunks):
        window = observations[max(0, step - K + 1) : step + 1]
        images = torch.from_numpy(np.stack([o.images["top"] for o in window])).permute(0, 3, 1, 2)[None]
        states = torch.from_numpy(np.stack([o.proprio for o in window]))[None]
        with torch.inference_mode():
            whole = model(images, torch.from_numpy(fake_embed(["go"])), states)
        np.testing.assert_allclose(chunk, whole.numpy(), atol=1e-6)
    assert state.num_steps == K


def test_words_change_what_is_seen():
    model = build()
    images, goals = make_train_batch(model.config, num_windows=2).images, torch.randn(2, G)
    seen = model.encode_frames(images, model.understand(goals, 2))
    torch.testing.assert_close(seen, model.encode_frames(images, model.understand(goals.clone(), 2)))
    assert not torch.allclose(seen, model.encode_frames(images, model.understand(goals.flip(0), 2)), atol=1e-3)


def test_the_simple_way_in_takes_texts_and_gives_actions():
    model = RT1("conv_small", hidden_dim=32, visual={"width": 8}, n_layers=1, n_heads=2, head_dim=8).eval()
    images = torch.randint(0, 256, (2, 6, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        actions = model(images, ["open the drawer", "close the drawer"])
        assert actions.shape == (2, 7)
        assert actions.abs().max() < 1
        centres = from_bins(torch.arange(256))
        assert torch.isin(actions, centres).all()
        torch.testing.assert_close(model(images.float() / 255, ["open the drawer", "close the drawer"]), actions)
        assert model(images[:, 0], "open the drawer").shape == (2, 7)


def test_a_transformer_that_sees_and_one_that_reads_are_fused():
    model = build_with_text_encoder()
    batch = make_train_batch(model.config, num_windows=2)
    loss, _ = model.loss(batch)
    loss.backward()
    assert model.language.trunk.embeddings.word_embeddings.weight.grad.any()
    assert model.visual.backbone.embeddings.patch_embeddings.projection.weight.grad.any()
    with torch.inference_mode():
        one = model(batch.images["top"], "open the drawer", batch.states)
        assert torch.equal(one, model(batch.images["top"], ["open the drawer"] * 2, batch.states))
        with pytest.raises(DataError, match="give texts"):
            model(batch.images["top"], torch.zeros(2, 384), batch.states)


def test_the_tokenizer_travels_with_the_checkpoint(tmp_path):
    model = build_with_text_encoder()
    model.save_pretrained(tmp_path)
    loaded = RT1.from_pretrained(tmp_path)
    loaded.language.config.model_name = "gone"
    batch = make_train_batch(model.config, num_windows=2)
    assert torch.equal(loaded.loss(batch)[0], model.loss(batch)[0])


def test_learned_tokens_are_weighted_means_over_the_image():
    learner, tokens = TokenLearner(16, 4), torch.randn(2, 9, 16)
    weights = learner.weights(tokens)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4))
    torch.testing.assert_close(learner(tokens.flip(1)), learner(tokens))
    assert learner(tokens).shape == (2, 4, 16)


def test_what_cannot_work_is_named():
    with pytest.raises(ConfigError, match="camera"):
        tiny(make_spec())
    with pytest.raises(ConfigError, match="horizon"):
        tiny(SPEC, horizon=2)
    with pytest.raises(ConfigError, match="head 'mse'"):
        tiny(SPEC, head="mse")
    with pytest.raises(ConfigError, match="one of them"):
        tiny(SPEC, language={"model_name": BERT_BASE})
    model = build()
    with pytest.raises(DataError, match="at most 3 steps"):
        model(torch.zeros(1, 4, 3, 32, 32), torch.zeros(1, G), torch.zeros(1, 4, 5))
    with pytest.raises(DataError, match="goals of shape"):
        model(torch.zeros(1, 3, 32, 32), torch.zeros(1, G + 1), torch.zeros(1, 5))
    with pytest.raises(DataError, match="cannot lead"):
        model(torch.zeros(3, 3, 32, 32), torch.zeros(2, G), torch.zeros(3, 5))
    with pytest.raises(DataError, match="states"):
        model(torch.zeros(1, 3, 32, 32), torch.zeros(1, G))
