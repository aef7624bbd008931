"""Parameter sharing: several places of a model use the same parameters.

`share(model, layers=2)` lets two blocks do the work of all; `tied`, `kv_heads` and `inner` share
head and embedding, keys and values, and the rows of a matrix. `lora` leaves a model as it is and
adds a few parameters of its own to every matrix, `merged` adds them in. `ties` says what is shared,
`unshared` and `spread_heads` undo it, `costs` works out what it saves.
"""

from companion.sharing import costs
from companion.sharing.heads import grouped_query, spread_heads
from companion.sharing.layers import cycle, distinct_layers, repeat, shared_layers
from companion.sharing.lora import LoRA, learned, lora, merged
from companion.sharing.low_rank import LowRank, factored, saving_width, truncated
from companion.sharing.saving import load_shared, save_shared
from companion.sharing.technique import share
from companion.sharing.ties import average, first, tie, tied, ties, unshared

__all__ = [
    "LoRA",
    "LowRank",
    "average",
    "costs",
    "cycle",
    "distinct_layers",
    "factored",
    "first",
    "grouped_query",
    "learned",
    "load_shared",
    "lora",
    "merged",
    "repeat",
    "save_shared",
    "saving_width",
    "share",
    "shared_layers",
    "spread_heads",
    "tie",
    "tied",
    "ties",
    "truncated",
    "unshared",
]
