"""Shards against one process, torch's FSDP2 and its ZeroRedundancyOptimizer; bytes counted."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from companion.cost import parameters
from companion.losses import next_token_loss
from companion.parallel.counting import Counted
from companion.parallel.held import held, held_bytes, step_bytes
from companion.parallel.processes import place
from companion.parallel.replicas import data_parallel, share, shared
from companion.parallel.shards import clip_gradients, fully_sharded, sharded, sharded_step
from companion.tests.equalities import (
    OPTIMIZERS,
    STEPS,
    alone,
    far,
    some_batches,
    unclipped_step,
    weights,
)
from companion.tests.test_model import SMALL, small
from companion.training import plain_step, train

STAGES = (1, 2, 3)
ODD = {"width": 6, "heads": 1, "kv_heads": 1, "hidden": 5}  # a block of 246 numbers, 306 beside


def fsdp(model, group):
    mesh = DeviceMesh.from_group(group, "cpu")  # where torch left to itself takes a GPU
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole(model):
    return {name: p.full_tensor() for name, p in model.named_parameters()}


def untied_names(state, model):
    """The state without the second name of a tied head."""
    return {name: state[name] for name, _ in model.module.named_parameters()}


def trained(group, optimizer, changes):
    """Losses and whole weights after some steps: ours by stage, and torch's."""
    rows, results = shared(some_batches(), group), {}
    for stage in STAGES:
        model = sharded(small(**changes), group, stage=stage)
        update = OPTIMIZERS[optimizer](model)
        losses = train(
            model, rows, steps=STEPS, optimizer=update, step=sharded_step, progress=False
        )
        results[stage] = losses, untied_names(model.whole_state(), model)
    model = fsdp(small(**changes), group)
    update = OPTIMIZERS[optimizer](model)
    losses = train(model, rows, steps=STEPS, optimizer=update, progress=False)
    results["fsdp"] = losses, whole(model)
    model = DistributedDataParallel(small(**changes))
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}.get(optimizer)
    if kind is not None:
        rate = OPTIMIZERS[optimizer](model).defaults["lr"]
        update = ZeroRedundancyOptimizer(model.parameters(), kind, lr=rate)
        losses = train(model, rows, steps=STEPS, optimizer=update, progress=False)
        results["zero"] = losses, weights(model)
    return results


CASES = [("two_ranks", "sgd", {}), ("two_ranks", "adamw", {}), ("four_ranks", "adam", {})]
CASES += [("four_ranks", "adamw", ODD), ("two_ranks", "momentum", {"tied": False, "layers": 1})]


@pytest.mark.parametrize(("count", "optimizer", "changes"), CASES)
def test_shards_equal_one_process_and_torch(request, count, optimizer, changes):
    ranks = request.getfixturevalue(count).run(trained, optimizer, changes)
    losses, ends = alone(optimizer, plain_step, changes=changes)
    assert far(ends, weights(small(**changes))) > 1e-2
    for name in ranks[0]:
        for rank in ranks:
            assert far(rank[name][1], ends) < 1e-12
        means = [sum(step) / len(step) for step in zip(*(r[name][0] for r in ranks), strict=True)]
        assert means == pytest.approx(losses, rel=1e-12)


def counts(group, optimizer, changes):
    """Bytes held after a second backward pass, and what one step sends: ours and torch's."""
    rows, results = shared(some_batches(), group), {}
    wraps = {stage: lambda m, stage=stage: sharded(m, group, stage=stage) for stage in STAGES}
    wraps |= {
        0: lambda m: data_parallel(m, group, bucket_bytes=20_000),
        "fsdp": lambda m: fsdp(m, group),
    }
    for name, wrap in wraps.items():
        model = wrap(small(**changes))
        update = OPTIMIZERS[optimizer](model)
        with Counted() as sent:
            unclipped_step(model, update, rows[0])
        next_token_loss(model(rows[1]), rows[1]).backward()
        kept = held(model, update)
        with Counted() as clip:
            if name in STAGES:
                clip_gradients(model)
        results[name] = kept, dict(sent.calls), sent.sent_bytes(place(group)[1]), dict(clip.bytes)
    return results


COUNTED = [("two_ranks", "momentum", {}), ("four_ranks", "adamw", {}), ("four_ranks", "adamw", ODD)]


@pytest.mark.parametrize(("count", "optimizer", "changes"), COUNTED)
def test_bytes_held_and_sent_are_those_predicted(request, count, optimizer, changes):
    config = small(**changes).config
    found = request.getfixturevalue(count).run(counts, optimizer, changes)
    units = config.layers + 1
    calls = {stage: {"reduce_scatter": units, "all_gather": units} for stage in STAGES}
    calls[3]["all_gather"] *= 2
    for rank in found:
        for stage in (0, *STAGES):
            kept, started, sent, clip = rank[stage]
            assert kept == held_bytes(config, len(found), stage, optimizer, bytes_per_number=8)
            assert sent == step_bytes(config, len(found), stage, bytes_per_number=8)
            assert stage == 0 or (started, clip) == (calls[stage], {"all_reduce": 8})
    if changes == ODD:
        return
    ours = held_bytes(config, len(found), 3, optimizer, bytes_per_number=8)["weights"]
    kept, _, sent, _ = found[0]["fsdp"]  # torch cuts each matrix by rows; 50 of them do not divide
    assert ours <= kept["weights"] <= ours + 8 * 2 * 32
    # and it gathers what is not a block only once a step
    rest = 8 * (50 * 32 + 32) * (len(found) - 1) / len(found)
    three = step_bytes(config, len(found), 3, bytes_per_number=8)
    assert sent == pytest.approx(three - rest, rel=0.02)


def test_predicted_bytes_by_hand():
    config = small(**ODD).config
    assert parameters(config) == 2 * 246 + 306
    padded = 2 * 248 + 308  # multiples of four
    by_hand = {"weights": 4 * padded, "gradients": padded, "states": 2 * padded}
    assert held_bytes(config, 4, 2) == by_hand
    assert held_bytes(config, 4, 3)["weights"] == padded
    assert held_bytes(config, 4, 1, "sgd") == by_hand | {"gradients": 4 * padded, "states": 0}
    assert held_bytes(config, 4, 0, "momentum", bytes_per_number=2) == dict.fromkeys(
        by_hand, 2 * 798
    )
    assert step_bytes(config, 4, 0) == 2 * 3 / 4 * 4 * 798
    assert step_bytes(config, 4, 2) == 2 * 3 / 4 * 4 * padded
    assert step_bytes(config, 4, 3) == 1.5 * step_bytes(config, 4, 1)
    assert step_bytes(config, 1, 3) == 0 and held_bytes(config, 1, 3) == held_bytes(config, 1, 0)


def lines(group):
    """Bytes of whole weights there are at each module of a stage-3 forward and backward pass."""
    model, batch = fully_sharded(small(layers=4), group), share(some_batches()[0], group)
    seen = {"forward": [], "backward": []}

    def note(when):
        here = [unit.line.untyped_storage().nbytes() > 0 for unit in model.units]
        seen[when].append(here)

    for module in model.module.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_: note("forward"))
            module.register_full_backward_pre_hook(lambda *_: note("backward"))
    note("forward")
    loss = next_token_loss(model(batch), batch)
    note("forward")
    loss.backward()
    note("backward")
    return seen["forward"], seen["backward"]


def test_weights_are_whole_only_while_their_unit_computes(two_ranks):
    def blocks(seen):
        return [here.index(True, 1) if True in here[1:] else 0 for here in seen]

    for forward, backward in two_ranks.run(lines):
        assert not any(forward[0]) and not any(forward[-1]) and not any(backward[-1])
        for here in forward[1:-1] + backward[:-1]:
            assert here[0] and sum(here[1:]) <= 1
        assert list(dict.fromkeys(blocks(forward[1:-1]))) == [0, 1, 2, 3, 4]
        assert list(dict.fromkeys(blocks(backward[:-1]))) == [0, 4, 3, 2, 1]


def norms(group):
    """Length of the first gradient by stage; weights where each rank clips by its own."""
    batch, results = share(some_batches()[0], group), []
    for stage in STAGES:
        model = sharded(small(), group, stage=stage)
        for rows in batch.chunk(2):  # two passes add up
            (next_token_loss(model(rows), rows) / 2).backward()
        before = clip_gradients(model, 0.1)
        after = clip_gradients(model, 0.1)
        results.append((before.item(), after.item()))
    model = sharded(small(), group, stage=2)
    update = OPTIMIZERS["sgd"](model)
    rows = shared(some_batches(), group)
    train(model, rows, steps=STEPS, optimizer=update, step=plain_step, progress=False)
    with pytest.raises(ValueError, match="length is 0"):
        clip_gradients(model, 0)
    return results, untied_names(model.whole_state(), model)


def test_clipping_takes_the_length_over_all_ranks(two_ranks):
    model, batch = small(), some_batches()[0]
    next_token_loss(model(batch), batch).backward()
    length = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    ends = alone("sgd", plain_step)[1]
    for lengths, wrong in two_ranks.run(norms):
        for before, after in lengths:
            assert before == pytest.approx(length, rel=1e-12)
            assert after == pytest.approx(0.1, rel=1e-5)
        assert far(wrong, ends) > 1e-3


def corners(group):
    """The model stays; evaluation, errors in between, frozen parameters, and what is refused."""
    rank, _ = place(group)
    batch = some_batches()[0]
    results = []
    for stage in STAGES:
        torch.manual_seed(rank)
        given = small()
        with torch.no_grad():
            given.norm.weight += rank
        given.blocks[0].mlp.requires_grad_(False)
        before = weights(given)
        model = sharded(given, group, stage=stage)
        shapes = [tuple(p.shape) for p in model.parameters()]
        with pytest.raises(ValueError, match="exceed the context"):
            model(torch.zeros(1, 33, dtype=torch.int64))
        assert [tuple(p.shape) for p in model.parameters()] == shapes
        with torch.no_grad():
            logits = model(batch)
        next_token_loss(model(batch), batch).backward()
        missing = [n for n, p in model.module.named_parameters() if p.grad is None]
        assert far(weights(given), before) == 0
        results.append((logits, missing, model.whole_state()))
        alive = weakref.ref(model)
        del model
        gc.collect()
        assert alive() is None
    for stage in (0, 4, "3", None):
        with pytest.raises(ValueError, match=f"stage is {stage!r}; known are: 1, 2, 3"):
            sharded(small(), group, stage=stage)
    with pytest.raises(ValueError, match="Linear has no `blocks`"):
        fully_sharded(nn.Linear(3, 3), group)
    knotted = small()
    knotted.blocks[1].mlp.up = knotted.blocks[0].mlp.up
    with pytest.raises(ValueError, match="1 parameters are shared between units"):
        fully_sharded(knotted, group)
    mixed = small()
    mixed.blocks[1].mlp.float()
    with pytest.raises(ValueError, match=r"float32.*float64.*one type is expected"):
        fully_sharded(mixed, group)
    with pytest.raises(ValueError, match="differ: only one has"):
        fully_sharded(small(hidden=48 + rank), group)
    return results


def test_corners(two_ranks):
    model, batch = small(), some_batches()[0]
    state = model.state_dict()
    frozen = [n for n, _ in model.named_parameters() if n.startswith("blocks.0.mlp.")]
    for results in two_ranks.run(corners):
        for logits, missing, found in results:
            assert torch.allclose(logits, model(batch), rtol=0, atol=1e-12)
            assert missing == frozen and far(found, state) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "ranks is 0"),
        ((2, 4), "stage is 4; known are: 0, 1, 2, 3"),
        ((2, 1, "lion"), "optimizer is 'lion'"),
    ],
)
def test_impossible_predictions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        held_bytes(SMALL, *arguments)
    if len(arguments) == 2:
        with pytest.raises(ValueError, match=message):
            step_bytes(SMALL, *arguments)
