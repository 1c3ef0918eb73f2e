"""What a policy costs in memory, arithmetic and time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch

from vla_dist.core.protocols import Policy
from vla_dist.models.analysis.flops import closed_form_flops, count_flops
from vla_dist.models.analysis.subjects import Subject
from vla_dist.models.member import as_module

Clock = Callable[[], float]
"""Seconds, from any origin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Of one member in one size; every act is one with a full memory and batch 1 unless it says otherwise."""

    name: str
    num_parameters: int
    num_trainable: int
    parameters_by_module: Mapping[str, int]
    """Top-level part -> parameters; those that belong to no part are named themselves."""
    weight_bytes: int
    """Parameters and buffers."""
    activation_bytes: int
    """Kept for the backward pass of one training window, parameters left out."""
    state_bytes: int
    """Arrays in the state of one robot."""
    act_flops: int
    """By torch's counter."""
    act_flops_closed_form: int
    training_flops: int
    """Of one window, forward and backward, by torch's counter."""
    training_forward_flops: int
    training_forward_flops_closed_form: int
    latency_ms: Mapping[str, float]
    """``p50``, ``p95``, ``p99`` of one act, and ``num``, how many were timed."""
    acts_per_s: Mapping[int, float]
    """Batch -> rows decided a second."""
    context_steps: int
    horizon: int


def measure_costs(
    subject: Subject,
    *,
    clock: Clock,
    budget_s: float = 10.0,
    num_acts: int = 200,
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32),
) -> Costs:
    """Build the member with random weights on the CPU and measure it.

    Args:
        budget_s: no more time than this, roughly, for the latency and as much again for the throughput; fewer acts
            are timed where they take longer.
        num_acts: timed for the latency; at least 5 whatever the budget.
        batches: sizes for the throughput.
    """
    model = subject.build()
    module = as_module(model)
    policy, state = _remembering(subject, model)
    observation = subject.observation()

    def act() -> None:
        policy.act([observation], [state])

    activation_bytes, training = _training(subject, model)
    module.eval()
    return Costs(
        name=subject.name,
        num_parameters=sum(p.numel() for p in module.parameters()),
        num_trainable=sum(p.numel() for p in module.parameters() if p.requires_grad),
        parameters_by_module=parameters_by_module(module),
        weight_bytes=sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers())),
        activation_bytes=activation_bytes,
        state_bytes=_num_bytes(state),
        act_flops=count_flops(act),
        act_flops_closed_form=closed_form_flops(act),
        latency_ms=_latency(policy, subject, state, clock=clock, budget_s=budget_s, num_acts=num_acts),
        acts_per_s=_throughput(policy, subject, state, clock=clock, budget_s=budget_s, batches=batches),
        context_steps=policy.context_steps,
        horizon=policy.horizon,
        **training,
    )


def parameters_by_module(module: torch.nn.Module) -> dict[str, int]:
    """Largest first; what several parts share counts for the first of them."""
    seen: set[int] = set()
    sizes: dict[str, int] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            part = name.split(".")[0]
            sizes[part] = sizes.get(part, 0) + parameter.numel()
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _remembering(subject: Subject, model: Any) -> tuple[Policy[Any], Any]:
    """A policy, and a state in the middle of an episode whose memory is full."""
    policy = subject.build_policy(model)
    observation, state = subject.observation(), policy.initial_state()
    for _ in range(policy.context_steps):
        _, (state,) = policy.act([observation], [state])
    return policy, state


def _training(subject: Subject, model: Any) -> tuple[int, dict[str, int]]:
    """Bytes kept for the backward pass of one window, and the operations of its passes."""
    module, batch = as_module(model), subject.batch(1)
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    module.train()
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        loss, _ = model.loss(batch)
    flops = {
        "training_forward_flops": count_flops(lambda: model.loss(batch)),
        "training_forward_flops_closed_form": closed_form_flops(lambda: model.loss(batch)),
        "training_flops": count_flops(lambda: model.loss(batch)[0].backward()),
    }
    # Held until here: an address freed early would be counted once for two tensors.
    del loss
    module.zero_grad(set_to_none=True)
    return sum(kept.values()), flops


def _num_bytes(state: Any) -> int:
    if isinstance(state, np.ndarray):
        return state.nbytes
    if is_dataclass(state):
        return sum(_num_bytes(getattr(state, field.name)) for field in fields(state))
    if isinstance(state, Mapping):
        return sum(map(_num_bytes, state.values()))
    return sum(map(_num_bytes, state)) if isinstance(state, (tuple, list)) else 0


def _latency(
    policy: Policy[Any], subject: Subject, state: Any, *, clock: Clock, budget_s: float, num_acts: int
) -> dict[str, float]:
    """The episode goes on while it is timed, so that a policy that thinks hard now and then is seen doing so."""
    observation, taken, began = subject.observation(), [], clock()
    while len(taken) < num_acts and (len(taken) < 5 or clock() - began < budget_s):
        started = clock()
        _, (state,) = policy.act([observation], [state])
        taken.append(clock() - started)
    p50, p95, p99 = np.percentile(np.array(taken) * 1000, [50, 95, 99])
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "num": len(taken)}


def _throughput(
    policy: Policy[Any], subject: Subject, state: Any, *, clock: Clock, budget_s: float, batches: tuple[int, ...]
) -> dict[int, float]:
    found, observation = {}, subject.observation()
    for batch in batches:
        taken, began = [], clock()
        while len(taken) < 3 or (len(taken) < 20 and clock() - began < budget_s / len(batches)):
            started = clock()
            policy.act([observation] * batch, [state] * batch)
            taken.append(clock() - started)
        found[batch] = batch / float(np.median(taken))
    return found
