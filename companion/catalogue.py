"""Public shapes and devices to compare with: what their makers print, not what we measured."""

from __future__ import annotations

from companion.model import ModelConfig
from companion.roofline import Device

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of one number in each format

_LLAMA_3 = {"vocab": 128_256, "context": 131_072, "rotary_base": 500_000.0, "kv_heads": 8}

# `tiny` is this course's own; the others stand in the config.json beside their public weights.
MODELS = {
    "tiny": ModelConfig(
        vocab=1024, context=512, layers=6, heads=4, kv_heads=2, width=256, hidden=704
    ),
    "SmolLM2-135M": ModelConfig(
        vocab=49_152,
        context=8192,
        layers=30,
        heads=9,
        kv_heads=3,
        width=576,
        hidden=1536,
        rotary_base=100_000.0,
    ),
    "TinyLlama-1.1B": ModelConfig(
        vocab=32_000,
        context=2048,
        layers=22,
        heads=32,
        kv_heads=4,
        width=2048,
        hidden=5632,
        tied=False,
    ),
    "Llama-3.2-1B": ModelConfig(**_LLAMA_3, layers=16, heads=32, width=2048, hidden=8192),
    "Llama-3.1-8B": ModelConfig(
        **_LLAMA_3, layers=32, heads=32, width=4096, hidden=14_336, tied=False
    ),
}


def _device(
    name: str, *, tera: dict[str, float], gigabytes_a_second: float, gigabytes: float
) -> Device:
    return Device(
        name=name,
        flops={dtype: peak * 1e12 for dtype, peak in tera.items()},
        bandwidth=gigabytes_a_second * 1e9,
        memory=gigabytes * 1e9,
    )


def _sixteen(peak: float) -> dict[str, float]:
    return {"bfloat16": peak, "float16": peak}


# Peaks without sparsity; products of 16-bit numbers add up in FP32. FP32 is true FP32, not TF32.
DEVICES = {
    device.name: device
    for device in (
        # NVIDIA T4 data sheet; no BF16 units
        _device(
            "NVIDIA T4",
            tera={"float32": 8.1, "float16": 65},
            gigabytes_a_second=320,
            gigabytes=16,
        ),
        # NVIDIA Ada GPU architecture white paper, appendix A
        _device(
            "NVIDIA RTX 4090",
            tera={"float32": 82.6, **_sixteen(165.2)},
            gigabytes_a_second=1008,
            gigabytes=24,
        ),
        # NVIDIA A100 data sheet, 80 GB SXM
        _device(
            "NVIDIA A100 80 GB",
            tera={"float32": 19.5, **_sixteen(312)},
            gigabytes_a_second=2039,
            gigabytes=80,
        ),
        # NVIDIA H100 data sheet, SXM; half of the figures printed "with sparsity"
        _device(
            "NVIDIA H100 80 GB",
            tera={"float32": 67, **_sixteen(989.5)},
            gigabytes_a_second=3350,
            gigabytes=80,
        ),
        # cloud.google.com/tpu/docs/v5e, one chip
        _device(
            "Google TPU v5e",
            tera={"bfloat16": 197},
            gigabytes_a_second=819,
            gigabytes=16,
        ),
    )
}
