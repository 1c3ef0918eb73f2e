"""torch.compile changes how a loss is computed, not what it is."""

import pytest
import torch

from vla_dist.testing.zoo import zoo_cases

MEMBERS = [case for case in zoo_cases() if case.name.endswith("-default")]


@pytest.mark.slow
@pytest.mark.parametrize("member", MEMBERS, ids=lambda case: case.architecture.name)
def test_a_compiled_loss_and_its_gradient_are_close(member):
    model, batch = member.build(), member.batch(num_windows=6)
    found = []
    for loss_of in (model.loss, torch.compile(model.loss, backend="aot_eager")):
        model.zero_grad()
        loss, _ = loss_of(batch)
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (plain, gradients), (compiled, others) = found
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-3, atol=1e-5)
