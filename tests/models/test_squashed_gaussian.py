import math

import pytest
import torch

from vla_dist.models.squashed_gaussian import SquashedGaussian


def gaussian(mean, log_std):
    mean = torch.tensor(mean, dtype=torch.float64)
    return SquashedGaussian(mean=mean, log_std=torch.as_tensor(log_std, dtype=torch.float64).expand_as(mean))


@pytest.mark.parametrize("log_std", [-2.0, -1.0, 0.0])
@pytest.mark.parametrize("mean", [-1.5, 0.0, 0.7])
def test_the_density_integrates_to_one_and_its_entropy_is_the_integral(mean, log_std):
    one = gaussian([mean], log_std)
    # Over the pre-image, where the density is smooth; within the range that log_prob does not clamp.
    inner = torch.linspace(-3.79, 3.79, 20001, dtype=torch.float64)
    actions = inner.tanh()
    log_prob = one.log_prob(actions[:, None])
    assert torch.trapezoid(log_prob.exp(), actions).item() == pytest.approx(1.0, abs=0.02 if mean or log_std else 1e-3)
    if log_std < 0 and abs(mean) < 1:
        integral = -torch.trapezoid(log_prob.exp() * log_prob, actions).item()
        assert one.entropy().item() == pytest.approx(integral, abs=2e-3)


def test_entropy_is_the_mean_surprise_of_samples_also_when_wide():
    one = gaussian([0.3, -0.8], [-0.5, 0.4])
    noise = torch.randn(200_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inner = one.mean + one.log_std.exp() * noise
    slope = 2.0 * (math.log(2.0) - inner - torch.nn.functional.softplus(-2.0 * inner))
    normal = torch.distributions.Normal(one.mean, one.log_std.exp()).log_prob(inner)
    assert one.entropy().item() == pytest.approx(-(normal - slope).sum(-1).mean().item(), abs=0.02)
    torch.testing.assert_close(one.sample(noise), inner.tanh())


def test_outputs_are_bounded_and_saturated_actions_are_finite():
    outputs = torch.tensor([[1e4, -1e4, 1e4, -1e4]], requires_grad=True)
    one = SquashedGaussian.of(outputs)
    assert one.log_std.tolist() == [[2.0, -5.0]]
    assert one.mode().tolist() == [[1.0, -1.0]]
    normal = torch.zeros(1, 4, requires_grad=True)
    surprise = -SquashedGaussian.of(normal).log_prob(torch.tensor([[1.0, -1.0]]))
    surprise.sum().backward()
    assert torch.isfinite(surprise).all()
    assert torch.isfinite(normal.grad).all()
    assert (normal.grad[0, :2] * torch.tensor([-1.0, 1.0]) > 0).all()
