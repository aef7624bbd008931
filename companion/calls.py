"""How many operations of torch a token takes: each costs microseconds, whatever it computes.

A token of a small model waits for them as much as for its bytes.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from companion.decoding import cache_for


class TorchCalls(TorchDispatchMode):
    """`with torch.no_grad(), TorchCalls() as calls:` counts operations, views of tensors too.

    Without `no_grad`, in inference mode, an operation that is made of others would count as one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.count += 1
        return operation(*arguments, **(options or {}))


@torch.no_grad()
def token_calls(model: nn.Module, past: int = 16) -> int:
    """Operations in which a model writes one token after `past` others that its cache holds."""
    cache, token = cache_for(model, capacity=past + 2), torch.zeros(1, 1, dtype=torch.long)
    for tokens in (token.expand(1, past), token):  # the second is a warm-up
        model(tokens, cache)
    cache.rewind(past)
    with TorchCalls() as calls:
        model(token, cache)
    return calls.count
