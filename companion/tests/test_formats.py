"""Floating-point formats and tables store what their papers say."""

import pytest
import torch

from companion.quantization.formats import CASTS, Cast, Table, in_format, nf4_levels

# Appendix E of QLoRA (arXiv:2305.14314), as printed
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


def numbers():
    return torch.randn(8, 2, 32, generator=torch.Generator().manual_seed(0))


def test_nf4_has_the_papers_levels():
    assert torch.allclose(nf4_levels(), torch.tensor(NF4), rtol=0, atol=1e-6)


def test_nf4_takes_the_nearest_level():
    x = numbers()
    table = in_format(x, "nf4")
    distances = (x.unsqueeze(-1) - table.levels * table.scale.unsqueeze(-1)).abs()
    found = (table.numbers(table.codes(x)) - x).abs()
    assert isinstance(table, Table) and torch.allclose(found, distances.amin(-1), atol=1e-6)
    assert torch.equal(x.abs().amax(-1, True), table.scale)


@pytest.mark.parametrize("name", CASTS)
def test_casts_keep_so_many_digits(name):
    x, dtype = numbers(), CASTS[name]
    cast = in_format(x, name)
    stored = cast.codes(x)
    assert isinstance(cast, Cast) and stored.dtype == dtype
    normal = x.abs() > torch.finfo(dtype).smallest_normal * (
        1 if cast.scale is None else cast.scale
    )
    error = ((cast.numbers(stored) - x).abs() / x.abs())[normal]
    assert normal.float().mean() > 0.95
    assert torch.finfo(dtype).eps / 4 < error.max() <= torch.finfo(dtype).eps / 2 * 1.0001


def test_large_numbers_survive_eight_bits():
    x = numbers() * 1e6
    for name in ("float8_e4m3fn", "float8_e5m2"):
        cast = in_format(x, name)
        back = cast.numbers(cast.codes(x))
        assert torch.allclose(back.abs().amax(-1), x.abs().amax(-1), rtol=1e-6)


def test_zeros_and_unknown_names():
    zeros = torch.zeros(1, 1, 4)
    for name in (*CASTS, "nf4"):
        scheme = in_format(zeros, name)
        assert torch.equal(scheme.numbers(scheme.codes(zeros)), zeros)
    with pytest.raises(ValueError, match="format is 'fp4'; known are: bfloat16"):
        in_format(zeros, "fp4")


@pytest.mark.parametrize("name", [*CASTS, "nf4"])
def test_numbers_that_no_format_holds_are_refused(name):
    with pytest.raises(ValueError, match="1 of 4 numbers are not finite"):
        in_format(torch.tensor([[1.0, 2.0, torch.inf, 0.0]]), name)
    if name == "float16":
        with pytest.raises(ValueError, match=r"size 100,000\.0 exceeds the 65,504\.0 of float16"):
            in_format(torch.tensor([[1e5, 1.0]]), name)
