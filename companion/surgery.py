"""Surgery: copy a model and put other modules in place of chosen ones. The patient survives.

A tensor that two modules share (a tied head) is one tensor in the copy too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from companion.checks import require
from companion.model import LanguageModel, ModelConfig, rotary_angles

Where = Callable[[str, nn.Module], bool]


def copied(model: nn.Module, *, sharing: Iterable[str] = ()) -> nn.Module:
    """A copy that shares nothing with `model`; what `model` shares within itself stays shared.

    The modules named in `sharing` are not copied but stand in both: for a copy in which they are
    about to be replaced, so that their weights need not be held twice.
    """
    kept = [model.get_submodule(name) for name in sharing]
    return copy.deepcopy(model, {id(module): module for module in kept})


def linears(name: str, module: nn.Module) -> bool:
    """Choose the linear layers inside the blocks: all matrices but the embedding and the head."""
    return isinstance(module, nn.Linear) and name.startswith("blocks.")


def chosen(model: nn.Module, where: Where) -> dict[str, nn.Module]:
    """The modules, by name, for which `where(name, module)` is true."""
    return {name: module for name, module in model.named_modules() if where(name, module)}


def swapped(
    model: nn.Module, where: Where, make: Callable[[str, nn.Module], nn.Module]
) -> nn.Module:
    """A copy with `make(name, module)` in place of every chosen module.

    Raises ValueError if nothing is chosen, and if one chosen module lies inside another.
    """
    model = copied(model)
    targets = chosen(model, where)
    require(len(targets) > 0, "no module is chosen; print the model to see the names there are")
    for name, module in targets.items():
        inside = [other for other in targets if other.startswith(f"{name}.") or name == ""]
        require(not inside or inside == [name], f"{inside[:1]} lies inside {name!r}; choose one")
        model.set_submodule(name, make(name, module))
    return model


def assembled(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """A model of given weights, converted to `dtype`; no memory is spent on initial ones.

    A tied head need not be named. Raises ValueError for names or shapes that do not fit.
    """
    model = outline(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tied:
        del expected["head.weight"]
    found = {name: tensor.shape for name, tensor in weights.items()}
    wrong = sorted(
        name
        for name, shape in expected.items() | found.items()
        if expected.get(name) != shape or found.get(name) != shape
    )
    require(not wrong, f"the weights do not fit the shape of the model: {wrong[:3]}")
    model.load_state_dict(weights, assign=True, strict=False)
    if config.tied:
        model.head.weight = model.embedding.weight
    model.cos, model.sin = rotary_angles(config)
    return model.to(device=device, dtype=dtype).eval()


def outline(config: ModelConfig) -> LanguageModel:
    """A model of shapes alone: its tensors are on the device "meta", which holds no numbers."""
    with torch.device("meta"), _NoInitialWeights():
        return LanguageModel(config)


class _NoInitialWeights(TorchFunctionMode):
    """Skip `torch.nn.init`, which imports torch's compiler (seconds) for tensors without memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        return func(*args, **kwargs)
