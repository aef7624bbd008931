"""Which operation works in which format: the table that mixed precision is.

Products of matrices are nearly all of a model's arithmetic, and each of their numbers is rounded
once: they work in the low format. Sums, exponentials, norms and losses are little arithmetic, and
their errors add up or their results leave a 16-bit range: they work in FP32. All other operations
take what they are given, and where formats meet, the wider one wins, as torch does it anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from companion.surgery import copied

PRODUCTS = frozenset(
    {
        *(F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention),
        *(torch.matmul, torch.mm, torch.bmm, torch.mv, torch.addmm, torch.baddbmm, torch.einsum),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.addmm),
    }
)
WIDE = frozenset(
    {
        *(F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, Tensor.softmax),
        *(F.rms_norm, F.layer_norm, F.group_norm, torch.norm, Tensor.norm),
        *(F.cross_entropy, F.nll_loss, F.mse_loss, F.kl_div, F.l1_loss),
        *(torch.sum, Tensor.sum, torch.mean, Tensor.mean, torch.cumsum, Tensor.cumsum),
        *(torch.exp, Tensor.exp, torch.log, Tensor.log, torch.pow, Tensor.pow, torch.logsumexp),
    }
)
ELIGIBLE = (torch.float32, torch.bfloat16, torch.float16)  # FP64 was asked for: it stays


def converted(tree: object, convert: Callable[[Tensor], Tensor]) -> object:
    """Arguments or results with `convert` applied to every tensor of 32 or 16 bits in them."""

    def one(leaf: object) -> object:
        eligible = isinstance(leaf, Tensor) and leaf.dtype in ELIGIBLE
        return convert(leaf) if eligible else leaf

    return tree_map(one, tree)


class Policy(TorchFunctionMode):
    """Inside `with Policy(dtype):` products are computed in `dtype` and `WIDE` in FP32.

    What torch.autocast does, one level higher: casts are made again for each product, where
    autocast keeps the cast of a weight for the length of its block. A weight that two products
    share gets the sum of two gradients in FP32 here, and in `dtype` there.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        inputs = args, kwargs or {}
        if func in PRODUCTS:
            return self.product(func, inputs)
        if func in WIDE:
            return self.wide(func, inputs)
        return self.other(func, inputs)

    def product(self, func: Callable, inputs: tuple) -> object:
        args, kwargs = converted(inputs, lambda tensor: tensor.to(self.dtype))
        return func(*args, **kwargs)

    def wide(self, func: Callable, inputs: tuple) -> object:
        args, kwargs = converted(inputs, Tensor.float)
        return func(*args, **kwargs)

    def other(self, func: Callable, inputs: tuple) -> object:
        args, kwargs = inputs
        return func(*args, **kwargs)


def within(model: nn.Module, policy: Policy) -> nn.Module:
    """A copy of `model`, with the same names and FP32 parameters, that runs inside `policy`."""
    model = copied(model)
    model.policy = policy
    model.forward = MethodType(_forward, model)  # bound, so that copies of the copy work too
    return model


def _forward(model: nn.Module, *args, **kwargs):
    with model.policy:
        return type(model).forward(model, *args, **kwargs)
