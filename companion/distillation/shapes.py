"""Two students for `tiny`: a quarter and a tenth of its parameters, narrower and less deep.

With a tied head of 1,024 tokens even the smaller spends only a fifth of its weights on the
vocabulary. Everything that is not named here (vocab, context, rotary base) is the teacher's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from companion.checks import require_whole
from companion.model import LanguageModel

QUARTER = {"layers": 5, "heads": 4, "kv_heads": 2, "width": 128, "hidden": 416}  # 1.18 M
TENTH = {"layers": 4, "heads": 3, "kv_heads": 1, "width": 96, "hidden": 240}  # 0.47 M


def new_student(
    teacher: LanguageModel, shape: Mapping[str, int], *, seed: int = 0
) -> LanguageModel:
    """An untrained model of another shape for the teacher's tokens: the same one for each seed.

    Raises ValueError for a shape that cannot be. The global random numbers are left alone.
    """
    require_whole("seed", seed, least=0)
    config = replace(teacher.config, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguageModel(config)
