"""A Decision Transformer's windows as a policy reads them: whole, or one step more than before.

Shapes: B rows, N layers, P parts of a cached token, L tokens, S new tokens a step, C tokens with those before them, D
width, O outputs of the head, I numbers of a step: previous action, return and proprio, as far as the model reads them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, scaled_dot_product_attention

from vla_dist.models.decision_transformer.decision_transformer import DecisionTransformer
from vla_dist.models.transformer import ACTIVATIONS, Block, attention_bias, causal_visibility, folded_head


class _Affine(NamedTuple):
    weight: Tensor
    bias: Tensor


class _Layer(NamedTuple):
    attention_norm: _Affine
    query: _Affine
    key_value: _Affine | None
    """None: one head, folded; then the normed tokens are keys and values."""
    out: _Affine
    mlp_norm: _Affine
    widen: _Affine
    narrow: _Affine


class WindowReader:
    """Gives the newest action's outputs alone.

    Holds the weights as plain tensors, those of a single head folded, and what embeds a step as one matrix, so that
    reading one step more is little else than its products. The model's weights must not change under it.
    """

    def __init__(self, model: DecisionTransformer) -> None:
        config = model.config
        self._model = model
        self._num_heads = config.n_heads
        self._eps = config.layer_norm_eps
        self._shape = (config.hidden_dim,)
        self._activation = ACTIVATIONS[config.activation]
        self._tells_states = config.goal_fusion != "prefix" and config.goal_dim > 0
        self._num_new = model.tokens_per_step
        prefix = config.num_goal_tokens if config.goal_dim and config.goal_fusion == "prefix" else 0
        self.capacity = prefix + config.context_steps * self._num_new
        """C of a whole window and its goal."""
        with torch.no_grad():
            self._layers = [_layer_of(block, self._num_heads) for block in model.transformer.blocks]  # pyright: ignore
            self._norm = _affine(model.transformer.norm)
            self._head = _affine(model.head)
            self._embed_norm = _affine(model.embed_norm)
            self._table = model.embed_position.weight.detach()
            self._embed = _block_diagonal(model)
            self._scales = _step_scales(model)
            causal = attention_bias(self._table.new_ones(self._num_new, self._num_new).bool().tril(), torch.float32)
            before = causal.new_zeros(self._num_new, self.capacity)
            self._bias = torch.cat([before, causal], 1)[None]

    @property
    def num_parts(self) -> int:
        """P."""
        return 1 if self._layers[0].key_value is None else 2

    def whole(
        self,
        states: Tensor,
        actions: Tensor,
        returns_to_go: Tensor,
        goals: Tensor | None,
        timesteps: Tensor,
        attention_mask: Tensor,
        *,
        image_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Read windows; for the arguments see ``DecisionTransformer.forward``.

        Returns:
            (B, O) of the last step, and (N, P, B, L, D) of the goal's tokens and of the steps up to the last state
            token, which ``extend`` takes.
        """
        steps = (states, actions, returns_to_go, goals, timesteps, attention_mask)
        tokens, is_key, _ = self._model.sequence(*steps, image_features=image_features)
        cache = tokens.new_empty(len(self._layers), self.num_parts, *tokens.shape)
        bias = attention_bias(causal_visibility(is_key), tokens.dtype)[:, 0]
        return self._read(tokens, bias, cache), cache

    def extend(
        self,
        cache: Tensor,
        is_key: Tensor | None,
        *,
        numbers: Tensor,
        positions: Tensor,
        goals: Tensor | None,
        image_features: Tensor | None = None,
    ) -> Tensor:
        """Read one more step of windows whose earlier steps are in the cache: equal to reading them whole.

        Args:
            cache: (N, P, B, C, D); the last S places are free and are written.
            is_key: (B, C) bool, True where there is a token or room for one; None: everywhere.
            numbers: (B, I), raw units, the return scaled; the action is the executed one of the newest step so far.
            positions: (B, S) int64 rows of the position table.
            goals: (B, G), as when the cache was made.
            image_features: (B, D).

        Returns:
            (B, O).
        """
        shift, scale, low, high = self._scales
        numbers = ((numbers - shift) / scale).clamp(low, high)
        tokens = linear(numbers, *self._embed).view(len(numbers), self._num_new, -1) + embedding(positions, self._table)
        if image_features is not None:
            tokens[:, -1] += image_features
        if self._tells_states:
            tokens[:, -1:] = self._model.told(tokens[:, -1:], goals)
        bias = self._bias[:, :, -cache.shape[3] :]
        if is_key is not None:
            bias = bias + attention_bias(is_key, bias.dtype)[:, None]
        return self._read(self._normed(tokens, self._embed_norm), bias, cache)

    def _read(self, tokens: Tensor, bias: Tensor, cache: Tensor) -> Tensor:
        """(B, L, D) new tokens, which are used up, (B or 1, L, C) and (N, P, B, C, D), to (B, O) of the last one."""
        size, last = tokens.shape[1], len(self._layers) - 1
        fresh = cache.narrow(3, cache.shape[3] - size, size).unbind(0)
        for index, (layer, held, new) in enumerate(zip(self._layers, cache.unbind(0), fresh, strict=True)):
            normed = self._normed(tokens, layer.attention_norm)
            asking = normed
            if index == last:
                asking, tokens, bias = normed[:, -1:], tokens[:, -1:], bias[:, -1:]
            query = linear(asking, *layer.query)
            if layer.key_value is None:
                new[0].copy_(normed)
                mixed = self._mixed_by_one(query, held[0], bias)
            else:
                new.copy_(linear(normed, *layer.key_value).unflatten(2, (2, -1)).permute(2, 0, 1, 3))
                mixed = self._mixed_by_many(query, held, bias)
            tokens = tokens.add_(linear(mixed, *layer.out))
            hidden = self._activation(linear(self._normed(tokens, layer.mlp_norm), *layer.widen))
            tokens = tokens.add_(linear(hidden, *layer.narrow))
        return linear(self._normed(tokens[:, 0], self._norm), *self._head)

    def _mixed_by_one(self, query: Tensor, content: Tensor, bias: Tensor) -> Tensor:
        scores = torch.baddbmm(bias, query, content.transpose(1, 2))
        return torch.bmm(torch.softmax(scores, -1), content)

    def _mixed_by_many(self, query: Tensor, held: Tensor, bias: Tensor) -> Tensor:
        query = query.unflatten(2, (self._num_heads, -1)).transpose(1, 2)
        key, value = held.unflatten(3, (self._num_heads, -1)).transpose(2, 3).unbind(0)
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=bias[:, None])
        return mixed.transpose(1, 2).flatten(2)

    def _normed(self, tokens: Tensor, norm: _Affine) -> Tensor:
        return torch.layer_norm(tokens, self._shape, norm.weight, norm.bias, self._eps)


def _layer_of(block: Block, num_heads: int) -> _Layer:
    attention, out = block.attention, _affine(block.attention.out)
    weight, bias = _affine(attention.qkv)
    size = len(bias) // 3
    query, key_value = _Affine(weight[:size], bias[:size]), _Affine(weight[size:], bias[size:])
    if num_heads == 1:
        folded = folded_head(attention.qkv, attention.out)
        query, key_value = _Affine(folded.query, folded.query_bias), None
        out = _Affine(folded.out, folded.out_bias + folded.value_bias)
    return _Layer(
        attention_norm=_affine(block.attention_norm),
        query=query,
        key_value=key_value,
        out=out,
        mlp_norm=_affine(block.mlp_norm),
        widen=_affine(block.widen),
        narrow=_affine(block.narrow),
    )


def _affine(module: Any) -> _Affine:
    return _Affine(module.weight.detach(), module.bias.detach())


def _parts(model: DecisionTransformer) -> Mapping[str, Any]:
    """What embeds a step's numbers, in the order of its tokens: the action before, the return, the state."""
    parts = {"action": model.embed_action, "return": model.embed_return, "state": model.embed_state}
    return {name: part for name, part in parts.items() if part is not None}


def _block_diagonal(model: DecisionTransformer) -> _Affine:
    """(S * D, I) and (S * D,): all tokens of a step by one product."""
    parts = _parts(model).values()
    return _Affine(
        torch.block_diag(*(part.weight.detach() for part in parts)), torch.cat([part.bias.detach() for part in parts])
    )


def _step_scales(model: DecisionTransformer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(I,) shift, scale, and the bounds of what results: proprio is normalised, what stands before it is not."""
    num_before = sum(part.in_features for name, part in _parts(model).items() if name != "state")
    like = model.proprio_mean
    high = torch.cat([like.new_full((num_before,), torch.inf), model.normalised(torch.full_like(like, torch.inf))])
    shift = torch.cat([like.new_zeros(num_before), model.proprio_mean])
    scale = torch.cat([like.new_ones(num_before), model.proprio_std])
    return shift, scale, -high, high
