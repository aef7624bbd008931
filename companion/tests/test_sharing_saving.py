"""Files of shared models: each tensor once, all ties back, and what is no such file refused."""

import pytest
import torch
from safetensors.torch import save_file

from companion.memory import stored_bytes
from companion.quantization import quantize
from companion.sharing import cycle, load_shared, lora, save_shared, share, tie, ties, unshared
from companion.storage import load_tensors, save_tensors
from companion.tests.test_model import some_tokens
from companion.tests.test_sharing_ties import SHARINGS, four
from companion.training import adamw, load_checkpoint, save_checkpoint

NAMES = ("blocks.0.attention.query.weight", "blocks.1.attention.out.weight")
MAKERS = {
    "none": lambda model: model,
    **{name: lambda model, o=options: share(model, **o) for name, options in SHARINGS.items()},
    "any two": lambda model: tie(model, NAMES),
    "lora": lambda model: lora(model, 3, scale=0.5),
    "lora on shared factors": lambda model: lora(
        share(model, layers=1, inner=7, where=lambda name, _: name.endswith("mlp.gate")), 2,
        where=lambda name, _: name.endswith("query"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
def test_it_comes_back_sharing_what_it_shared(name, tmp_path):
    model = MAKERS[name](four().float())
    with torch.no_grad():
        for parameter in model.parameters():  # nothing may be as it was made
            parameter.add_(0.01 * torch.randn(parameter.shape))
    path = save_shared(tmp_path / "model", model)
    back = load_shared(path)
    assert torch.equal(back(some_tokens()), model(some_tokens())) and not back.training
    assert ties(back) == ties(model) and back.config == model.config
    assert stored_bytes(back) == stored_bytes(model)
    frozen = [p.requires_grad for p in back.parameters()]
    assert frozen == [p.requires_grad for p in model.parameters()]
    assert not any(tensor.is_meta for tensor in (*back.parameters(), *back.buffers()))
    header = path.stat().st_size - stored_bytes(model)
    assert 0 < header < 12_000  # names and the plan: what is shared takes its bytes once


def test_a_file_is_as_much_smaller_as_the_model(tmp_path):
    model = share(four().float(), layers=2, tied=True)
    sizes = [save_shared(tmp_path / "m", m).stat().st_size for m in (model, unshared(model))]
    assert sizes[1] - sizes[0] == pytest.approx(
        stored_bytes(unshared(model)) - stored_bytes(model), abs=4_000
    )


def test_sixteen_bits_stay_sixteen(tmp_path):
    model = share(four(), layers=2, order=cycle).bfloat16()
    back = load_shared(save_shared(tmp_path / "model", model))
    assert back.norm.weight.dtype == back.cos.dtype == torch.bfloat16
    assert torch.equal(back(some_tokens()), model(some_tokens()))


def test_a_checkpoint_keeps_ties_and_states(tmp_path):
    model = share(four(), layers=2, tied=True)
    optimizer = adamw(model)
    model(some_tokens()).square().mean().backward()
    optimizer.step()
    path = save_checkpoint(tmp_path / "run", model, optimizer, step=1)
    other = share(four(), layers=2, tied=True)
    load_checkpoint(path, other, adamw(other))
    assert ties(other) == ties(model)
    assert torch.equal(other(some_tokens()), model(some_tokens()))


def test_the_plain_ways_lose_it(tmp_path):
    """What the module says of safetensors and of pickled states."""
    model = share(four(), layers=2, tied=True)
    with pytest.raises(RuntimeError, match="share memory"):
        save_file(model.state_dict(), tmp_path / "plain")
    torch.save(model.state_dict(), tmp_path / "pickled")
    assert (tmp_path / "pickled").stat().st_size < stored_bytes(model) + 40_000
    other = four()
    other.load_state_dict(torch.load(tmp_path / "pickled", weights_only=True))
    assert torch.equal(other(some_tokens()), model(some_tokens())) and ties(other) == []


def test_what_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "model"
    with pytest.raises(ValueError, match="only plain ones are saved here"):
        save_shared(path, quantize(four().float()))
    assert not path.exists()
    save_shared(path, share(four(), layers=2, inner=3))
    tensors, about = load_tensors(path)
    wrong = [
        (tensors, about | {"blocks": [0, 0, 9, 2]}),
        (tensors, about | {"blocks": [0, 1, 2, 3]}),
        (tensors, about | {"factors": {}}),
        (tensors, about | {"factors": {"blocks.0.nothing": 3}}),
        (tensors, about | {"frozen": ["nothing"]}),
        (tensors, about | {"config": about["config"] | {"hidden": 47}}),
        (tensors, None),
        ({k: v for k, v in tensors.items() if k != "norm.weight"}, about),
        (tensors | {"norm.weight": torch.ones(31)}, about),
    ]
    for each in wrong:
        save_tensors(path, *each)
        with pytest.raises(ValueError, match="does not hold a shared model"):
            load_shared(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_shared(tmp_path / "nowhere")
