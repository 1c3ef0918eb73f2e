"""What every member promises the learner."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModel

from vla_dist.core.errors import DataError
from vla_dist.models.member import own_settings


def loss_of(model, batch, *, seed=1, autocast=False):
    """Heads that draw noise draw the same each time."""
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        return model.loss(batch)


def test_it_is_what_its_config_says(case):
    config = case.config
    assert config.action_dim == case.spec.action_dim
    assert config.state_dim in (0, case.spec.proprio_dim)
    assert (config.head == "discrete") == (case.spec.action_kind == "discrete")
    assert set(config.cameras or ()) <= {camera.name for camera in case.spec.cameras}
    assert config.context_steps >= 1
    assert config.horizon >= 1
    assert {"tiny", "small"} <= set(case.architecture.presets)


def test_transformers_knows_it_by_its_settings(case):
    config = AutoConfig.for_model(case.config.model_type, **own_settings(case.config))
    assert type(config) is case.architecture.config
    assert own_settings(config) == own_settings(case.config)
    with torch.device("meta"):
        assert type(AutoModel.from_config(config)) is case.architecture.model


def test_the_loss_is_finite_and_reaches_every_parameter(case):
    model = case.build().train()
    loss, metrics = loss_of(model, case.batch(num_windows=16))
    assert loss.shape == ()
    assert torch.isfinite(loss)
    for name, value in metrics.items():
        assert value.shape == (), name
        assert torch.isfinite(value), name
        assert not value.requires_grad, name
    loss.backward()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    untouched = [name for name, p in learning.items() if p.grad is None or not p.grad.any()]
    assert untouched == []
    assert [name for name, p in learning.items() if not torch.isfinite(p.grad).all()] == []


def test_one_batch_can_be_learnt_by_heart(case):
    model = case.build().train()
    batch = case.batch(num_windows=4)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
    first = float(loss_of(model, batch)[0].detach())
    goal = first - 0.6 * abs(first)
    recent = []
    for _ in range(400):
        optimiser.zero_grad()
        loss, _ = model.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        recent = [*recent[-4:], float(loss.detach())]
        if len(recent) == 5 and sum(recent) / 5 < goal:
            return
    pytest.fail(f"the loss of one batch fell from {first:.3f} to {recent} only, not to {goal:.3f}")


def test_what_stands_in_padded_steps_does_not_matter(case):
    model, batch = case.build(), case.batch()
    pad, after = ~batch.padding_mask, ~batch.chunk_mask

    def spoiled(tensor, mask):
        return torch.where(mask[..., None], torch.full_like(tensor, 7.0), tensor)

    junk = replace(
        batch,
        states=spoiled(batch.states, pad),
        actions=spoiled(batch.actions, pad),
        target_actions=spoiled(batch.target_actions, pad),
        target_chunks=spoiled(batch.target_chunks, after),
        returns_to_go=torch.where(pad, 7.0, batch.returns_to_go),
        images={
            name: torch.where(pad[..., None, None, None], 255 - frames, frames) for name, frames in batch.images.items()
        },
    )
    torch.testing.assert_close(loss_of(model, junk)[0], loss_of(model, batch)[0], rtol=1e-4, atol=1e-5)


def test_a_step_learns_from_the_past_and_never_from_its_own_action_or_the_future(case):
    model, batch, steps = case.build(), case.batch(num_windows=3), case.config.context_steps
    asked = steps // 2
    if steps == 1:
        pytest.skip("sees one step")
    if case.architecture.name == "hierarchical":
        pytest.skip("its controller is told where the episode went: that is its subgoal")
    whole = replace(batch, padding_mask=torch.ones_like(batch.padding_mask))
    inputs = {
        "states": whole.states,
        "actions": whole.actions,
        "returns_to_go": whole.returns_to_go,
        **{name: frames / 255 for name, frames in whole.images.items()},
    }
    inputs = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    only = torch.zeros(whole.padding_mask.shape)
    only[:, asked] = 1.0
    loss, _ = loss_of(
        model,
        replace(
            whole,
            states=inputs["states"],
            actions=inputs["actions"],
            returns_to_go=inputs["returns_to_go"],
            images={name: inputs[name] for name in whole.images},
            step_weights=only,
        ),
    )
    if not loss.requires_grad or not loss.detach().any():
        pytest.skip("learns from the newest step alone, after which there is nothing")
    loss.backward()
    grads = {name: value.grad for name, value in inputs.items() if value.grad is not None}
    reached = {name: grad.reshape(3, steps, -1).abs().sum((0, 2)) for name, grad in grads.items()}
    assert any(grad[: asked + 1].any() for grad in reached.values())
    for name, grad in reached.items():
        assert not grad[asked + (name != "actions") :].any(), name


def test_a_row_of_padding_alone_is_finite_and_teaches_nothing(case):
    model, batch = case.build(), case.batch()
    empty = torch.tensor([True, False, False, False])[:, None]
    padded = replace(batch, padding_mask=batch.padding_mask & ~empty, chunk_mask=batch.chunk_mask & ~empty)
    loss, _ = loss_of(model, padded)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()] == []
    if torch.equal(loss_of(model, padded, seed=2)[0], loss):
        torch.testing.assert_close(loss_of(model, padded.rows(1, 4))[0], loss, rtol=1e-4, atol=1e-5)


def test_a_window_without_weight_teaches_nothing(case):
    model, batch = case.build(), case.batch()
    even = loss_of(model, replace(batch, weights=torch.ones(4)))[0]
    torch.testing.assert_close(even, loss_of(model, batch)[0], rtol=1e-4, atol=1e-5)
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
    row = torch.tensor([False, True, False, False])[:, None, None]
    other = replace(
        batch,
        weights=weights,
        target_actions=torch.where(row, batch.target_actions.flip(-1), batch.target_actions),
        target_chunks=torch.where(row, batch.target_chunks.flip(-1), batch.target_chunks),
    )
    left_out = loss_of(model, replace(batch, weights=weights))[0]
    torch.testing.assert_close(loss_of(model, other)[0], left_out, rtol=1e-4, atol=1e-5)


def test_a_batch_in_parts_weighs_as_much_as_in_one(case):
    model, batch = case.build(), case.batch(num_windows=6)
    if not torch.equal(loss_of(model, batch, seed=1)[0], loss_of(model, batch, seed=2)[0]):
        pytest.skip("its loss draws noise for each window")
    parts = [batch.rows(0, 1), batch.rows(1, 6)]
    counts = [model.loss_count(part) for part in parts]
    assert sum(counts) == model.loss_count(batch)
    mean = sum(count * loss_of(model, part)[0] for count, part in zip(counts, parts, strict=True)) / sum(counts)
    torch.testing.assert_close(mean, loss_of(model, batch)[0], rtol=1e-4, atol=1e-5)


def test_equal_seeds_give_equal_models_and_losses(case):
    first, second = case.build(seed=3), case.build(seed=3)
    mine, theirs = first.state_dict(), second.state_dict()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    batch = case.batch()
    assert torch.equal(loss_of(first, batch)[0], loss_of(second, batch)[0])


def test_bfloat16_is_close(case):
    model, batch = case.build(), case.batch(num_windows=8)
    full, half = (loss_of(model, batch, autocast=flag)[0].item() for flag in (False, True))
    assert half == pytest.approx(full, rel=0.05, abs=0.05)


def test_the_normaliser_fits_or_is_refused(case):
    model, config = case.build(), case.config
    scales = {"proprio_mean": torch.full((config.state_dim,), 3.0), "proprio_std": torch.full((config.state_dim,), 2.0)}
    if config.goal_dim:
        scales |= {"goal_mean": torch.zeros(config.goal_dim), "goal_std": torch.ones(config.goal_dim)}
    before = loss_of(model, case.batch())[0].item()
    model.set_normaliser(**scales)
    if config.state_dim:
        assert loss_of(model, case.batch())[0].item() != before
    for name, value in scales.items():
        with pytest.raises(DataError, match=name):
            model.set_normaliser(**{**scales, name: torch.zeros(len(value) + 1)})
        if len(value):
            with pytest.raises(DataError, match=name):
                model.set_normaliser(**{**scales, name: torch.full_like(value, torch.nan)})


def wrong_batches(batch, config):
    yield "actions", replace(batch, actions=batch.actions[..., 1:])
    yield "target_actions", replace(batch, target_actions=batch.target_actions[..., 1:])
    yield "target_chunks", replace(batch, target_chunks=torch.cat([batch.target_chunks] * 2, 1))
    if config.state_dim:
        yield "states", replace(batch, states=batch.states[..., 1:])
    if config.goal_dim:
        yield "goals", replace(batch, goals=None)
        yield "goals", replace(batch, goals=batch.goals[:, 1:])
    for camera in config.cameras or ():
        yield camera, replace(batch, images={})
        yield camera, replace(batch, images={camera: batch.images[camera][:, :, :1]})


def test_a_batch_for_another_model_is_refused(case):
    model = case.build()
    for named, wrong in wrong_batches(case.batch(), case.config):
        with pytest.raises(DataError, match=named):
            model.loss(wrong)
