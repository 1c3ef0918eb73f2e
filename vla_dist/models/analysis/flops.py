"""Floating-point operations of a call, counted twice: by torch below its functions, and by closed form at them.

A multiplication and an addition are two operations. Both counts are of matrix products, convolutions and attention.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


def count_flops(call: Callable[[], Any]) -> int:
    """By torch's FlopCounterMode, which sees what the call and its backward pass are made of."""
    # The counter knows no fused attention of CPUs; as two products it does.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def closed_form_flops(call: Callable[[], Any]) -> int:
    """From the formula of each layer and the shapes that it is called with.

    * linear, (..., I) to (..., O): 2 x ... x I x O
    * convolution to (B, O, ...): 2 x B x O x ... x I / groups x kernel size
    * attention of R queries over C keys of width D in N heads: 4 x B x N x R x C x D
    * product of (..., I, J) and (..., J, O): 2 x ... x I x J x O; einsum: twice the product of all its dimensions
    """
    with _ClosedForm() as mode:
        call()
    return mode.total


class _ClosedForm(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = _FORMULAS.get(func)
        if formula is not None:
            self.total += formula(result, *args, **kwargs)
        return result


def _linear(out: Tensor, tokens: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * out.numel() * tokens.shape[-1]


def _convolution(out: Tensor, image: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * out.numel() * math.prod(weight.shape[1:])


def _attention(out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    pairs = math.prod(query.shape[:-1]) * key.shape[-2]
    return 2 * pairs * (query.shape[-1] + value.shape[-1])


def _product(out: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    return 2 * out.numel() * left.shape[-1]


def _added_product(out: Tensor, bias: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    return 2 * out.numel() * left.shape[-1]


def _einsum(out: Tensor, equation: str, *operands: Any) -> int:
    tensors = operands[0] if isinstance(operands[0], (list, tuple)) else operands
    if len(tensors) < 2:
        return 0
    letters = equation.replace(" ", "").split("->")[0].split(",")
    sizes = {
        letter: size
        for term, one in zip(letters, tensors, strict=True)
        for letter, size in zip(term, one.shape, strict=True)
    }
    return 2 * math.prod(sizes.values())


_FORMULAS: dict[Any, Callable[..., int]] = {
    functional.linear: _linear,
    functional.conv1d: _convolution,
    functional.conv2d: _convolution,
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    functional.scaled_dot_product_attention: _attention,
    torch.matmul: _product,
    torch.bmm: _product,
    torch.mm: _product,
    Tensor.matmul: _product,
    Tensor.bmm: _product,
    Tensor.mm: _product,
    Tensor.__matmul__: _product,
    torch.addmm: _added_product,
    torch.baddbmm: _added_product,
    torch.einsum: _einsum,
}
