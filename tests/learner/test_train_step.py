import math
from dataclasses import replace

import pytest
import torch
import torch._dynamo.utils

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.learner.algorithms.algorithm import Algorithm, NoSettings
from vla_dist.learner.train_step import LossModule, OptimiserConfig, TrainStep
from vla_dist.testing.windows import make_train_batch


@pytest.fixture
def batch(make_model):
    return make_train_batch(make_model().config, num_windows=8)


def make_step(model, **settings):
    return TrainStep(model, OptimiserConfig(**{"total_updates": 100, **settings}))


def test_warm_up_then_cosine_to_the_final_fraction():
    config = OptimiserConfig(total_updates=110, warmup_updates=10, learning_rate=2.0, final_fraction=0.1)
    assert [config.learning_rate_at(u) for u in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert config.learning_rate_at(60) == pytest.approx(1.1)
    assert config.learning_rate_at(110) == config.learning_rate_at(500) == pytest.approx(0.2)


def test_the_loss_falls(make_model, batch):
    step = make_step(make_model())
    losses = [float(step(batch, update)["loss"]) for update in range(60)]
    assert losses[-1] < 0.3 * losses[0]


def test_the_gradient_is_clipped(make_model, batch):
    model = make_model(dropout=0.0, action_dropout=0.0, return_dropout=0.0)
    norm = float(make_step(model, gradient_clip=1e-3)(batch, 0)["gradient_norm"])
    clipped = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert norm > 1e-2
    assert clipped == pytest.approx(1e-3, rel=1e-3)


def test_only_matrices_decay(make_model, batch):
    model = make_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step = make_step(model, weight_decay=0.5, learning_rate=0.1)
    for parameter in model.parameters():
        parameter.register_hook(torch.zeros_like)
    step(batch, 0)
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.ndim >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_parts_learn_at_a_pace_of_their_own(make_model, batch):
    def moved(*rates):
        model = make_model(n_layers=2)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        make_step(model, part_learning_rates=rates, weight_decay=0.0)(batch, 0)
        return {n: float((p.detach() - before[n]).abs().max()) for n, p in model.named_parameters()}

    even = moved()
    uneven = moved("embed_state=0", "transformer=0.1", "transformer.blocks.1=0.5")
    for name, distance in even.items():
        inner = 0.5 if name.startswith("transformer.blocks.1.") else 0.1
        factor = 0.0 if name.startswith("embed_state.") else inner if name.startswith("transformer.") else 1.0
        assert uneven[name] == pytest.approx(factor * distance, rel=0.01, abs=1e-8), name


def test_a_rate_for_a_part_that_is_not_there_is_refused(make_model):
    for wrong, said in (("transformr=1", "did you mean 'transformer'"), ("embed=1", "nothing is trained")):
        with pytest.raises(ConfigError, match=said):
            make_step(make_model(), part_learning_rates=(wrong,))


def test_the_average_follows_the_weights_and_is_what_gets_published(make_model, batch):
    model = make_model()
    first = {n: p.detach().clone() for n, p in model.named_parameters()}
    step = make_step(model, ema_decay=0.9)
    step(batch, 0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(step.published_weights()[name], 0.9 * first[name] + 0.1 * parameter.detach())


def test_without_an_average_the_weights_are_published(make_model, batch):
    model = make_model()
    step = make_step(model)
    step(batch, 0)
    assert all(torch.equal(step.published_weights()[n], p) for n, p in model.named_parameters())


def test_a_loss_that_is_not_finite_changes_nothing(make_model, batch):
    model = make_model()
    step = make_step(model)
    step(batch, 0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    batch.target_actions[0, 0, 0] = math.nan
    with pytest.raises(DataError, match="update 1 is not finite"):
        step(batch, 1)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_the_windows_that_spoilt_an_update_are_named(make_model, batch):
    step = make_step(make_model(dropout=0.0))
    named = replace(batch, items=tuple(range(900, 908)))
    named.target_actions[2, -1, 0] = math.inf
    named.target_actions[5, -1, 0] = math.nan
    with pytest.raises(DataError, match=r"for window 2 replay item 902 task 'task-2'; window 5 replay item 905 task"):
        step(named, 0)


def test_windows_of_a_gradient_that_overflows_are_named_by_their_loss(make_model, batch):
    model = make_model(dropout=0.0)
    step = make_step(model)
    model.head.bias.register_hook(lambda gradient: gradient * math.inf)
    batch.target_actions[3, -1] = 30.0
    with pytest.raises(DataError, match=r"each window of this rank is finite, the highest are window 3 task"):
        step(batch, 0)


def test_half_precision_keeps_weights_and_loss_whole_and_learns_the_same(make_model, batch):
    losses = {}
    for precision in ("float32", "bfloat16"):
        model = make_model(dropout=0.0, action_dropout=0.0, return_dropout=0.0)
        step = make_step(model, precision=precision, learning_rate=3e-3)
        losses[precision] = [float(step(batch, update)["loss"]) for update in range(30)]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        algorithm = Algorithm(NoSettings(), model=model.config, conditioning="none")
        loss, _ = LossModule(model, algorithm, precision=precision)(batch)
        assert loss.dtype == torch.float32
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"][-1] == pytest.approx(losses["float32"][-1], rel=0.1)
    assert losses["bfloat16"][-1] < 0.5 * losses["bfloat16"][0]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_is_the_same_step(make_model, batch):
    weights = {}
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        model = make_model(dropout=0.0, action_dropout=0.0, return_dropout=0.0)
        step = make_step(model, compile=compiled)
        for update in range(3):
            step(batch, update)
        weights[compiled] = step.weights()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert weights[True].keys() == weights[False].keys()
    for name, value in weights[False].items():
        if not name.endswith("qkv.bias"):  # softmax cancels the bias of keys: Adam steps by rounding noise
            torch.testing.assert_close(weights[True][name], value, rtol=1e-3, atol=1e-4)


def test_tensors_of_another_model_are_refused(make_model, batch):
    step = make_step(make_model())
    step(batch, 0)
    with pytest.raises(DataError, match="fits no parameter"):
        make_step(make_model(hidden_dim=16)).load_tensors(step.tensors())


@pytest.mark.parametrize(
    "settings",
    [
        {"total_updates": 0},
        {"warmup_updates": 100},
        {"learning_rate": 0.0},
        {"ema_decay": 1.0},
        {"final_fraction": 2.0},
        {"num_micro_batches": 0},
        {"precision": "float16"},
        {"part_learning_rates": ("visual",)},
        {"part_learning_rates": ("visual=-1",)},
        {"part_learning_rates": ("=1",)},
    ],
)
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError):
        OptimiserConfig(**{"total_updates": 100, **settings})
