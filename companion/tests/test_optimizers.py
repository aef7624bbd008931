"""Muon against the singular value decomposition, against AdamW, and against torch's own."""

import pytest
import torch
from torch import nn

from companion.optimizers import Muon, orthogonalized
from companion.tests.test_model import small
from companion.tests.test_training import batches
from companion.training import load_checkpoint, save_checkpoint, train


@pytest.mark.parametrize("shape", [(8, 8), (5, 20), (20, 5)])
def test_orthogonalized_keeps_directions_and_evens_out_strengths(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.T @ orthogonalized(matrix) @ right.T  # diagonal, in the matrix's own directions
    values = inside.diagonal()
    assert (inside - values.diag()).abs().max() < 1e-10
    assert values.min() > 0.65 and values.max() < 1.25


def test_one_step_on_a_matrix_is_torch_muon():
    torch.manual_seed(1)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(12, 30, bias=False)])})
    theirs = nn.Parameter(model["blocks"][0].weight.detach().clone())
    theirs.grad = torch.randn(30, 12)
    ours = model["blocks"][0].weight
    ours.grad = theirs.grad.clone()
    Muon(model, 0.01).step()
    options = {"lr": 0.01, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    torch.optim.Muon([theirs], **options).step()
    scale = 0.01 * 0.2 * 30**0.5
    assert (ours - theirs).abs().max() < 0.03 * scale  # theirs iterates in BF16: three digits


def test_the_rest_is_adam():
    torch.manual_seed(1)
    model, steps = nn.ModuleDict({"norm": nn.Linear(3, 4)}), 5
    theirs = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    adam = torch.optim.Adam(theirs, lr=0.1, betas=(0.9, 0.95))
    muon = Muon(model, 0.1)
    for _ in range(steps):
        for p, q in zip(model.parameters(), theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        muon.step(), adam.step()
    for p, q in zip(model.parameters(), theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = small()
    train(whole, batches(), steps=6, optimizer=Muon(whole), progress=False)
    part, again = small(), small()
    optimizer, path = Muon(part), tmp_path / "x.safetensors"
    train(part, batches(), steps=3, optimizer=optimizer, progress=False)
    save_checkpoint(path, part, optimizer, step=3)
    optimizer = Muon(again)
    load_checkpoint(path, again, optimizer)
    train(again, batches(), steps=6, start=3, optimizer=optimizer, progress=False)
    pairs = zip(whole.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_bad_rates_are_refused():
    with pytest.raises(ValueError, match="rate is 0"):
        Muon(small(), rate=0)
