"""Pruning: fewer weights, as zeros among the others or as really smaller matrices.

`prune(model, sparsity=0.5)` puts zeros where weights matter least: `criteria` say how much each
matters, `patterns` where zeros may lie, `sparsegpt` lets the rest make up for them, `schedules`
prunes in rounds of training. `shrink(model, neurons=0.5)` takes away whole neurons, heads and
layers; `masked_twin` makes the same choice with zeros.
"""

from companion.pruning import heads, layers, neurons
from companion.pruning.activity import neuron_activity
from companion.pruning.config import ThinConfig
from companion.pruning.criteria import at_random, magnitude, taylor, wanda
from companion.pruning.patterns import in_blocks, in_groups, over_matrix, over_rows
from companion.pruning.replacing import (
    global_shares,
    masked,
    prune,
    prune_below,
    sparsity_of,
    total_sparsity,
    weighted,
    zeroed,
)
from companion.pruning.saving import load_pruned, save_pruned
from companion.pruning.schedules import Round, gradual, iterative, one_shot, prune_and_train
from companion.pruning.sparsegpt import sparsegpt
from companion.pruning.structured import block_losses, masked_twin, shrink
from companion.pruning.training import keeping_zeros

__all__ = [
    "Round",
    "ThinConfig",
    "at_random",
    "block_losses",
    "global_shares",
    "gradual",
    "heads",
    "in_blocks",
    "in_groups",
    "iterative",
    "keeping_zeros",
    "layers",
    "load_pruned",
    "magnitude",
    "masked",
    "masked_twin",
    "neuron_activity",
    "neurons",
    "one_shot",
    "over_matrix",
    "over_rows",
    "prune",
    "prune_and_train",
    "prune_below",
    "save_pruned",
    "shrink",
    "sparsegpt",
    "sparsity_of",
    "taylor",
    "total_sparsity",
    "wanda",
    "weighted",
    "zeroed",
]
