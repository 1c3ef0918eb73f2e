"""The Decision Transformer beside that of the transformers library: the same layers, widths, heads and dropout."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from models_parts.timing import compare
from transformers import DecisionTransformerConfig, DecisionTransformerModel

from vla_dist.core.types import Observation
from vla_dist.models.analysis.flops import count_flops
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.decision_transformer.decision_transformer import DecisionTransformer
from vla_dist.models.decision_transformer.policy import DecisionTransformerPolicy
from vla_dist.models.decision_transformer.presets import PRESETS
from vla_dist.testing.fakes import make_spec

K, P, A = 20, 17, 6
SPEC = make_spec(proprio_dim=P, action_dim=A, max_episode_steps=1000)
PEER = "transformers"
LATER = 20
"""Steps of an episode after its window is full."""


def build_pair(name: str, *, dropout: float, window: str = "slide") -> tuple[DecisionTransformer, Any]:
    """Ours of a preset, and theirs of the same shape. Without language, which theirs has not."""
    changes = {"goal_dim": 0, "dropout": dropout, "position": "timestep", "window": window}
    own = DecisionTransformer(PRESETS[name](SPEC, **changes))
    config = own.config
    theirs = DecisionTransformerModel(
        DecisionTransformerConfig(
            state_dim=P,
            act_dim=A,
            hidden_size=config.hidden_dim,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_inner=config.inner_dim,
            max_ep_len=config.max_episode_len,
            activation_function=config.activation,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    return own, theirs


def make_windows(batch: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Whole windows of noise."""
    windows = {
        "states": torch.randn(batch, K, P),
        "actions": torch.rand(batch, K, A) * 2 - 1,
        "returns_to_go": torch.randn(batch, K, 1),
        "timesteps": torch.arange(K).repeat(batch, 1),
        "attention_mask": torch.ones(batch, K, dtype=torch.long),
    }
    return {name: value.to(device) for name, value in windows.items()}


def measure_training(rounds: int) -> dict[str, Any]:
    found = {}
    cases = (("gym", 0.1, 64, False), ("gym", 0.0, 64, False), ("online", 0.1, 16, False), ("online", 0.1, 16, True))
    for name, dropout, batch, half in cases:
        own, theirs = build_pair(name, dropout=dropout)
        windows, target = make_windows(batch), torch.rand(batch, K, A) * 2 - 1

        def update(
            model: torch.nn.Module,
            optimiser: torch.optim.Optimizer,
            predict: Any,
            target: Any = target,
            half: bool = half,
        ) -> None:
            optimiser.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = (predict(model) - target).square().mean()
            loss.backward()
            optimiser.step()

        pair = []
        for model, predict in (
            (own, lambda m, w=windows: m(**w, goals=None)),
            (theirs, lambda m, w=windows: m(**w).action_preds),
        ):
            optimiser = torch.optim.AdamW(model.train().parameters(), 1e-4, fused=True)
            pair.append(lambda m=model, o=optimiser, p=predict, u=update: u(m, o, p))
        # Where matrix products take nearly all of the time, no ratio of times goes far beyond that of the work.
        ours, peer = (count_flops(call) for call in pair)
        row = compare(*pair, rounds=rounds, peer=PEER)
        label = f"{name}, dropout {dropout}, batch {batch}{', both in bfloat16' if half else ''}"
        found[label] = {**row, "flops_ratio": peer / ours}
    return found


def measure_acting(rounds: int) -> dict[str, Any]:
    found = {}
    for batch in (1, 16, 64):
        own, theirs = build_pair("gym", dropout=0.0)
        policy = DecisionTransformerPolicy(own, SPEC, conditioning=ReturnConditioning(), goals=None)
        peer = _peer_act(theirs, batch)
        observations = _observations(batch)
        states = [policy.initial_state()] * batch
        for _ in range(K - 1):
            _, states = policy.act(observations, states)
        whole = [replace(state, cache=None) for state in states]
        for label, before in (("added to the cache", states), ("whole window anew", whole)):
            ours = lambda o=observations, s=before, p=policy: p.act(o, s)  # noqa: E731
            found[f"batch {batch}, step {K}, {label}"] = compare(ours, peer, rounds=rounds, peer=PEER)
        own, _ = build_pair("gym", dropout=0.0, window="hop")
        hopping = DecisionTransformerPolicy(own, SPEC, conditioning=ReturnConditioning(), goals=None)
        found[f"batch {batch}, steps {K + 1} to {K + LATER}, window hops"] = compare(
            _later_steps(hopping, observations),
            lambda p=peer: [p() for _ in range(LATER)],
            rounds=max(3, rounds // 3),
            peer=PEER,
        )
    return found


def _later_steps(policy: DecisionTransformerPolicy, observations: list[Observation]) -> Any:
    before = [policy.initial_state()] * len(observations)
    for _ in range(K):
        _, before = policy.act(observations, before)

    def act() -> None:
        states = before
        for _ in range(LATER):
            _, states = policy.act(observations, states)

    return act


def _peer_act(model: DecisionTransformerModel, batch: int) -> Any:
    model.eval()
    windows = make_windows(batch)

    @torch.inference_mode()
    def act() -> Any:
        return model(**windows).action_preds[:, -1].numpy()

    return act


def _observations(batch: int) -> list[Observation]:
    rng = np.random.default_rng(0)
    return [Observation(proprio=rng.normal(size=P).astype(np.float32)) for _ in range(batch)]
