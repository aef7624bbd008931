"""Is our training as fast as a peer's? `python -m companion.bench.training [--profile]`

`tiny` is trained on: by `transformers`' LlamaForCausalLM with the same weights (SDPA attention,
torch's fused AdamW), by our plain step, and by what `companion.faster_training` and then
`companion.fastest_training` add to it, one thing after another. The batches are those of its
recipe, the thread is one, and all take turns. Before that, all take the same steps and must have
the same losses. Nothing is written. Needs requirements-test.txt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import profile

from companion.bench.decoding import as_transformers
from companion.faster_training import PARTS, faster, faster_step, fused_adamw
from companion.fastest_training import fastest
from companion.hardware import machine_card
from companion.model import LanguageModel
from companion.pretrained import tiny
from companion.surgery import copied
from companion.timing import Race, race
from companion.training import Step, adamw, plain_step

BATCH, CONTEXT = 6, 512  # what `tiny` was trained with
CHECKED, NEAR, RATE = 5, 1e-4, 1e-4  # steps, nats by which losses may differ, learning rate
ROUNDS, GOAL = 10, 1.2
OURS, THEIRS = "all of them", "transformers"


@dataclass(frozen=True)
class Trained:
    """A model in training: `take(batch)` is one update, and gives the loss in nats."""

    model: nn.Module
    optimizer: Optimizer
    step: Step = faster_step

    def take(self, batch: Tensor) -> float:
        return self.step(self.model, self.optimizer, batch).item()


def peer_step(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> Tensor:
    """`plain_step` for a `transformers` model, which works its loss out itself."""
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def candidates(model: LanguageModel) -> dict[str, Trained]:
    """The peer, then our steps, each with one thing more than the one before."""
    peer, plain, fused, last = as_transformers(model), *(copied(model) for _ in range(3))
    found = {
        THEIRS: Trained(peer, fused_adamw(peer, RATE), peer_step),
        "plain": Trained(plain, adamw(plain, RATE), plain_step),
        "fused AdamW": Trained(fused, fused_adamw(fused, RATE), plain_step),
        "no last position": Trained(last, fused_adamw(last, RATE)),
    }
    tops = {"joined matrices": faster(model, ())}
    tops |= {f"and {part}": faster(model, PARTS[: at + 1]) for at, part in enumerate(PARTS)}
    tops[OURS] = fastest(model)
    found |= {name: Trained(one, fused_adamw(one, RATE)) for name, one in tops.items()}
    for one in found.values():
        one.model.train()
    return found


def checked(trained: dict[str, Trained], batches: Sequence[Tensor]) -> float:
    """Let all take the same steps: the largest difference from the peer's loss, in nats.

    Raises AssertionError where it is above `NEAR`.
    """
    losses = {name: [one.take(batch) for batch in batches] for name, one in trained.items()}
    pairs = [zip(losses[THEIRS], ours, strict=True) for ours in losses.values()]
    apart = max(abs(theirs - ours) for pair in pairs for theirs, ours in pair)
    assert apart <= NEAR, f"losses differ by {apart:.1e} nats: {losses}"
    return apart


def some_batches(model: LanguageModel, count: int, batch: int, context: int) -> list[Tensor]:
    """Random ids, (batch, context) each: speed does not depend on them."""
    random = torch.Generator().manual_seed(0)
    shape = (batch, context)
    return [torch.randint(model.config.vocab, shape, generator=random) for _ in range(count)]


def compare_with_transformers(
    model: LanguageModel, *, batch: int = BATCH, context: int = CONTEXT, rounds: int = ROUNDS
) -> tuple[Race, float]:
    """Check and race all `candidates`; also by how many nats their losses differ at most."""
    trained = candidates(model)
    *first, last = some_batches(model, CHECKED + 1, batch, context)
    apart = checked(trained, first)

    def call(one: Trained) -> Callable[[], float]:
        return lambda: one.take(last)

    calls = {name: call(one) for name, one in trained.items()}
    return race(rounds=rounds, **calls), apart


def profiled(one: Trained, batch: Tensor, rows: int = 15) -> str:
    """Where the time of two steps goes: torch's table of operations."""
    one.take(batch)
    with profile() as seen:
        for _ in range(2):
            one.take(batch)
    return seen.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=40
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print tokens a second and ratios; 1 if ours is surely below the goal."""
    parser = argparse.ArgumentParser(description="Time training steps of `tiny`.")
    parser.add_argument("--batch", type=int, default=BATCH, help="windows a step")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens a window")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    model, shape = tiny(), {"batch": given.batch, "context": given.context}
    result, apart = compare_with_transformers(model, rounds=given.rounds, **shape)
    for name in result.seconds:
        speed = result.interval(name).map(lambda s: given.batch * given.context / s)
        print(f"{name:<18}{speed} tokens/s; {result.ratio(THEIRS, name)} x {THEIRS}")
    print(f"losses of {CHECKED} steps differ by at most {apart:.1e} nats\n{result}")
    if given.profile:
        found, batch = candidates(model), some_batches(model, 1, **shape)[0]
        for name in (THEIRS, OURS):
            print(f"\n{name}\n{profiled(found[name], batch)}")
    print(machine_card())
    ratio = result.ratio(THEIRS, OURS)
    return int(ratio.known and ratio.high < GOAL)


if __name__ == "__main__":
    sys.exit(main())
