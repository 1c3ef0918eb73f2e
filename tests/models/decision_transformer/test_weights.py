"""Weights of others that fit, and the names and shapes by which published ones are found again."""

import pytest
import torch
import transformers

from vla_dist.models.decision_transformer.decision_transformer import DecisionTransformer

B, T, P, A, G = 3, 6, 5, 2, 8


def make_model(**changes):
    settings = {"hidden_dim": 32, "n_heads": 4, "goal_dim": G, "context_steps": T, "dropout": 0.0}
    return DecisionTransformer(P, A, **{**settings, **changes}).eval()


@pytest.mark.parametrize(("heads", "activation"), [(1, "relu"), (4, "gelu")])
def test_equals_the_transformers_implementation_on_copied_weights(heads, activation):
    hub = transformers.DecisionTransformerModel(
        transformers.DecisionTransformerConfig(
            state_dim=P,
            act_dim=A,
            hidden_size=32,
            n_layer=2,
            n_head=heads,
            max_ep_len=50,
            n_positions=64,
            activation_function=activation,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    torch.nn.init.normal_(hub.encoder.wpe.weight)  # zero would hide a missing position vector
    own = make_model(
        n_layers=2,
        goal_dim=0,
        position="timestep",
        max_episode_len=50,
        activation=activation,
        context_steps=20,
        n_heads=heads,
    )
    own.load_state_dict({**own.state_dict(), **_from_hub(hub.state_dict())})
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "states": torch.randn(B, T, P, generator=generator),
        "actions": torch.randn(B, T, A, generator=generator),
        "returns_to_go": torch.randn(B, T, generator=generator),
        "goals": None,
        "timesteps": torch.arange(T).repeat(B, 1),
        "attention_mask": torch.ones(B, T, dtype=torch.bool),
    }
    inputs["attention_mask"][0, :2] = False
    theirs = hub(
        states=inputs["states"],
        actions=inputs["actions"],
        returns_to_go=inputs["returns_to_go"][..., None],
        timesteps=inputs["timesteps"],
        attention_mask=inputs["attention_mask"].long(),
    ).action_preds
    valid = inputs["attention_mask"]
    assert (own(**inputs) - theirs)[valid].abs().max() < 1e-5
    inputs["timesteps"] += 30  # beyond the window, within the table
    moved = hub(
        **{k: v for k, v in inputs.items() if k != "goals"} | {"returns_to_go": inputs["returns_to_go"][..., None]}
    )
    assert (own(**inputs) - moved.action_preds)[valid].abs().max() < 1e-5


def _from_hub(theirs):
    """Conv1D keeps (in, out) where Linear keeps (out, in); wpe[0] is added to every token after the embedding norm."""
    ours = {
        "embed_norm.weight": theirs["embed_ln.weight"],
        "embed_norm.bias": theirs["embed_ln.bias"] + theirs["encoder.wpe.weight"][0],
        "embed_position.weight": theirs["embed_timestep.weight"],
        "transformer.norm.weight": theirs["encoder.ln_f.weight"],
        "transformer.norm.bias": theirs["encoder.ln_f.bias"],
    }
    names = {"embed_state": "embed_state", "embed_action": "embed_action", "embed_return": "embed_return"}
    names["predict_action.0"] = "head"
    for source, target in names.items():
        ours |= {f"{target}.{end}": theirs[f"{source}.{end}"] for end in ("weight", "bias")}
    layers = {
        "attn.c_attn": "attention.qkv",
        "attn.c_proj": "attention.out",
        "mlp.c_fc": "widen",
        "mlp.c_proj": "narrow",
    }
    for layer in range(2):
        old, new = f"encoder.h.{layer}", f"transformer.blocks.{layer}"
        for source, target in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
            ours |= {f"{new}.{target}.{end}": theirs[f"{old}.{source}.{end}"] for end in ("weight", "bias")}
        for source, target in layers.items():
            ours[f"{new}.{target}.weight"] = theirs[f"{old}.{source}.weight"].T
            ours[f"{new}.{target}.bias"] = theirs[f"{old}.{source}.bias"]
    return ours


def test_tensors_keep_the_names_and_shapes_that_published_policies_have():
    shapes = {name: tuple(value.shape) for name, value in make_model(n_layers=1).state_dict().items()}
    block = "transformer.blocks.0"
    assert shapes == {
        "proprio_mean": (P,),
        "proprio_std": (P,),
        "goal_mean": (G,),
        "goal_std": (G,),
        "embed_state.weight": (32, P),
        "embed_state.bias": (32,),
        "embed_return.weight": (32, 1),
        "embed_return.bias": (32,),
        "embed_action.weight": (32, A),
        "embed_action.bias": (32,),
        "embed_position.weight": (T, 32),
        "embed_goal.weight": (32, G),
        "embed_goal.bias": (32,),
        "embed_norm.weight": (32,),
        "embed_norm.bias": (32,),
        f"{block}.attention_norm.weight": (32,),
        f"{block}.attention_norm.bias": (32,),
        f"{block}.attention.qkv.weight": (96, 32),
        f"{block}.attention.qkv.bias": (96,),
        f"{block}.attention.out.weight": (32, 32),
        f"{block}.attention.out.bias": (32,),
        f"{block}.mlp_norm.weight": (32,),
        f"{block}.mlp_norm.bias": (32,),
        f"{block}.widen.weight": (128, 32),
        f"{block}.widen.bias": (128,),
        f"{block}.narrow.weight": (32, 128),
        f"{block}.narrow.bias": (32,),
        "transformer.norm.weight": (32,),
        "transformer.norm.bias": (32,),
        "head.weight": (A, 32),
        "head.bias": (A,),
    }
