from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModel

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.models.decision_transformer.config import VlaDecisionTransformerConfig
from vla_dist.models.decision_transformer.decision_transformer import DecisionTransformer
from vla_dist.models.squashed_gaussian import SquashedGaussian
from vla_dist.testing.windows import make_train_batch

B, T, P, A, G = 3, 6, 5, 2, 8
SHAPES = [
    {},
    {"head": "discrete", "position": "timestep"},
    {"goal_fusion": "add", "use_returns": False, "use_previous_actions": False},
    {"goal_fusion": "film", "use_returns": False},
    {"use_returns": False, "num_goal_tokens": 3},
    {"use_previous_actions": False, "goal_dim": 0},
    {"head": "gaussian"},
    {"head": "bins", "num_bins": 16},
]


def make_model(**changes):
    settings = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "goal_dim": G, "context_steps": T, "dropout": 0.0}
    return DecisionTransformer(P, A, **{**settings, **changes}).eval()


def make_inputs(model, *, batch=B, steps=T, seed=0):
    g = torch.Generator().manual_seed(seed)
    goals = torch.randn(batch, G, generator=g) if model.config.goal_dim else None
    return {
        "states": torch.randn(batch, steps, P, generator=g),
        "actions": torch.randn(batch, steps, A, generator=g),
        "returns_to_go": torch.randn(batch, steps, generator=g),
        "goals": goals,
        "timesteps": torch.arange(steps).repeat(batch, 1),
        "attention_mask": torch.ones(batch, steps, dtype=torch.bool),
    }


def make_batch(model, **kwargs):
    inputs = make_inputs(model, **kwargs)
    inputs["padding_mask"] = inputs.pop("attention_mask")
    targets = torch.rand(len(inputs["states"]), T, A, generator=torch.Generator().manual_seed(7)) * 1.6 - 0.8
    if model.config.head == "discrete":
        targets = torch.eye(A)[targets.argmax(-1)]
    return replace(make_train_batch(model.config, num_windows=len(targets)), target_actions=targets, **inputs)


@pytest.mark.parametrize("changes", SHAPES)
def test_what_comes_later_changes_no_earlier_action(changes):
    model = make_model(**changes)
    inputs = make_inputs(model)
    before = model.outputs(**inputs)
    for t in range(T):
        changed = {k: None if v is None else v.clone() for k, v in inputs.items()}
        changed["actions"][:, t:] += 10
        changed["states"][:, t + 1 :] += 10
        changed["returns_to_go"][:, t + 1 :] += 10
        after = model.outputs(**changed)
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        if t + 1 < T:
            assert not torch.allclose(before[:, t + 1 :], after[:, t + 1 :])


def test_gradient_flows_from_the_past_only_and_never_from_the_own_action():
    model = make_model()
    inputs = make_inputs(model)
    for name in ("states", "actions", "returns_to_go", "goals"):
        inputs[name].requires_grad_()
    t = 3
    model(**inputs)[:, t].sum().backward()
    used = {n: inputs[n].grad.reshape(B, T, -1).abs().sum((0, 2)) > 0 for n in ("states", "actions", "returns_to_go")}
    assert used["states"].tolist() == used["returns_to_go"].tolist() == [i <= t for i in range(T)]
    assert used["actions"].tolist() == [i < t for i in range(T)]
    assert (inputs["goals"].grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("changes", SHAPES)
def test_left_padding_does_not_change_the_result(changes):
    model = make_model(**changes)
    inputs = make_inputs(model, steps=4)
    inputs["timesteps"] += 9
    padded = dict(inputs)
    for name in ("states", "actions", "returns_to_go", "timesteps"):
        garbage = torch.full((B, 2, *inputs[name].shape[2:]), 77, dtype=inputs[name].dtype)
        padded[name] = torch.cat([garbage, inputs[name]], 1)
    padded["attention_mask"] = torch.cat([torch.zeros(B, 2, dtype=torch.bool), inputs["attention_mask"]], 1)
    torch.testing.assert_close(model(**padded)[:, 2:], model(**inputs), atol=1e-5, rtol=0)


def test_rows_do_not_depend_on_each_other_or_on_their_order():
    model = make_model()
    inputs = make_inputs(model, batch=5)
    whole = model(**inputs)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(model(**{k: v[order] for k, v in inputs.items()}), whole[order], atol=1e-6, rtol=0)
    for row in range(5):
        alone = model(**{k: v[row : row + 1] for k, v in inputs.items()})
        torch.testing.assert_close(alone, whole[row : row + 1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("changes", SHAPES)
def test_a_row_of_padding_alone_is_finite_and_gives_finite_gradients(changes):
    model = make_model(**changes).train()
    batch = make_batch(model)
    batch.padding_mask[0] = False
    loss, _ = model.loss(batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_padded_steps_do_not_enter_the_loss():
    model = make_model()
    batch = make_batch(model)
    batch.padding_mask[:, :2] = False
    before, _ = model.loss(batch)
    batch.target_actions[:, :2] = 99.0
    batch.states[:, :2] = 99.0
    after, _ = model.loss(batch)
    torch.testing.assert_close(before, after)


def test_every_parameter_gets_gradient():
    for changes in SHAPES:
        model = make_model(**changes).train()
        model.loss(make_batch(model))[0].backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


@pytest.mark.parametrize("changes", SHAPES[:3] + SHAPES[5:])
def test_overfits_one_batch(changes):
    model = make_model(**changes).train()
    batch = make_batch(model)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(100):
        loss, metrics = model.loss(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    if model.config.head == "gaussian":
        assert metrics["surprise"] < -2
    else:
        assert loss < 0.02 if model.config.head != "bins" else metrics["accuracy"] > 0.95
    assert metrics["accuracy"] == 1 if model.config.head == "discrete" else metrics["action_error"] < 0.1


def test_a_gaussian_draws_around_its_mode_and_reports_its_entropy():
    model = make_model(head="gaussian")
    inputs = make_inputs(model)
    outputs = model.outputs(**inputs)
    noise = torch.randn(2000, *model(**inputs).shape)
    drawn = model.actions_from(outputs.expand(2000, *outputs.shape), noise)
    assert torch.equal(model.actions_from(outputs, torch.zeros_like(noise[0])), model(**inputs))
    torch.testing.assert_close(drawn.median(0).values, model(**inputs), atol=0.06, rtol=0)
    assert drawn.std(0).min() > 0.05
    _, metrics = model.loss(make_batch(model))
    expected = SquashedGaussian.of(outputs).entropy().mean()
    torch.testing.assert_close(metrics["entropy"], expected)


def test_hidden_action_tokens_are_not_looked_at_in_training_only():
    model = make_model(action_dropout=0.999)
    inputs = make_inputs(model)
    changed = {**inputs, "actions": inputs["actions"] + 5}
    assert not torch.allclose(model(**inputs), model(**changed))
    model.train()
    torch.manual_seed(3)
    first = model(**inputs)
    torch.manual_seed(3)
    torch.testing.assert_close(first, model(**changed))


def test_hidden_returns_are_hidden_for_a_whole_window():
    model = make_model(return_dropout=0.5).train()
    inputs = make_inputs(model, batch=64)
    torch.manual_seed(3)
    first = model(**inputs)
    torch.manual_seed(3)
    moved = (first - model(**{**inputs, "returns_to_go": inputs["returns_to_go"] + 5})).abs().amax(-1) > 1e-6
    rows = moved.float().mean(1)
    assert set(rows.unique().tolist()) == {0.0, 1.0}
    assert 0.2 < rows.mean() < 0.8


def test_same_seed_same_weights():
    def weights():
        torch.manual_seed(5)
        return make_model().state_dict()

    first, second = weights(), weights()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_timesteps_beyond_the_table_share_its_last_row():
    model = make_model(position="timestep", max_episode_len=10)
    inputs = make_inputs(model)
    late = model(**{**inputs, "timesteps": inputs["timesteps"] + 500})
    torch.testing.assert_close(late, model(**{**inputs, "timesteps": torch.full((B, T), 9)}))


def test_saved_and_loaded_by_transformers_is_the_same_model(tmp_path):
    model = make_model()
    model.set_normaliser(proprio_mean=torch.arange(P) * 1.0, proprio_std=torch.full((P,), 2.0))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, DecisionTransformer)
    inputs = make_inputs(model)
    assert torch.equal(loaded(**inputs), model(**inputs))


def test_normaliser_centres_scales_and_bounds_the_proprio():
    model, plain = make_model(), make_model()
    plain.load_state_dict(model.state_dict())
    mean, std = torch.linspace(-3, 3, P), torch.linspace(0.5, 4, P)
    model.set_normaliser(proprio_mean=mean, proprio_std=std)
    inputs = make_inputs(model)
    torch.testing.assert_close(model(**{**inputs, "states": inputs["states"] * std + mean}), plain(**inputs))
    far = {**inputs, "states": inputs["states"] + 1e6}
    farther = {**inputs, "states": inputs["states"] + 1e9}
    assert torch.equal(model(**far), model(**farther))


def test_a_dimension_that_never_moves_keeps_its_scale():
    model = make_model()
    model.set_normaliser(proprio_mean=torch.zeros(P), proprio_std=torch.zeros(P))
    assert torch.equal(model.proprio_std, torch.ones(P))


def test_the_constructor_of_dimensions_and_of_a_config_agree():
    model = DecisionTransformer(P, A)
    assert (model.config.hidden_dim, model.config.n_layers, model.config.n_heads) == (128, 6, 8)
    assert model.config.max_episode_len == 1000
    again = DecisionTransformer(model.config)
    assert again.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"head": "softmax"}, "softmax"),
        ({"n_heads": 5}, "5 heads"),
        ({"hidden": 5}, "hidden"),
        ({"action_dropout": 1.0}, "action_dropout"),
        ({"context_steps": 0}, "context_steps"),
        ({"goal_fusion": "gate"}, "gate"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, named):
    with pytest.raises(ConfigError, match=named):
        make_model(**changes)


def test_inputs_that_do_not_fit_the_config_are_named():
    model = make_model()
    inputs = make_inputs(model)
    with pytest.raises(DataError, match="goals are absent"):
        model(**{**inputs, "goals": None})
    with pytest.raises(DataError, match="context_steps"):
        model(**make_inputs(model, steps=T + 1))
    with pytest.raises(DataError, match="cameras"):
        model(**inputs, image_features=torch.zeros(B, T, 32))
    with pytest.raises(DataError, match="proprio_mean"):
        model.set_normaliser(proprio_mean=torch.zeros(P + 1), proprio_std=torch.ones(P))


def test_inputs_of_another_size_are_named():
    model = make_model()
    inputs = make_inputs(model)
    with pytest.raises(DataError, match=r"states of shape .* must end in 5"):
        model(**{**inputs, "states": inputs["states"][..., 1:]})
    with pytest.raises(DataError, match=r"goals of shape \(3, 7\) must be \(3, 8\)"):
        model(**{**inputs, "goals": inputs["goals"][:, 1:]})


def test_cameras_are_seen_and_features_may_come_from_before():
    model = make_model(cameras=["top"], visual={"backbone": "conv_small", "output_dim": 16, "width": 8})
    inputs = make_inputs(model)
    rng = np.random.default_rng(0)
    images = {"top": torch.from_numpy(rng.integers(0, 256, (B, T, 3, 32, 32), dtype=np.uint8))}
    seen = model(**inputs, images=images)
    torch.testing.assert_close(model(**inputs, image_features=model.encode_images(images)), seen)
    assert not torch.allclose(model(**inputs, images={"top": 255 - images["top"]}), seen)
    with pytest.raises(DataError, match="top"):
        model(**inputs, images={"side": images["top"]})


def test_config_survives_json(tmp_path):
    config = make_model(cameras=["top"], visual={"backbone": "conv_small", "output_dim": 16}).config
    config.save_pretrained(tmp_path)
    assert VlaDecisionTransformerConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_residual_branches_and_the_head_start_small():
    """Initialisation of modules without parameters of their own is passed over: it had no effect there."""
    torch.manual_seed(0)
    model = DecisionTransformer(state_dim=4, action_dim=2, hidden_dim=128, n_layers=8, n_heads=2, goal_dim=0)
    for block in model.transformer.blocks:
        assert 0.23 < block.attention.out.weight.std() * 128**0.5 < 0.27
        assert 0.23 < block.narrow.weight.std() * 512**0.5 < 0.27
        assert 0.97 < block.widen.weight.std() * 128**0.5 < 1.03
    assert 0.015 < model.head.weight.std() < 0.025


def test_film_begins_as_the_identity_and_then_scales_what_is_seen():
    model = make_model(goal_fusion="film", use_returns=False)
    inputs = make_inputs(model)
    others = {**inputs, "goals": -inputs["goals"]}
    assert torch.equal(model.outputs(**inputs), model.outputs(**others))
    torch.nn.init.normal_(model.embed_goal.weight)
    assert not torch.allclose(model.outputs(**inputs), model.outputs(**others))
    tokens = torch.ones(B, T, 32)
    scale, shift = (inputs["goals"] @ model.embed_goal.weight.T).chunk(2, -1)
    torch.testing.assert_close(model.told(tokens, inputs["goals"]), (1 + scale + shift)[:, None].expand(B, T, 32))
