"""Training: look at a batch, measure the loss, take one step against its gradient, repeat.

A *step* is a function `(model, optimizer, batch) -> loss`. Gradient accumulation, loss scaling and
distillation are other steps for the same loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from companion.checks import require, require_number, require_whole
from companion.losses import next_token_loss
from companion.storage import distinct_tensors, load_tensors, save_tensors


class Batched(Protocol):
    """Anything with `batches[step] -> tokens (B, T)`, such as `companion.data.Batches`."""

    def __getitem__(self, step: int) -> Tensor: ...


Step = Callable[[nn.Module, Optimizer, Tensor], Tensor]
Schedule = Callable[[int], float]


def plain_step(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> Tensor:
    """One update on one batch (B, T), gradients shortened to length 1; the loss in nats."""
    loss = next_token_loss(model(batch), batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def cosine(steps: int, *, warmup: int = 0, floor: float = 0.1) -> Schedule:
    """Factor of the learning rate at a step: a straight rise, then half a cosine down to `floor`.

    SGDR's cosine without restarts, arXiv:1608.03983.
    """
    require_whole("steps", steps)
    require_whole("warmup", warmup, least=0)
    require(warmup < steps, f"warmup {warmup} must be shorter than the {steps} steps")
    require(0 <= floor <= 1, f"floor is {floor}; it must lie between 0 and 1")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / (steps - warmup))
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2

    return factor


def restarts(cycles: Sequence[int], *, warmup: int = 0, floor: float = 0.1) -> Schedule:
    """One `cosine` after another, each as long as its cycle: SGDR, arXiv:1608.03983.

    A training that has ended can so be lengthened by one more cycle.
    """
    require(len(cycles) > 0, "cycles is empty; give the steps of at least one cycle")
    parts = [cosine(steps, warmup=warmup, floor=floor) for steps in cycles]

    def factor(step: int) -> float:
        for steps, part in zip(cycles, parts, strict=True):
            if step < steps:
                return part(step)
            step -= steps
        return floor

    return factor


def constant(step: int) -> float:
    """The schedule that leaves the learning rate as it is."""
    return 1.0


def adamw(model: nn.Module, rate: float = 1e-3, *, decay: float = 0.1) -> Optimizer:
    """AdamW (arXiv:1711.05101) that decays matrices only, not norms' vectors."""
    require_number("rate", rate, above=0)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=(0.9, 0.95))


def train(
    model: nn.Module,
    batches: Batched | Sequence[Tensor],
    *,
    steps: int,
    optimizer: Optimizer | None = None,
    schedule: Schedule = constant,
    step: Step = plain_step,
    start: int = 0,
    after: Callable[[int, float], object] | None = None,
    progress: bool = True,
) -> list[float]:
    """Train in place for steps `start` to `steps - 1`; the loss of each, in nats per token.

    `after(step, loss)` is called after each update. Raises ValueError for steps below 1 and
    FloatingPointError when a loss is not finite, before it can be mistaken for a result.
    """
    require_whole("steps", steps)
    require_whole("start", start, least=0)
    optimizer = adamw(model) if optimizer is None else optimizer
    device = next(model.parameters()).device
    rates = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
    losses = []
    model.train()
    with tqdm(range(start, steps), disable=not progress, unit="step", leave=False) as bar:
        for index in bar:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(index)
            loss = step(model, optimizer, batches[index].to(device)).item()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {index}; try a lower rate")
            losses.append(loss)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if after is not None:
                after(index, loss)
    model.eval()
    return losses


@dataclass(frozen=True)
class Checkpoint:
    """How far a training came: the next step, and whatever else was kept beside it."""

    step: int
    about: dict


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    step: int,
    about: dict | None = None,
) -> Path:
    """Write weights and optimizer state as one safetensors file; `step` is the next to take."""
    tensors = {f"model/{name}": tensor for name, tensor in distinct_tensors(model).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in state.items()}
    return save_tensors(path, tensors, {"step": step, "about": about or {}})


def load_checkpoint(path: str | Path, model: nn.Module, optimizer: Optimizer) -> Checkpoint:
    """Put weights and optimizer state back in place. The shapes must be those that were saved."""
    tensors, header = load_tensors(path)
    weights = {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}
    expected = distinct_tensors(model)
    require(weights.keys() == expected.keys(), f"{path} was saved from a model of another shape")
    for name, value in weights.items():
        found, wanted = tuple(value.shape), tuple(expected[name].shape)
        require(found == wanted, f"{name} in {path} has shape {found}, the model {wanted}")
    for name, value in weights.items():
        expected[name].copy_(value)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/")
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return Checkpoint(header["step"], header["about"])
