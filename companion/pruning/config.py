"""The shape of a model that lost attention heads: its heads no longer fill the width.

A full model's heads share out the width, so a head has width / heads numbers. Taking heads away
leaves the others as wide as they were, and the width, which all blocks share, as it was.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from companion.checks import require_whole
from companion.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ThinConfig(ModelConfig):
    """A shape whose heads have a width of their own. Raises ValueError if no such model exists."""

    head_size: int  # numbers a head: what `head_width` says

    def __post_init__(self) -> None:
        for name in ("heads", "head_size", "width"):
            require_whole(name, getattr(self, name))
        ModelConfig(**_shape(self) | {"width": self.heads * self.head_size})  # all other rules

    @property
    def head_width(self) -> int:
        return self.head_size


def with_groups(config: ModelConfig, kv_heads: int) -> ModelConfig:
    """The shape with so many key-value heads, each with as many query heads as before."""
    heads = kv_heads * (config.heads // config.kv_heads)
    shape = _shape(config) | {"heads": heads, "kv_heads": kv_heads}
    if heads * config.head_width == config.width:
        return ModelConfig(**shape)
    return ThinConfig(**shape, head_size=config.head_width)


def full_shape(config: ModelConfig) -> ModelConfig:
    """A shape that differs in its heads alone, which fill the width: one head as wide as it."""
    return ModelConfig(**_shape(config) | {"heads": 1, "kv_heads": 1})


def _shape(config: ModelConfig) -> dict:
    return {field.name: getattr(config, field.name) for field in fields(ModelConfig)}
