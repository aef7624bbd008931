"""Is our decoding as fast as a peer's? `python -m companion.bench.decoding`

SmolLM2 in FP32 continues a prompt greedily with a cache: once with `companion.decoding.generate`,
once with `transformers`' `generate` on the same weights, in alternation, at one thread. Both must
write the same tokens. Nothing is written. Needs requirements-test.txt.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from companion.decoding import generate
from companion.hardware import machine_card
from companion.model import LanguageModel
from companion.pretrained import smollm2, smollm2_tokenizer
from companion.timing import Race, race

PROMPT, NEW, ROUNDS = "The key-value cache of a language model", 32, 10
NAMES = {  # of a block: ours, theirs
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def as_transformers(model: LanguageModel) -> nn.Module:
    """The same weights as a `transformers` Llama."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = model.config
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        rms_norm_eps=shape.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rotary_base},
        tie_word_embeddings=shape.tied,
    )
    peer = LlamaForCausalLM(config).eval()
    peer.load_state_dict(_renamed(model), strict=True)
    return peer


def _renamed(model: LanguageModel) -> dict[str, Tensor]:
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("blocks."):
            _, layer, part = name.removesuffix(".weight").split(".", 2)
            weights[f"model.layers.{layer}.{NAMES[part]}.weight"] = tensor
    outside = {"model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head"}
    for theirs, ours in outside.items():
        weights[f"{theirs}.weight"] = model.get_parameter(f"{ours}.weight")
    return weights


def continued(model: LanguageModel, prompt: Tensor, new: int) -> Callable[[], Tensor]:
    """A call of `transformers`' greedy generate on the same weights: ids (B, T + new)."""
    peer = as_transformers(model)
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": new,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return lambda: peer.generate(prompt, **options)


def compare_with_transformers(rounds: int = ROUNDS, new: int = NEW) -> Race:
    """Race both; raises AssertionError if they write different tokens."""
    model, prompt = smollm2(), torch.tensor([smollm2_tokenizer().encode(PROMPT)])
    calls = {
        "companion": lambda: generate(model, prompt, new),
        "transformers": continued(model, prompt, new),
    }
    ours, theirs = (call() for call in calls.values())
    assert torch.equal(ours, theirs), "the two write different tokens"
    return race(rounds=rounds, **calls)


def main() -> int:
    """Print tokens per second of both; 1 if ours is slower."""
    result = compare_with_transformers()
    for name in ("companion", "transformers"):
        speed = result.interval(name).map(lambda s: NEW / s)
        print(f"{name:<14}{speed} tokens/s, prompt included")
    ratio = result.ratio("transformers", "companion")
    print(f"transformers takes {ratio} times as long\n{result}\n{machine_card()}")
    return int(ratio.known and ratio.high < 1)


if __name__ == "__main__":
    sys.exit(main())
