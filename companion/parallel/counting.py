"""Counts the collectives that code asks of torch, ours or torch's own, and the bytes they send.

Every collective of torch.distributed passes torch's dispatcher, also those that DDP and FSDP2 start
from C++. Counting there needs no help from the code that is counted.
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from companion.parallel import traffic

# operator of torch -> (kind, which argument is the whole tensor; the other one is a rank's part)
OPERATORS = {
    "broadcast_": ("broadcast", 0),
    "allreduce_": ("all_reduce", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
}


class Counted(TorchDispatchMode):
    """`with Counted() as counted:` counts this rank's collectives by kind, as in `traffic.KINDS`.

    `counted.calls[kind]` is how many were started, `counted.bytes[kind]` the bytes of their whole
    tensors. Raises NotImplementedError at a collective of another kind, a barrier excepted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def sent_bytes(self, ranks: int) -> float:
        """Bytes one of `ranks` ranks sends in all that was counted: `traffic.sent_bytes` summed.

        This is what the collectives need. gloo sends twice that in a reduce-scatter, which it makes
        of an all-reduce; NCCL does not.
        """
        return sum(traffic.sent_bytes(kind, size, ranks) for kind, size in self.bytes.items())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, operator: str, args: tuple) -> None:
        if operator in ("barrier", "monitored_barrier_"):
            return
        if operator not in OPERATORS:
            raise NotImplementedError(f"{operator} is not counted; known are {list(OPERATORS)}")
        kind, whole = OPERATORS[operator]
        tensors = [leaf for leaf in tree_leaves(args[whole]) if isinstance(leaf, Tensor)]
        self.calls[kind] += 1
        self.bytes[kind] += sum(tensor.nbytes for tensor in tensors)
