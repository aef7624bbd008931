"""Kernels on a GPU compute with the codes they are given, as the processor's do."""

import pytest
import torch
from torch import nn

from companion.measurement import products
from companion.model import LanguageModel, ModelConfig
from companion.quantization import affine, minimum, symmetric
from companion.quantization.cuda_kernels import CUDA_KERNELS, Int4Cuda, Int8Cuda, on_cuda
from companion.quantization.layers import QuantizedLinear, QuantizedMatrix
from companion.quantization.replacing import Coding, nearest

HERE = "cuda" if torch.cuda.is_available() else "cpu"
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
CODINGS = {
    Int4Cuda: [Coding(bits=4, group=g, mapping=m) for g in (32, 64) for m in (affine, minimum,
                                                                             symmetric)],
    Int8Cuda: [Coding(bits=8, mapping=symmetric)],
}  # fmt: skip
CASES = [(kind, coding) for kind, codings in CODINGS.items() for coding in codings]


def matrix(coding, outputs=48, inputs=192):
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) * 0.05
    found = nearest("w", weight, coding)
    return QuantizedMatrix(found.codes, found.scheme, inputs)


def vectors(*shape):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return made.to(HERE, torch.bfloat16)


def made(kind, plain):
    """The kernel where there is one: torch has 8-bit products for both devices."""
    if kind is Int4Cuda and HERE == "cpu":
        pytest.skip("no CUDA GPU here")
    return kind(plain, HERE)


@pytest.mark.parametrize(("kind", "coding"), CASES)
@pytest.mark.parametrize("shape", [(1, 1, 192), (2, 5, 192), (2, 140, 192)])
def test_a_kernel_agrees_with_the_plain_layer(kind, coding, shape):
    plain, x = QuantizedLinear(matrix(coding)), vectors(*shape)
    found, expected = made(kind, plain.matrix)(x), plain(x.float().cpu())
    assert found.shape == expected.shape and found.dtype == x.dtype
    worst = 0.03 if kind is Int8Cuda else 0.01  # vectors in 8 bits, or only in BF16
    assert (found.float().cpu() - expected).norm() < worst * expected.norm()


@pytest.mark.parametrize(("kind", "coding"), CASES)
def test_the_expanded_weight_is_the_plain_one(kind, coding):
    plain = matrix(coding)
    apart = (made(kind, plain).expand().cpu() - plain.expand()).abs().max()
    assert apart <= 2**-7 * plain.expand().abs().max()


def test_integer_products_are_those_of_the_plain_integers():
    coding = Coding(bits=8, mapping=symmetric)
    kernel, x = made(Int8Cuda, matrix(coding)), vectors(40, 192)
    scale = x.abs().amax(1, keepdim=True).float() / 127
    codes = (x / scale).round()
    expected = (codes.double() @ kernel.codes.T.double()) * scale * kernel.scale
    assert torch.allclose(kernel(x).double(), expected, rtol=2**-8)
    assert torch.equal(kernel(x)[:3], kernel(x[:3]))  # filled up with zeros: the same numbers
    assert products(nn.Sequential(kernel)) == "Int8Cuda x 1"


@on_a_gpu
@pytest.mark.parametrize("inputs", [192, 256])
def test_four_bits_equal_torchao_bit_for_bit(inputs):
    """On weights that its own choice of scale meets exactly: powers of two, all 16 codes used."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    codes = torch.arange(48 * inputs).mul(7).remainder(16).view(48, -1, 32) - 8
    scale = 2.0 ** torch.arange(-8, -4).repeat(48 * inputs // 128).view(48, -1, 1)
    weight = (codes * scale).view(48, inputs)
    found = nearest("w", weight, Coding(bits=4, group=32, mapping=minimum))
    ours = QuantizedMatrix(found.codes, found.scheme, inputs)
    assert torch.equal(ours.expand(), weight)
    theirs = nn.Sequential(nn.Linear(inputs, 48, bias=False))
    theirs[0].weight.data = weight
    theirs = theirs.to("cuda", torch.bfloat16)
    config = Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d")
    quantize_(theirs, config)
    x = vectors(5, inputs)
    assert torch.equal(Int4Cuda(ours)(x), theirs(x))


@on_a_gpu
def test_eight_bits_are_as_near_as_those_of_torchao():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    ours = matrix(Coding(bits=8, mapping=symmetric), 64, 256)
    theirs = nn.Sequential(nn.Linear(256, 64, bias=False))
    theirs[0].weight.data = ours.expand()
    theirs = theirs.to("cuda", torch.bfloat16)
    quantize_(theirs, Int8DynamicActivationInt8WeightConfig())
    x = vectors(40, 256)
    exact = x.float() @ ours.expand().cuda().T
    own, other = ((y.float() - exact).norm() / exact.norm() for y in (Int8Cuda(ours)(x), theirs(x)))
    assert own <= 1.1 * other and other < 0.03, (own, other)


@on_a_gpu
@pytest.mark.parametrize("name", list(CUDA_KERNELS))
def test_a_model_on_a_kernel_predicts_nearly_as_before(name):
    shape = {"heads": 4, "kv_heads": 2, "width": 64, "hidden": 128, "layers": 2}
    model = LanguageModel(ModelConfig(vocab=64, context=32, **shape)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tokens = torch.arange(24)[None]
    with torch.inference_mode():
        found = on_cuda(model, name)(tokens.cuda()).float().cpu()
        expected = model(tokens)
    share = {"Int4Cuda": 0.3, "Int8Cuda": 0.05}[name]
    assert (found - expected).norm() < share * expected.norm()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@on_a_gpu
def test_a_point_of_the_study_and_a_captured_step():
    from companion.studies import gpu_kernels

    found = gpu_kernels.run(seed=0, width=256, vectors=4)
    ways = {f"{name}, {way}" for name in ("BF16", *CUDA_KERNELS) for way in ("called", "graph")}
    assert ways <= found.keys() and all(0 < seconds < 1 for seconds in found.values())
    total = torch.zeros(1, device="cuda")
    replay = gpu_kernels.captured(lambda: total.add_(1), 7)
    before = total.item()
    replay()
    assert total.item() == before + 7


@pytest.mark.parametrize(("kind", "coding", "message"), [
    (Int4Cuda, Coding(bits=8), "4-bit codes on a grid"),
    (Int4Cuda, Coding(bits=4, group=16), "48 rows of 192 in groups of 16 do not suit the kernel"),
    (Int4Cuda, Coding(bits=4, group="tensor"), "do not suit the kernel"),
    (Int8Cuda, Coding(bits=8), "a symmetric grid a row"),
    (Int8Cuda, Coding(bits=8, group=32, mapping=symmetric), "a symmetric grid a row"),
])  # fmt: skip
def test_codes_that_a_kernel_cannot_read_are_refused(kind, coding, message):
    with pytest.raises(ValueError, match=message):
        kind(matrix(coding))


def test_rows_that_do_not_fit_are_refused():
    coding = Coding(bits=8, mapping=symmetric)
    with pytest.raises(ValueError, match="44 rows of 192 do not suit the kernel: both by 8"):
        Int8Cuda(matrix(coding, outputs=44))


def test_without_a_gpu_or_for_an_unknown_kernel_the_message_says_so(monkeypatch):
    model = nn.Identity()
    with pytest.raises(ValueError, match="kernel is 'Int5Cuda'; known are: Int4Cuda, Int8Cuda"):
        on_cuda(model, "Int5Cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="Int4Cuda needs a CUDA GPU"):
        on_cuda(model, "Int4Cuda")
