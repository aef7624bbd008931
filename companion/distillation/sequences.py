"""Distillation by text: the teacher writes, and the student learns from what was written.

Sequence-level distillation trains a student with the ordinary loss on text that the teacher wrote:
it needs no logits, so any teacher that can be asked for text will do. Kim & Rush, arXiv:1606.07947,
take the teacher's best text (beam search); here it is drawn, which shows more of its distribution.

On-policy distillation turns that round: the student writes, and the teacher scores every token. The
student so learns about the mistakes that it makes itself. Agarwal et al. (GKD), arXiv:2306.13649.

Axes: N texts, B batch, T positions, P tokens of a prompt.
"""

from __future__ import annotations

import random
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from companion.checks import require, require_number, require_whole
from companion.decoding import generate
from companion.distillation.checking import require_finite_weights
from companion.distillation.divergences import Divergence, reverse_kl
from companion.distillation.steps import descend, evaluating, scores
from companion.model import LanguageModel
from companion.training import Step


class Shuffled:
    """Windows (N, T) in batches, each once a round: `batches[step]` is (batch, T), round by round.

    Every round has an order of its own, which depends on (seed, round) alone. Windows that fill no
    whole batch wait for a later round.
    """

    def __init__(self, windows: Tensor, *, batch: int = 2, seed: int = 0) -> None:
        require_whole("batch", batch)
        require_whole("seed", seed, least=0)
        require(windows.ndim == 2, f"windows have shape {tuple(windows.shape)}, not (N, T)")
        count = len(windows)
        require(count >= batch, f"{count} windows are fewer than one batch of {batch}")
        self.windows, self.batch, self.seed = windows, batch, seed

    def __getitem__(self, step: int) -> Tensor:
        require_whole("step", step, least=0)
        turn, place = divmod(step, len(self.windows) // self.batch)
        order = list(range(len(self.windows)))
        random.Random(f"{self.seed}/{turn}").shuffle(order)
        return self.windows[order[place * self.batch : (place + 1) * self.batch]]


def teacher_text(
    teacher: LanguageModel,
    prompts: Tensor,
    new: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    batch: int = 16,
) -> Tensor:
    """What the teacher writes behind each prompt (N, P): ids (N, P + new), the prompts included.

    The same seed gives the same text. Temperature 0 takes the best token each time. Raises
    ValueError for no prompts, text beyond the context, and weights that are not finite.
    """
    require_whole("batch", batch)
    require_finite_weights("teacher", teacher)
    require(
        prompts.ndim == 2 and len(prompts) > 0, f"prompts are {tuple(prompts.shape)}, not (N, P)"
    )
    require_whole("seed", seed, least=0)
    write = partial(generate, teacher, new=new, temperature=temperature, top_k=top_k)
    chance = random.Random(seed)
    with evaluating(teacher):
        parts = [write(part, seed=chance.getrandbits(32)) for part in prompts.split(batch)]
    return torch.cat(parts)


def on_policy_step(
    teacher: nn.Module,
    *,
    prompt: int = 16,
    new: int = 48,
    temperature: float = 1.0,
    divergence: Divergence = reverse_kl,
    seed: int = 0,
) -> Step:
    """A training step on what the student writes: the teacher's view of it is the aim.

    A batch (B, T) is cut into pieces of `prompt + new` tokens; the student keeps the first `prompt`
    of each, writes the others anew (drawn at temperature 1), and learns where it has written.
    Nothing flows back through the drawing. Use a new one for each training. Raises ValueError for
    options that cannot be and, at a step, for batches shorter than one piece.
    """
    require_whole("prompt", prompt)
    require_whole("new", new)
    require_whole("seed", seed, least=0)
    require_number("temperature", temperature, above=0)
    require_finite_weights("teacher", teacher)
    chance = random.Random(seed)

    def step(model: LanguageModel, optimizer: Optimizer, batch: Tensor) -> Tensor:
        prompts = pieces(batch, prompt + new)[:, :prompt]
        with evaluating(model):
            tokens = generate(model, prompts, new, temperature=1.0, seed=chance.getrandbits(32))
        written = slice(prompt - 1, -1)  # positions that predict a token that was written
        soft, logits = scores(teacher, tokens), model(tokens)
        far = divergence(logits[:, written], soft[:, written], temperature)
        return descend(model, optimizer, temperature**2 * far.mean())

    return step


def pieces(batch: Tensor, length: int) -> Tensor:
    """Windows (B, T) cut into pieces (B x (T // length), length); a remainder is left out."""
    count = batch.shape[1] // length
    require(count >= 1, f"batches of {batch.shape[1]} tokens have no piece of {length}")
    return batch[:, : count * length].reshape(-1, length)
