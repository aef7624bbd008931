"""Patterns keep as many weights as they say, where they say; ties fall the same way each time."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from companion.pruning import in_blocks, in_groups, over_matrix, over_rows
from companion.pruning.patterns import lowest


def some_scores(outputs=12, inputs=20, seed=0):
    return torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0, 0.1, 0.25, 0.5, 0.503, 0.9, 0.99])
def test_a_matrix_loses_what_torch_removes(share):
    layer = nn.Linear(20, 12, bias=False)
    expected = torch_prune.l1_unstructured(layer, "weight", amount=float(share)).weight_mask
    kept = over_matrix(layer.weight_orig.detach().abs(), share)
    assert torch.equal(kept, expected.bool())


@pytest.mark.parametrize(("share", "gone"), [(0, 0), (0.1, 2), (0.5, 10), (0.52, 10), (0.99, 20)])
def test_every_row_loses_as_many(share, gone):
    scores = some_scores()
    kept = over_rows(scores, share)
    assert ((~kept).sum(1) == gone).all()
    for row, mask in zip(scores, kept, strict=True):
        assert gone in (0, 20) or row[~mask].max() < row[mask].min()


def test_two_of_every_four_neighbours_are_kept_and_the_larger_ones():
    scores = some_scores()
    kept = in_groups(4)(scores, 0.5)
    for row in range(12):
        for start in range(0, 20, 4):
            four, mask = scores[row, start : start + 4], kept[row, start : start + 4]
            assert mask.sum() == 2 and set(four[mask].tolist()) == set(four.topk(2).values.tolist())


@pytest.mark.parametrize(("size", "share", "gone"), [(4, 0.25, 1), (10, 0.3, 3), (5, 0.6, 3)])
def test_groups_of_other_sizes(size, share, gone):
    kept = in_groups(size)(some_scores(), share)
    assert ((~kept).view(-1, size).sum(1) == gone).all()


def test_blocks_go_whole_and_the_lowest_sums_first():
    scores = some_scores()
    kept = in_blocks(3, 5)(scores, 0.5)
    sums = {}
    for row in range(0, 12, 3):
        for column in range(0, 20, 5):
            block = kept[row : row + 3, column : column + 5]
            assert block.all() or not block.any()
            sums[row, column] = (
                scores[row : row + 3, column : column + 5].sum(),
                bool(block[0, 0]),
            )
    ranked = [keeps for _, keeps in sorted(sums.values())]
    assert ranked == [False] * 8 + [True] * 8


def test_among_equal_scores_the_first_go():
    ties = torch.tensor([[1.0, 0, 1, 0, 1, 2], [3, 3, 3, 3, 3, 3], [0, 0, 0, 1, 1, 1]])
    assert lowest(ties, 3).int().tolist() == [
        [1, 1, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
    ]
    assert over_matrix(torch.zeros(4, 4), 0.25).int().tolist() == [[0] * 4, *[[1] * 4] * 3]


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan"), "half", True, None])
@pytest.mark.parametrize("pattern", [over_matrix, over_rows, in_groups(4), in_blocks(4, 4)])
def test_shares_that_cannot_be_are_refused(pattern, share):
    with pytest.raises(ValueError, match=r"share is .*; it must be at least 0 and below 1"):
        pattern(some_scores(), share)


def test_patterns_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="groups of 6 do not divide the 20 inputs"):
        in_groups(6)(some_scores(), 0.5)
    with pytest.raises(ValueError, match=r"a share of 0\.3 of 4 inputs is 1\.2, no whole number"):
        in_groups(4)(some_scores(), 0.3)
    with pytest.raises(ValueError, match="blocks of 5 x 5 do not divide a matrix of 12 x 20"):
        in_blocks(5, 5)(some_scores(), 0.5)
    with pytest.raises(ValueError, match="size is 1; it must be a whole number of at least 2"):
        in_groups(1)
    with pytest.raises(ValueError, match="columns is 0"):
        in_blocks(1, 0)
