"""The textbook form of mixed precision: two sets of weights, one of them low.

The model that computes holds 16-bit copies of its matrices. FP32 *master weights* stand beside
them: they take the gradients, the optimizer updates them, and after each update the copies are
made anew. Micikevicius et al., arXiv:1710.03740, section 3.1. `mixed_precision` casts the master
weights in every product instead; the numbers are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from companion.losses import next_token_loss
from companion.precision.mixed import mixed_precision, unscaled
from companion.precision.scaling import LossScale
from companion.surgery import copied
from companion.training import Step


class Masters:
    """`low`, a model whose linear layers hold weights of `dtype`, and `high`, its FP32 masters.

    Parameters of other layers (embedding, norms) stand in both. The optimizer is made of `high`,
    and `low` is what is trained. Raises ValueError as `mixed_precision` does.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
        self.high, self.low = copied(model), mixed_precision(model, dtype)
        self.pairs: list[tuple[Tensor, Tensor]] = []  # (master, its copy)
        for name, module in self.low.named_modules():
            masters = self.high.get_submodule(name).named_parameters(recurse=False)
            for key, master in masters:
                own = master
                if isinstance(module, nn.Linear):
                    own = nn.Parameter(master.detach().to(dtype))
                    self.pairs.append((master, own))
                setattr(module, key, own)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Add the copies' gradients, widened to FP32, to those of the masters."""
        for master, copy in self.pairs:
            wide = copy.grad.float()
            master.grad = wide if master.grad is None else master.grad + wide
            copy.grad = None

    @torch.no_grad()
    def give_weights(self) -> None:
        """Make the copies anew from the masters."""
        for master, copy in self.pairs:
            copy.copy_(master)


def masters_step(masters: Masters, scale: LossScale | None = None) -> Step:
    """A step for `train(masters.low, ...)` with an optimizer of the masters.

    The same losses and masters as `mixed_step(scale)`, without its watch over the loss: this form
    is here to be compared.
    """

    def step(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> Tensor:
        loss = next_token_loss(model(batch), batch)
        (loss if scale is None else scale.scaled(loss)).backward()
        masters.take_gradients()
        parameters = [p for p in masters.high.parameters() if p.grad is not None]
        finite = unscaled(scale, parameters)
        if finite:
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            masters.give_weights()
        optimizer.zero_grad()
        if scale is not None:
            scale.update(finite)
        return loss.detach()

    return step
