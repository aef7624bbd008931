"""Explorers: sliders over functions that already exist.

Each shows its default state when no kernel runs behind it. Where the sliders ask for what cannot
be, the function's own message stands in place of the result.
"""

from companion.explorers.bits import bits_explorer, bits_figure
from companion.explorers.numbers import number_explorer, number_figure
from companion.explorers.planner import planner_explorer, planner_figure, published_figure
from companion.explorers.replicas import replica_explorer, replica_figure
from companion.explorers.rounding import rounding_explorer, rounding_figure
from companion.explorers.schedules import schedule_explorer, schedule_figure
from companion.explorers.shapes import shape_explorer, this_machine
from companion.explorers.sparsity import sparsity_explorer, sparsity_figure
from companion.explorers.step_memory import step_memory_explorer, step_memory_figure
from companion.explorers.temperature import temperature_explorer, temperature_figure

__all__ = [
    "bits_explorer",
    "bits_figure",
    "number_explorer",
    "number_figure",
    "planner_explorer",
    "planner_figure",
    "published_figure",
    "replica_explorer",
    "replica_figure",
    "rounding_explorer",
    "rounding_figure",
    "schedule_explorer",
    "schedule_figure",
    "shape_explorer",
    "sparsity_explorer",
    "sparsity_figure",
    "step_memory_explorer",
    "step_memory_figure",
    "temperature_explorer",
    "temperature_figure",
    "this_machine",
]
