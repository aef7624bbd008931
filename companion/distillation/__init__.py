"""Distillation: a small model learns from a large one.

`distill(teacher, student, batches, steps=...)` is the verb; the modules are the pieces it is made
of: `divergences` (how far from the teacher), `steps` (the loss and its update), `hidden` (its inner
states), `stored` and `offline` (its best guesses, stored once), `sequences` (its text, or the
student's), `remembering` (a teacher that reads nothing twice), `shapes` (students for `tiny`).
"""

from companion.distillation.divergences import forward_kl, jensen_shannon, reverse_kl
from companion.distillation.hidden import hidden_step
from companion.distillation.offline import offline_step, renormalised, with_rest
from companion.distillation.remembering import Remembering
from companion.distillation.sequences import Shuffled, on_policy_step, teacher_text
from companion.distillation.shapes import QUARTER, TENTH, new_student
from companion.distillation.steps import distill, imitation_step, in_turn
from companion.distillation.stored import TopLogits, load_top, save_top, store_top, top_bytes

__all__ = [
    "QUARTER",
    "TENTH",
    "Remembering",
    "Shuffled",
    "TopLogits",
    "distill",
    "forward_kl",
    "hidden_step",
    "imitation_step",
    "in_turn",
    "jensen_shannon",
    "load_top",
    "new_student",
    "offline_step",
    "on_policy_step",
    "renormalised",
    "reverse_kl",
    "save_top",
    "store_top",
    "teacher_text",
    "top_bytes",
    "with_rest",
]
