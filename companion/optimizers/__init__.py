"""Optimizers: nine rules for turning a gradient into a step, and what each must remember.

    rule        a weight moves by the rate times                    numbers kept a weight
    SGD         its gradient                                        0
    momentum    a running sum of its gradients                      1
    Adagrad     gradient / root of the sum of all squares           1
    RMSProp     gradient / root of the mean square                  1
    Adam        mean gradient / root of the mean square             2
    AdamW       the same, and shrinks by a share of itself          2
    LAMB        AdamW's step, as long as the tensor is long         2
    Lion        the sign of a mean gradient                         1
    Muon        the mean gradient, its directions made equal        1 in the blocks, else 2

torch has the first six. LAMB and Lion are written from their papers; torch's Muon works in a type
that this course cannot use.
"""

from companion.optimizers.lamb import Lamb
from companion.optimizers.lion import Lion
from companion.optimizers.making import OPTIMIZERS, VARIANTS, make_optimizer, variants_of
from companion.optimizers.muon import Muon, orthogonalized
from companion.optimizers.racing import race_updates
from companion.optimizers.states import counted_state_bytes, state_bytes
from companion.optimizers.tuning import Tuned, tuned_rate

__all__ = [
    "OPTIMIZERS",
    "VARIANTS",
    "Lamb",
    "Lion",
    "Muon",
    "Tuned",
    "counted_state_bytes",
    "make_optimizer",
    "orthogonalized",
    "race_updates",
    "state_bytes",
    "tuned_rate",
    "variants_of",
]
