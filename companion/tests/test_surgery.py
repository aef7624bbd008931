"""The patient survives, ties survive, and assembled models are the ones that were taken apart."""

import pytest
import torch
from torch import nn

from companion.storage import distinct_tensors
from companion.surgery import assembled, chosen, copied, linears, swapped
from companion.tests.test_model import SMALL, small, some_tokens


def test_a_copy_is_apart_and_keeps_its_tie():
    model = small()
    other = copied(model)
    assert other.head.weight is other.embedding.weight
    with torch.no_grad():
        other.embedding.weight.zero_()
    assert model.head.weight.abs().sum() > 0


def test_what_is_about_to_be_replaced_need_not_be_copied():
    model = small()
    other = copied(model, sharing=["blocks.0.mlp.up", "embedding"])
    assert other.blocks[0].mlp.up is model.blocks[0].mlp.up
    assert other.embedding is model.embedding
    assert other.blocks[0].mlp.down.weight is not model.blocks[0].mlp.down.weight


def test_linears_are_the_matrices_inside_the_blocks():
    names = chosen(small(), linears)
    assert len(names) == 7 * SMALL.layers
    assert "head" not in names and "blocks.0.mlp.down" in names


def test_swapping_leaves_the_patient_as_it_was():
    model, tokens = small(), some_tokens()
    before = model(tokens)
    silent = swapped(model, lambda name, _: name.endswith("mlp"), lambda *_: Zero())
    assert torch.equal(model(tokens), before)
    assert not torch.allclose(silent(tokens), before)
    assert isinstance(silent.blocks[1].mlp, Zero) and not isinstance(model.blocks[1].mlp, Zero)
    assert silent.head.weight is silent.embedding.weight


class Zero(nn.Module):
    def forward(self, x):
        return 0 * x


def test_choosing_nothing_or_nests_is_refused():
    with pytest.raises(ValueError, match="no module is chosen"):
        swapped(small(), lambda *_: False, lambda _, m: m)
    with pytest.raises(ValueError, match=r"blocks\.0\.attention\.query.* inside 'blocks"):
        swapped(small(), lambda name, _: "attention" in name.split("."), lambda _, m: m)


@pytest.mark.parametrize("tied", [True, False])
def test_assembled_from_its_own_weights_is_the_same_model(tied):
    model, tokens = small(tied=tied).float(), some_tokens()
    again = assembled(model.config, distinct_tensors(model))
    assert torch.equal(again(tokens), model(tokens))
    assert (again.head.weight is again.embedding.weight) == tied


def test_assembling_refuses_what_does_not_fit():
    weights = distinct_tensors(small())
    with pytest.raises(ValueError, match=r"norm\.weight"):
        assembled(SMALL, {k: v for k, v in weights.items() if k != "norm.weight"})
    with pytest.raises(ValueError, match=r"norm\.weight"):
        assembled(SMALL, weights | {"norm.weight": torch.ones(31)})
