"""Measure this machine and draw the README's roofline into book/images/roofline.png.

    .venv/bin/python tools/figure.py

Takes half a minute on a machine that does nothing else; on a busy one it draws nothing.
"""

import sys
from pathlib import Path

import torch

from companion import plots
from companion.hardware import machine_card, peaks
from companion.measurement import decode, prefill
from companion.pretrained import smollm2, smollm2_tokenizer
from companion.roofline import reading_work
from companion.storage import write_whole
from companion.timing import race

TARGET = Path(__file__).resolve().parent.parent / "book" / "images" / "roofline.png"
TEXT = "Decoding one token reads every weight once and does two operations with each. " * 8


def main():
    """Race decode, 16 decodes at once and prefill; draw what they reached under the roof."""
    torch.set_num_threads(1)
    model, tokens = smollm2(), torch.tensor([smollm2_tokenizer().encode(TEXT)[:64]])
    machine = peaks("cpu")
    work = {
        "decode": reading_work(model.config, 1, past=64),
        "decode, 16 texts": reading_work(model.config, 1, past=64, batch=16),
        "prefill": reading_work(model.config, 64),
    }
    calls = {
        "decode": decode(model, tokens, 1),
        "decode, 16 texts": decode(model, tokens.expand(16, -1), 1),
        "prefill": prefill(model, tokens),
    }
    times = race(rounds=8, **calls)
    print(times, machine_card("cpu"), sep="\n")
    if times.busy:
        sys.exit(1)
    points = {k: (w.intensity, w.flops / times.median(k)) for k, w in work.items()}
    figure = plots.roofline(machine, points, title="SmolLM2-135M in FP32, one core")
    TARGET.parent.mkdir(exist_ok=True)
    write_whole(TARGET, lambda path: figure.savefig(path, format="png", dpi=120))
    print(figure.alt)


if __name__ == "__main__":
    main()
