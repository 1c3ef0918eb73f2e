import math

import numpy as np
import pytest
import torch

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.models.heads import HEADS, BinsHead, build_head, from_bins, to_bins

B, H, A, D = 6, 4, 3, 16


def targets_for(name, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if name == "discrete":
        return torch.eye(A)[torch.randint(A, (B, H), generator=generator)]
    return torch.rand(B, H, A, generator=generator) * 1.8 - 0.9


def actions_of(name, decoded):
    return torch.eye(A)[decoded.argmax(-1)] if name == "discrete" else decoded


@pytest.mark.parametrize("name", HEADS)
def test_learns_a_batch_by_heart_in_every_parameter(name):
    head, features, targets = build_head(name, D, H, A), torch.randn(B, D), targets_for(name)
    mask = torch.ones(B, H, dtype=torch.bool)
    optimiser = torch.optim.Adam(head.parameters(), lr=0.005 if name in ("flow", "gaussian") else 0.02)
    for step in range(600 if name in ("flow", "gaussian") else 300):
        optimiser.zero_grad()
        loss, metrics = head.loss(features, targets, mask)
        loss.backward()
        if step == 0:
            assert all(p.grad.any() for p in head.parameters())
            assert not any(value.requires_grad or value.ndim for value in metrics.values())
        optimiser.step()
    decoded = head.decode(features)
    assert decoded.shape == (B, H, A)
    assert torch.equal(head.decode(features), decoded)
    tolerance = {"flow": 0.1, "bins": 1 / 256, "discrete": 1e-6}.get(name, 0.02)
    # The Gaussian may explain a few actions by a wide spread for ever; the others it learns.
    assert (actions_of(name, decoded) - targets).abs().median() < tolerance


@pytest.mark.parametrize("name", HEADS)
def test_steps_behind_the_mask_do_not_count_and_weights_do(name):
    head, features, targets = build_head(name, D, H, A), torch.randn(B, D), targets_for(name)
    every = torch.ones(B, H, dtype=torch.bool)
    mask = (torch.arange(H) < 2).expand(B, H)

    def loss_of(targets, mask, weights=None):
        torch.manual_seed(3)
        return head.loss(features, targets, mask, weights)[0]

    other = torch.cat([targets[:, :2], targets_for(name, seed=1)[:, 2:]], 1)
    torch.testing.assert_close(loss_of(other, mask), loss_of(targets, mask))
    assert not torch.allclose(loss_of(other, every), loss_of(targets, every))
    torch.testing.assert_close(loss_of(targets, mask, torch.full((B,), 0.5)), 0.5 * loss_of(targets, mask))
    assert torch.equal(loss_of(targets, ~every), torch.tensor(0.0))


@pytest.mark.parametrize("name", HEADS)
def test_a_row_is_decoded_as_if_it_were_alone(name):
    head, features = build_head(name, D, H, A), torch.randn(B, D)
    torch.testing.assert_close(head.decode(features[2:3]), head.decode(features)[2:3])


@pytest.mark.parametrize("name", ["gaussian", "bins", "flow"])
def test_a_generator_draws_and_a_seed_repeats_the_draw(name):
    head, features = build_head(name, D, H, A), torch.randn(B, D)
    first, again, other = (head.decode(features, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.abs().max() <= 1


def test_bins_are_drawn_as_often_as_they_are_likely():
    head = BinsHead(1, 1, 1, num_bins=3)
    with torch.no_grad():
        head.project.weight.zero_()
        head.project.bias.copy_(torch.tensor([0.7, 0.2, 0.1]).log())
    drawn = head.decode(torch.ones(4000, 1), np.random.default_rng(0)).flatten()
    shares = [(drawn - centre).abs().lt(1e-6).float().mean().item() for centre in (-2 / 3, 0, 2 / 3)]
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.03)


def test_bins_are_half_a_bin_wrong_at_most_and_refuse_what_is_no_number():
    actions = torch.linspace(-1, 1, 10001)
    assert (from_bins(to_bins(actions)) - actions).abs().max() <= 1 / 256 + 1e-6
    assert to_bins(torch.tensor([-1.0, 1.0, -5.0, 5.0])).tolist() == [0, 255, 0, 255]
    assert torch.equal(to_bins(from_bins(torch.arange(256))), torch.arange(256))
    for bad in (math.nan, math.inf):
        with pytest.raises(DataError, match="finite"):
            to_bins(torch.tensor([0.0, bad]))


def test_flow_finds_both_ways_where_the_mean_would_find_none():
    torch.manual_seed(0)
    head = build_head("flow", 2, 1, 1)
    features, targets = torch.ones(256, 2), torch.where(torch.arange(256) % 2 == 0, 0.8, -0.8).view(-1, 1, 1)
    optimiser = torch.optim.Adam(head.parameters(), lr=3e-3)
    for _ in range(400):
        optimiser.zero_grad()
        head.loss(features, targets, torch.ones(256, 1, dtype=torch.bool))[0].backward()
        optimiser.step()
    drawn = head.decode(features, np.random.default_rng(0)).flatten()
    assert ((drawn.abs() - 0.8).abs() < 0.25).float().mean() > 0.85
    assert 0.35 < (drawn > 0).float().mean() < 0.65


def test_an_unknown_head_is_named():
    with pytest.raises(ConfigError, match="did you mean 'gaussian'"):
        build_head("gausian", D, H, A)
    with pytest.raises(ConfigError, match="positive"):
        build_head("mse", D, 0, A)
    with pytest.raises(ConfigError, match="num_bins"):
        BinsHead(D, H, A, num_bins=1)
