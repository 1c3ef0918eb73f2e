"""What every attention layer of a model looks at, without touching what the model computes.

Fused attention gives no weights. While a model is watched, each call of it is seen on its way to torch: the call goes
on as it is, so the output is the same to the last bit, and its weights are computed once more beside it.

Shapes: B batch, N heads, L queries, S keys.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from vla_dist.core.errors import ConfigError, NotFound

_SOFTMAX = (torch.softmax, torch.nn.functional.softmax, Tensor.softmax)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionMap:
    """One call of one attention layer."""

    layer: str
    """The module's path within the model, for example ``transformer.blocks.0.attention``."""
    weights: Tensor
    """(B, N, L, S) float32, detached; each row sums to one."""


class InterpretableVLA(nn.Module):
    """Any model of the zoo, and after each call what its attention layers looked at.

    The wrapped model keeps its class, its weights and its speed; it is watched only within ``watch`` and ``forward``,
    and no hook stays behind. Anything else that one asks of the wrapper is asked of the model.
    """

    def __init__(self, base_vla_model: nn.Module) -> None:
        """Raises ConfigError where the model is not a torch module."""
        if not isinstance(base_vla_model, nn.Module):
            raise ConfigError(f"{type(base_vla_model).__name__} is no torch module; wrap the model, not its policy")
        super().__init__()
        self.base = base_vla_model
        self._maps: list[AttentionMap] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives, to the last bit; its maps replace those of the call before."""
        with self.watch():
            return self.base(*args, **kwargs)

    @contextlib.contextmanager
    def watch(self) -> Iterator[list[AttentionMap]]:
        """Collects the maps of whatever the model does within the block: ``loss``, or a policy that acts with it.

        Maps of earlier calls are forgotten at the beginning. Blocks of two wrappers may not overlap in one thread.
        """
        self._maps = []
        path: list[str] = []
        hooks = []
        for name, module in self.base.named_modules():
            hooks.append(module.register_forward_pre_hook(_enter(path, name)))
            hooks.append(module.register_forward_hook(_leave(path), always_call=True))
        try:
            with _Listener(self._maps, path):
                yield self._maps
        finally:
            for hook in hooks:
                hook.remove()

    def get_attention_maps(self) -> dict[str, Tensor]:
        """layer -> (B, N, L, S) float32 of the last call, in the order of computation.

        A layer that was called several times has ``#1``, ``#2``, ... after its name from the second time on.

        Raises:
            NotFound: nothing was called yet, or the model has no attention layer.
        """
        if not self._maps:
            raise NotFound(
                f"no attention was seen in {type(self.base).__name__}; call the model first, and choose one that has "
                "attention layers"
            )
        named: dict[str, Tensor] = {}
        for one in self._maps:
            name, count = one.layer, 0
            while name in named:
                count += 1
                name = f"{one.layer}#{count}"
            named[name] = one.weights
        return named


class _Listener(TorchFunctionMode):
    """Sees every torch function that is called while it is active."""

    def __init__(self, maps: list[AttentionMap], path: list[str]) -> None:
        super().__init__()
        self._maps = maps
        self._path = path
        self._was_fused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is scaled_dot_product_attention:
            with torch.no_grad():
                self._add(_attention_weights(*args, **(kwargs or {})), is_fused=True)
        elif func in _SOFTMAX and output.ndim >= 3 and _last_dim(output, args, kwargs or {}):
            self._add(output.detach(), is_fused=False)
        return output

    def _add(self, weights: Tensor, *, is_fused: bool) -> None:
        weights = weights[:, None] if weights.ndim == 3 else weights
        weights = weights.reshape(-1, *weights.shape[-3:]).float()
        layer = self._path[-1] if self._path else ""
        last = self._maps[-1] if self._maps and self._was_fused and not is_fused else None
        # Some layers, after their fused attention, compute its weights once more for whoever asks: the same map twice.
        is_repeated = last is not None and last.layer == layer and last.weights.shape == weights.shape
        self._was_fused = is_fused
        if not is_repeated:
            self._maps.append(AttentionMap(layer=layer, weights=weights.clone()))


def _attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """(B, N, L, S) weights before dropout.

    Source: the reference of ``torch.nn.functional.scaled_dot_product_attention`` in its documentation.
    """
    del value, dropout_p
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query.float() @ key.float().transpose(-2, -1) * (scale or 1.0 / math.sqrt(query.shape[-1]))
    if is_causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~ones.tril(), -torch.inf)
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if hidden else scores + attn_mask
    return torch.softmax(scores, -1)


def _last_dim(output: Tensor, args: Any, kwargs: dict[str, Any]) -> bool:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return dim is not None and dim % output.ndim == output.ndim - 1


def _enter(path: list[str], name: str) -> Callable[[nn.Module, Any], None]:
    def push(module: nn.Module, inputs: Any) -> None:
        path.append(name)

    return push


def _leave(path: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def pop(module: nn.Module, inputs: Any, output: Any) -> None:
        path.pop()

    return pop
