"""`quantize` gives a new model of fewer bytes, close to the old one, and refuses what cannot be."""

import pytest
import torch
from torch import nn

from companion.data import validation
from companion.decoding import generate
from companion.memory import stored_bytes
from companion.model import LanguageModel, ModelConfig
from companion.pretrained import smollm2, tiny, tiny_tokenizer
from companion.quality import judge
from companion.quantization import minimum, quantize, symmetric
from companion.quantization.activations import integer
from companion.quantization.layers import QuantizedEmbedding, QuantizedLinear
from companion.quantization.replacing import Coding

SMALL = {"vocab": 64, "context": 32, "layers": 2, "heads": 4, "kv_heads": 2, "width": 32,
         "hidden": 48}  # fmt: skip


def small(**changes):
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(**SMALL | changes)).eval()


def tokens(batch=2, length=20):
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(1))


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2, "bfloat16", "float8_e4m3fn", "nf4"])
def test_the_model_given_survives_and_the_new_one_is_made_of_rounded_weights(bits):
    model = small()
    before = weights(model)
    new = quantize(model, bits, group=16)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    slow = small()
    with torch.no_grad():
        for name, module in new.named_modules():
            if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
                slow.get_submodule(name).weight.copy_(module.matrix.expand())
    assert torch.allclose(new(tokens()), slow(tokens()), rtol=1e-5, atol=1e-6)
    assert stored_bytes(new) < stored_bytes(model)
    assert sum(isinstance(m, nn.Linear) for m in new.modules()) == 0


def test_more_bits_are_nearer():
    model = small()
    expected = model(tokens())
    apart = [
        (quantize(model, bits, group=16)(tokens()) - expected).norm() for bits in (8, 6, 4, 3, 2)
    ]
    assert apart == sorted(apart)


def test_a_tied_head_is_stored_once_and_an_untied_one_twice():
    new, apart = quantize(small()), quantize(small(tied=False))
    assert new.head.matrix is new.embedding.matrix
    assert apart.head.matrix is not apart.embedding.matrix
    one = stored_bytes(nn.ModuleList([new.head]))
    assert stored_bytes(new) == stored_bytes(apart) - one


def test_head_and_embedding_can_be_left_alone():
    new = quantize(small(), 4, head=None)
    assert isinstance(new.head, nn.Linear) and new.head.weight is new.embedding.weight


def test_the_head_can_have_a_coding_of_its_own():
    coding = Coding(bits=6, group=16, mapping=symmetric)
    new = quantize(small(), 4, group=16, mapping=minimum, head=coding)
    assert new.head.matrix.bits == 6 and new.head.matrix.scheme.scale.shape[1] == 2
    assert new.head.matrix.scheme.offset is None and new.blocks[0].mlp.up.matrix.bits == 4


def test_bits_layer_by_layer():
    model = small()
    new = quantize(model, {"blocks.0.mlp.up": 4, "blocks.1.mlp.down": 2})
    assert new.get_submodule("blocks.0.mlp.up").matrix.bits == 4
    assert new.get_submodule("blocks.1.mlp.down").matrix.bits == 2
    assert isinstance(new.get_submodule("blocks.0.mlp.down"), nn.Linear)


def test_a_quantized_model_generates_with_and_without_a_cache():
    new = quantize(small(), 4, group=16)
    prompt = tokens()[:1, :5]
    assert torch.equal(generate(new, prompt, 8), generate(new, prompt, 8, cached=False))


def test_eight_bits_cost_tiny_next_to_nothing_and_two_bits_a_lot():
    model = tiny()
    text = validation(tiny_tokenizer(), kind="source", characters=6_000)
    found = judge(text, {"plain": model, "8": quantize(model), "2": quantize(model, 2)})
    eight, two = (found[name].excess(found["plain"]) for name in ("8", "2"))
    assert abs(eight.estimate) < 0.01 and two.low > 0.1


def test_the_files_own_blocks_come_back_exactly():
    """Q4_1 is the minimum mapping in groups of 32: four bits lose nothing that the file holds."""
    model = smollm2()
    new = quantize(model, 4, group=32, mapping=minimum, head=None)
    for name in ("blocks.0.attention.query", "blocks.17.mlp.down"):
        plain = model.get_submodule(name).weight
        assert torch.equal(new.get_submodule(name).matrix.expand(), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits is 1; it must be 2 to 8"),
        ({"bits": 16}, "bits is 16; it must be 2 to 8"),
        ({"bits": "fp4"}, "format is 'fp4'; known are"),
        ({"bits": True}, "bits is True"),
        ({"bits": 4, "group": 5}, r"blocks\.0\.attention\.query: group 5 does not divide the 32"),
        ({"bits": {"blocks.9.mlp.up": 4}}, "'blocks.9.mlp.up' is no linear layer of a block"),
        ({"head": 9}, "bits is 9"),
        ({"bits": {}, "head": None}, "nothing would be quantized"),
    ],
)
def test_bad_options_are_refused_and_the_model_stays(options, message):
    model = small()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        quantize(model, **options)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_bad_models_are_refused():
    with pytest.raises(ValueError, match=r"embedding is quantized already; start from the orig"):
        quantize(quantize(small()))
    integers = integer(quantize(small(), mapping=symmetric, head=None))
    with pytest.raises(ValueError, match=r"blocks\.0\.attention\.query is quantized already"):
        quantize(integers)
    broken = small()
    with torch.no_grad():
        broken.blocks[1].mlp.up.weight[0, 0] = torch.inf
    for bits in (4, "nf4", "float8_e4m3fn", "float16"):
        with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.up: 1 of 1536 numbers are not fin"):
            quantize(broken, bits)


def test_a_model_of_sixteen_bits_is_quantized_and_writes():
    model = small().bfloat16()
    new = quantize(model)
    assert new.embedding(tokens()).dtype == torch.bfloat16
    assert generate(new, tokens()[:1, :3], 4).shape == (1, 7)
