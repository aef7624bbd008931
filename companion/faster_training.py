"""A model rewritten for training: the same numbers from fewer and larger operations.

A step of a small model on a processor is matrix products for the most part. What lies between them
is read and written by one small operation after another, and most of those can go:

    joined      query, key and value are one matrix, gate and up another: 4 products a block, not 7
    norms       a backward pass written by hand: five passes over the vectors in place of a dozen
    attention   in slices that keep their shares (`companion.sliced_attention`), on a processor
    SwiGLU      one gradient buffer for gate and up; the sigmoid is kept, not computed again
    last token  its logits predict nothing, so it is not read at all
    AdamW       torch's fused one: one pass over weights and states in place of ten

Loss and gradients are those of the model it came from; the gradient of a joined matrix holds those
of its parts, one above the other. Optimizers that treat each number alone (AdamW, Lion, SGD) train
it alike. Those that look at a whole matrix (LAMB, Muon) see one where there were three.

Axes: B batch, T positions, H query heads, K key-value heads, D head width, W width, M hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from companion.backward_passes import Normalise, SwiGLU
from companion.checks import require, require_known
from companion.model import Block, KeyValueCache, LanguageModel, RMSNorm, attend
from companion.optimizers import make_optimizer
from companion.sliced_attention import sliced_attention
from companion.surgery import assembled, swapped

JOINED = {  # a joined matrix: its parts in a block, from top to bottom
    "query_key_value": ("attention.query", "attention.key", "attention.value"),
    "gate_up": ("mlp.gate", "mlp.up"),
}
SINGLE = {"out": "attention.out", "down": "mlp.down"}
NORMS = ("attention_norm", "mlp_norm")
PARTS = ("norms", "swiglu", "attention")  # what can be left out


class FasterNorm(nn.Module):
    """`RMSNorm` with its backward pass written by hand."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.epsilon

    def forward(self, x: Tensor) -> Tensor:
        return Normalise.apply(x, self.weight, self.epsilon)


class FasterBlock(nn.Module):
    """A `Block` of four products."""

    def __init__(self, block: Block, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.heads, self.kv_heads = block.attention.heads, block.attention.kv_heads
        for name, inside in JOINED.items():
            setattr(self, name, _stacked([block.get_submodule(part) for part in inside]))
        for name, inside in SINGLE.items():
            setattr(self, name, block.get_submodule(inside))
        for name in NORMS:
            norm = getattr(block, name)
            setattr(self, name, FasterNorm(norm) if "norms" in parts else norm)
        self.by_hand, self.sliced = "swiglu" in parts, "attention" in parts

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, cache: KeyValueCache | None
    ) -> Tensor:
        heads, kv_heads = self.heads, self.kv_heads
        every = self.query_key_value(self.attention_norm(x))
        every = every.unflatten(-1, (heads + 2 * kv_heads, -1))  # (B, T, H + 2 K, D)
        turning, value = every.split((heads + kv_heads, kv_heads), dim=2)
        query, key = _turned(turning, cos, sin).split((heads, kv_heads), dim=2)
        if self.sliced and cache is None and x.is_cpu:
            mixed = sliced_attention(query, key, value)
        else:
            query, key, value = (part.transpose(1, 2) for part in (query, key, value))
            if cache is not None:
                key, value = cache.extend(layer, key, value)
            mixed = attend(query, key, value).transpose(1, 2)
        x = x + self.out(mixed.flatten(-2))
        return x + self.down(self._activated(self.gate_up(self.mlp_norm(x))))

    def _activated(self, gate_up: Tensor) -> Tensor:
        if self.by_hand:
            return SwiGLU.apply(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`companion.model.rotate` for (B, T, heads, D), with the signs in the sine."""
    half = x.shape[-1] // 2
    signed = torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)
    return torch.addcmul(x * cos[:, None], x.roll(half, -1), signed[:, None])


def _stacked(linears: list[nn.Linear]) -> nn.Linear:
    """One layer whose outputs are those of several, one after another."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    outputs, inputs = weight.shape
    with torch.random.fork_rng(devices=[]):  # leave the random numbers as they are
        joined = nn.Linear(inputs, outputs, bias=False)
    joined.weight = nn.Parameter(weight)
    return joined


def faster(model: LanguageModel, parts: tuple[str, ...] = PARTS) -> LanguageModel:
    """A copy rewritten for training; `separated` turns it back.

    Matrices are always joined; `parts` says which of `PARTS` are done besides.
    Raises ValueError for unknown parts, and for blocks that are no longer the plain ones.
    """
    for part in parts:
        require_known("part", part, PARTS)
    linears = [*sum(JOINED.values(), ()), *SINGLE.values()]
    for number, block in enumerate(model.blocks):
        plain = isinstance(block, Block) and all(
            type(block.get_submodule(name)) is nn.Linear for name in linears
        )
        require(plain, f"block {number} is not a plain Block; rewrite the model before others do")

    def where(name: str, module: nn.Module) -> bool:
        return isinstance(module, Block) or (name == "norm" and "norms" in parts)

    def make(name: str, module: nn.Module) -> nn.Module:
        return FasterBlock(module, parts) if isinstance(module, Block) else FasterNorm(module)

    return swapped(model, where, make)


def separated(model: LanguageModel) -> LanguageModel:
    """The plain model with the weights of a `faster` one. Raises ValueError for any other."""
    fast = all(isinstance(block, FasterBlock) for block in model.blocks)
    require(fast, "the model is not one that `faster` made")
    weights = as_parts(model, {name: p.detach().clone() for name, p in model.named_parameters()})
    first = next(model.parameters())
    return assembled(model.config, weights, device=first.device, dtype=first.dtype)


def as_parts(model: LanguageModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients of a `faster` model, by the names of the plain one."""
    config, found = model.config, {}
    keys = config.kv_heads * config.head_width
    rows = {"query_key_value": (config.width, keys, keys), "gate_up": (config.hidden,) * 2}
    for name, tensor in tensors.items():
        place, _, last = name.removesuffix(".weight").rpartition(".")
        if last in JOINED:
            for part, piece in zip(JOINED[last], tensor.split(rows[last]), strict=True):
                found[f"{place}.{part}.weight"] = piece
        elif last in SINGLE:
            found[f"{place}.{SINGLE[last]}.weight"] = tensor
        else:
            found[name] = tensor
    return found


def fused_adamw(model: nn.Module, rate: float = 1e-3, *, decay: float = 0.1) -> Optimizer:
    """`companion.training.adamw` with one kernel for a whole update."""
    return make_optimizer("AdamW", model, rate, decay=decay, variant="fused")


def faster_step(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> Tensor:
    """`companion.training.plain_step` that leaves out what predicts nothing: the last position."""
    logits = model(batch[:, :-1])  # (B, T - 1, V): no slice of the largest tensor is copied
    loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()
