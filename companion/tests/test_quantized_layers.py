"""Quantized layers compute what their expanded weights compute, and store what they say."""

import copy

import pytest
import torch
from torch import nn

from companion.memory import stored_bytes
from companion.quantization import affine, minimum, symmetric
from companion.quantization.layers import QuantizedEmbedding, QuantizedLinear, QuantizedMatrix
from companion.quantization.replacing import Coding, nearest

CODINGS = {
    "row": Coding(bits=8),
    "tensor": Coding(bits=6, group="tensor", mapping=symmetric),
    "group": Coding(bits=4, group=8, mapping=affine),
    "minimum": Coding(bits=3, group=16, mapping=minimum),
    "nf4": Coding(bits="nf4", group=8),
    "fp8": Coding(bits="float8_e4m3fn"),
    "bf16": Coding(bits="bfloat16"),
}


def weight(seed=0):
    return torch.randn(12, 16, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.fixture(params=CODINGS)
def case(request):
    coding = CODINGS[request.param]
    found = nearest("w", weight(), coding)
    return QuantizedMatrix(found.codes, found.scheme, 16), found.numbers(16)


def test_a_matrix_expands_to_the_rounded_weight(case):
    matrix, expected = case
    assert matrix.shape == (12, 16) and torch.equal(matrix.expand(), expected)
    assert (expected - weight()).abs().max() < 0.1


def test_rows_are_rows_of_the_expanded_weight(case):
    matrix, expected = case
    ids = torch.tensor([[3, 3], [11, 0]])
    assert torch.equal(matrix.rows(ids), expected[ids])
    assert torch.equal(QuantizedEmbedding(matrix)(ids), expected[ids])


def test_a_linear_layer_is_the_product_with_the_expanded_weight(case):
    matrix, expected = case
    layer, x = QuantizedLinear(matrix), torch.randn(5, 16)
    assert torch.equal(layer(x), x @ expected.T)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert (layer.in_features, layer.out_features) == (16, 12)


def test_copies_and_states_come_back(case):
    matrix, expected = case
    assert torch.equal(copy.deepcopy(matrix).expand(), expected)
    zeros = nearest("w", torch.zeros(12, 16), _coding_of(expected))
    other = QuantizedMatrix(zeros.codes, zeros.scheme, 16)
    other.load_state_dict(matrix.state_dict())
    assert torch.equal(other.expand(), expected)


def _coding_of(expected):
    for coding in CODINGS.values():
        if torch.equal(nearest("w", weight(), coding).numbers(16), expected):
            return coding
    raise AssertionError("no coding gives this matrix")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("row", 12 * 16 + 12 * (2 + 1)),  # codes; scale in FP16, zero in INT8
        ("tensor", 12 * 16 * 6 // 8 + 2),
        ("group", 12 * 16 // 2 + 24 * 3),
        ("minimum", 12 * 16 * 3 // 8 + 12 * (2 + 2)),
        ("nf4", 12 * 16 // 2 + 24 * 4 + 16 * 4),
        ("fp8", 12 * 16 + 12 * 4),
        ("bf16", 12 * 16 * 2),
    ],
)
def test_bytes_are_counted_one_by_one(name, expected):
    found = nearest("w", weight(), CODINGS[name])
    matrix = QuantizedMatrix(found.codes, found.scheme, 16)
    assert stored_bytes(nn.Sequential(matrix)) == expected


def test_columns_multiply_the_expanded_weight():
    found = nearest("w", weight(), CODINGS["group"])
    columns = torch.linspace(0.5, 2, 16).half().float()
    matrix = QuantizedMatrix(found.codes, found.scheme, 16, columns)
    assert torch.equal(matrix.expand(), found.numbers(16) * columns)
    assert torch.equal(matrix.rows(torch.tensor([4])), matrix.expand()[4:5])
    assert "columns" in matrix.state_dict()


def test_another_type_for_the_model_leaves_codes_and_scales_alone(case):
    matrix, expected = case
    model = nn.Sequential(QuantizedLinear(matrix), nn.Linear(12, 2)).to(torch.bfloat16)
    assert model[1].weight.dtype == torch.bfloat16
    assert torch.equal(model[0].matrix.expand(), expected)


def test_rows_of_a_matrix_of_one_row():
    found = nearest("w", weight()[:1], CODINGS["group"])
    matrix = QuantizedMatrix(found.codes, found.scheme, 16)
    assert torch.equal(matrix.rows(torch.tensor([0, 0])), matrix.expand()[[0, 0]])
