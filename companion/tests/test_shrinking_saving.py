"""What is saved comes back the same, and what does not fit is refused."""

import pytest
import torch

from companion import cost
from companion.pruning import heads
from companion.pruning.config import ThinConfig
from companion.pruning.saving import load_pruned, save_pruned, thin_outline
from companion.pruning.structured import masked_twin, shrink
from companion.quantization import quantize
from companion.storage import load_tensors, save_tensors
from companion.tests.test_model import SMALL, small, some_tokens
from companion.tests.test_shrinking import CHANGES, both, every_change


@every_change
@pytest.mark.parametrize("tied", [True, False])
def test_it_comes_back_the_same(change, tied, tmp_path):
    little, _ = both(small(tied=tied).float(), change)
    back = load_pruned(save_pruned(tmp_path / "model", little))
    assert torch.equal(back(some_tokens()), little(some_tokens())) and not back.training
    assert back.config == little.config and type(back.config) is type(little.config)
    assert (back.head.weight is back.embedding.weight) == tied


def test_smaller_matrices_are_smaller_on_the_disk_and_zeros_are_not(tmp_path):
    model = small().float()
    little, masked = both(model, CHANGES["neurons"])
    sizes = [save_pruned(tmp_path / "model", m).stat().st_size for m in (model, masked, little)]
    assert sizes[0] == sizes[1]
    saved = cost.weight_bytes(model.config) - cost.weight_bytes(little.config)
    assert sizes[1] - sizes[2] == pytest.approx(saved, abs=64)  # the header's digits


def test_an_outline_has_the_shapes_and_no_numbers():
    config = ThinConfig(**vars(SMALL) | {"heads": 2, "kv_heads": 1}, head_size=8)
    found = {name: tuple(t.shape) for name, t in thin_outline(config).state_dict().items()}
    little = shrink(small(), heads=1, by=heads.at_random(small(), 0))
    assert found == {name: tuple(t.shape) for name, t in little.state_dict().items()}
    assert thin_outline(config).norm.weight.is_meta


def test_what_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "model"
    with pytest.raises(ValueError, match="only plain models are saved"):
        save_pruned(path, quantize(small().float()))
    uneven = masked_twin(small(), layers=[0])
    uneven.blocks[0] = shrink(small(), neurons=0.5, by=torch.ones(2, 48)).blocks[0]
    with pytest.raises(ValueError, match="not those of its config"):
        save_pruned(path, uneven)
    save_pruned(path, shrink(small(), layers=[0]))
    tensors, about = load_tensors(path)
    wrong = [
        (tensors, {"config": about["config"] | {"hidden": 47}}),
        (tensors, {"config": about["config"] | {"head_size": 7}}),
        (tensors, {"config": about["config"] | {"colour": 1}}),
        (tensors, {}),
        (tensors, None),
        ({k: v for k, v in tensors.items() if k != "norm.weight"}, about),
    ]
    for content in wrong:
        save_tensors(path, *content)
        with pytest.raises(ValueError, match="model does not hold a pruned model"):
            load_pruned(path)
    with pytest.raises(FileNotFoundError):
        load_pruned(tmp_path / "nothing")
