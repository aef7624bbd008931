"""Replicas against torch's DistributedDataParallel and against one process with the whole batch."""

import gc
import weakref
from itertools import chain

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from companion.losses import next_token_loss
from companion.parallel.counting import Counted
from companion.parallel.processes import place
from companion.parallel.replicas import (
    _buckets,
    apart,
    data_parallel,
    share,
    shared,
    uneven_share,
    uneven_step,
)
from companion.tests.equalities import (
    OPTIMIZERS,
    STEPS,
    alone,
    far,
    gradients,
    some_batches,
    unclipped_step,
    weights,
)
from companion.tests.test_model import small
from companion.training import plain_step, train

BUCKET = 20_000  # bytes: several buckets, of one and of many parameters


def mean_losses(found):
    return [sum(losses) / len(losses) for losses in zip(*found, strict=True)]


def both(group, optimizer):
    """First gradients, losses and final weights: ours, ours without overlap, and DDP's."""
    results = {}
    for name, wrap in {
        "ours": lambda m: data_parallel(m, group, bucket_bytes=BUCKET),
        "late": lambda m: data_parallel(m, group, overlap=False),
        "ddp": DistributedDataParallel,
    }.items():
        replica = wrap(small())
        rows = shared(some_batches(), group)
        next_token_loss(replica(rows[0]), rows[0]).backward()
        first = gradients(replica)
        replica.zero_grad()
        update = OPTIMIZERS[optimizer](replica)
        losses = train(replica, rows, steps=STEPS, optimizer=update, progress=False)
        results[name] = first, losses, weights(replica), apart(replica, group)
    return results


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("count", ["two_ranks", "four_ranks"])
def test_ranks_equal_ddp_and_one_process(request, count, optimizer):
    ranks = request.getfixturevalue(count).run(both, optimizer)
    model = small()
    next_token_loss(model(some_batches()[0]), some_batches()[0]).backward()
    losses, ends = alone(optimizer, plain_step)
    assert far(ends, weights(model)) > 1e-2
    for name in ("ours", "late", "ddp"):
        found = [rank[name] for rank in ranks]
        assert mean_losses([losses for _, losses, _, _ in found]) == pytest.approx(
            losses, rel=1e-12
        )
        for first, _, end, spread in found:
            assert far(first, gradients(model)) < 1e-12 and far(end, ends) < 1e-12
            assert spread == 0


def copies(group):
    rank, ranks = place(group)
    torch.manual_seed(rank)
    model = small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
        model.norm.weight[3] = rank / 4
        model.cos += rank
    before = weights(model)
    seeded = apart(model, group)
    replica = data_parallel(model, group)
    assert far(weights(model), before) == 0 and all(p.grad is None for p in replica.parameters())
    found = apart(replica, group), replica.module.norm.weight[3].item(), replica.module.cos
    with torch.no_grad():
        next(replica.parameters()).zero_()
        replica.module.norm.weight[5] += rank / 4
    assert apart(replica, group) == (ranks - 1) / 4
    assert far(weights(model), before) == 0  # they share no memory
    return seeded, *found


def test_a_replica_is_a_copy_of_rank_0_and_the_model_stays(four_ranks):
    cos = small().cos
    for seeded, after, value, buffer in four_ranks.run(copies):
        assert seeded > 0.1 and after == 0 and value == 0 and torch.equal(buffer, cos)


def test_buckets_run_from_the_last_parameter_to_the_first():
    sizes = [3, 5, 2, 2, 9, 1, 1]
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    parameters[1] = nn.Parameter(torch.zeros(5).double())
    buckets = _buckets(parameters, 4 * 4)
    order = [parameter for bucket in buckets for parameter in bucket.parameters]
    assert [id(p) for p in order] == [id(p) for p in reversed(parameters)]
    assert [[p.numel() for p in b.parameters] for b in buckets] == [[1, 1], [9], [2, 2], [5], [3]]
    assert all(v.data_ptr() >= b.flat.data_ptr() for b in buckets for v in b.views)


def sent(group):
    """What one step starts, and what had been started when the first layer's gradient came."""
    batch = share(some_batches()[0], group)
    results = {}
    for name, overlap in {"ours": True, "late": False}.items():
        replica = data_parallel(small(), group, bucket_bytes=BUCKET, overlap=overlap)
        seen = []
        with Counted() as counted:
            query = replica.module.blocks[0].attention.query.weight
            query.register_hook(lambda _: seen.append(counted.calls["all_reduce"]))  # noqa: B023
            loss = next_token_loss(replica(batch), batch)
            none = counted.calls.total()
            loss.backward()
        found = dict(counted.calls), dict(counted.bytes), counted.sent_bytes(2)
        results[name] = none, seen, len(replica.buckets), found
    return results


def test_buckets_leave_while_the_backward_pass_runs(two_ranks):
    whole = sum(p.nbytes for p in small().parameters())  # the tied head once
    for rank in two_ranks.run(sent):
        none, seen, buckets, found = rank["ours"]
        assert none == 0 and 0 < seen[0] < buckets and buckets > 5
        assert found == ({"all_reduce": buckets}, {"all_reduce": whole}, whole)
        assert rank["late"] == (0, [0], 1, ({"all_reduce": 1}, {"all_reduce": whole}, whole))


def accumulated(group):
    """Gradients of one batch in two halves, ours and DDP's, and the calls of each half."""
    halves = share(some_batches()[0], group).chunk(2)
    results = []
    replica, ddp = data_parallel(small(), group), DistributedDataParallel(small())
    for model, silence in ((replica, replica.accumulating), (ddp, ddp.no_sync)):
        calls = []
        for index, half in enumerate(halves):
            with Counted() as counted:
                if index == 0:
                    with silence():
                        (next_token_loss(model(half), half) / 2).backward()
                else:
                    (next_token_loss(model(half), half) / 2).backward()
            calls.append(counted.calls["all_reduce"])
        results.append((calls, gradients(model)))
    try:
        with replica.accumulating():
            raise KeyError
    except KeyError:
        with Counted() as counted:
            next_token_loss(replica(halves[0]), halves[0]).backward()
    return results, counted.calls["all_reduce"]


def test_accumulation_sends_once(two_ranks):
    model, batch = small(), some_batches()[0]
    next_token_loss(model(batch), batch).backward()
    for ((calls, ours), (_, ddp)), after in two_ranks.run(accumulated):
        assert calls == [0, 1] and after == 1
        assert far(ours, gradients(model)) < 1e-12 and far(ours, ddp) < 1e-12


class Branches(nn.Module):
    """Uses its layers only where told, so that others get no gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4)).double()
        self.layers[0].bias.requires_grad_(False)

    def forward(self, x, used):
        for index in used:
            x = self.layers[index](x)
        return x.square().mean()


USED = [(0, 1, 2), (0, 1, 3)]  # of the two ranks; and layer 2 or 3 is the first whose bucket leaves


def missing(group, used):
    rank, _ = place(group)
    results = []
    for wrap in (
        lambda m: data_parallel(m, group, bucket_bytes=8),
        lambda m: DistributedDataParallel(m, find_unused_parameters=True),
    ):
        model = wrap(Branches())
        for _ in range(2):  # the second adds to the first: nothing is zeroed in between
            model(torch.ones(2, 3).double() + rank, used[rank]).backward()
        grads = {n: p.grad for n, p in model.module.named_parameters()}
        results.append({n: g if g is None else g.clone() for n, g in grads.items()})
    return results


@pytest.mark.parametrize("used", [USED, [(0, 1, 2), (0, 1, 2)], [(0,), (3, 2, 1, 0)]])
def test_a_parameter_without_gradient_counts_as_zero_and_nobody_hangs(two_ranks, used):
    models = [Branches(), Branches()]
    for rank, model in enumerate(models):
        for _ in range(2):
            model(torch.ones(2, 3).double() + rank, used[rank]).backward()
    for ours, ddp in two_ranks.run(missing, used):
        for name, gradient in ours.items():
            if name == "layers.0.bias":
                assert gradient is None  # it is frozen
                continue
            parts = [model.get_parameter(name).grad for model in models]
            mean = sum(torch.zeros(()).double() if part is None else part for part in parts) / 2
            assert torch.allclose(gradient, mean.expand(gradient.shape), rtol=1e-12, atol=0)
            # DDP knows where nobody had one; ours gives zeros
            assert (ddp[name] is None) == all(part is None for part in parts)
            assert ddp[name] is None or torch.allclose(ddp[name], gradient, rtol=1e-12, atol=0)


def shares(group):
    _, ranks = place(group)
    batch = torch.arange(24).view(12, 2)
    rows = share(batch, group)
    uneven, weight = uneven_share(batch[:7], group)
    with pytest.raises(ValueError, match=f"7 rows do not divide over {ranks} ranks"):
        shared([batch[:7]], group)[0]
    with pytest.raises(ValueError, match=f"1 rows do not divide over {ranks} ranks"):
        share(batch[:1], group)
    with pytest.raises(ValueError, match=f"0 rows do not divide over {ranks} ranks"):
        share(batch[:0], group)
    with pytest.raises(ValueError, match=f"1 rows are fewer than {ranks} ranks"):
        uneven_share(batch[:1], group)
    return rows.tolist(), uneven.tolist(), weight


def test_shares_are_all_rows_once(four_ranks):
    rows, uneven, weights = zip(*four_ranks.run(shares), strict=True)
    assert rows[1] == [[2, 3], [10, 11], [18, 19]]
    assert sorted(chain(*rows)) == torch.arange(24).view(12, 2).tolist()
    assert sorted(chain(*uneven)) == torch.arange(14).view(7, 2).tolist()
    assert weights == (8 / 7, 8 / 7, 8 / 7, 4 / 7)


def uneven(group):
    results = []
    batches = some_batches(rows=7)
    for step in (
        uneven_step(group),
        lambda *args: plain_step(*args[:2], args[2][1 - _rank() :: 2]),
    ):
        replica = data_parallel(small(), group)
        losses = train(
            replica, batches, steps=STEPS, optimizer=OPTIMIZERS["sgd"](replica), step=step
        )
        results.append((losses, weights(replica)))
    return results


def _rank():
    return torch.distributed.get_rank()


def test_uneven_batches_need_weights(two_ranks):
    losses, ends = alone("sgd", plain_step, some_batches(rows=7))
    ranks = two_ranks.run(uneven)
    assert mean_losses([rank[0][0] for rank in ranks]) == pytest.approx(losses, rel=1e-12)
    assert mean_losses([rank[1][0] for rank in ranks]) != pytest.approx(losses, rel=1e-4)
    for (_, weighted), (_, unweighted) in ranks:
        assert far(weighted, ends) < 1e-12 and far(unweighted, ends) > 1e-4


def summed_step(model, optimizer, batch):
    """Wrong on purpose: the sum of the ranks' gradients."""
    loss = next_token_loss(model(batch), batch)
    loss.backward()
    for parameter in model.parameters():
        parameter.grad *= torch.distributed.get_world_size()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def broken(group):
    """Weights after some steps with something wrong on purpose."""
    results = {}
    rank, _ = place(group)

    def trained(name, model, batches, step=unclipped_step, optimizer="sgd"):
        update = OPTIMIZERS[optimizer](model)
        for batch in batches:
            step(model, update, batch)
        results[name] = weights(model), apart(model, group)

    rows = [share(batch, group) for batch in some_batches()]
    trained("no sampler", data_parallel(small(), group), [batch[::2] for batch in some_batches()])
    trained("sum", data_parallel(small(), group), rows, summed_step)
    trained("sum adam", data_parallel(small(), group), rows, summed_step, "adam")
    replica = data_parallel(small(), group)
    with torch.no_grad():  # as if each rank had drawn its own start and nobody had sent one
        replica.module.norm.weight += rank
    trained("seeds", replica, rows)
    return results


def test_what_is_broken_on_purpose_shows(two_ranks):
    half = alone("sgd", unclipped_step, [batch[::2] for batch in some_batches()])[1]
    twice = small()
    optimizer = torch.optim.SGD(twice.parameters(), lr=2 * 0.1)
    for batch in some_batches():
        unclipped_step(twice, optimizer, batch)
    whole, adam = alone("sgd", unclipped_step)[1], alone("adam", unclipped_step)[1]
    for rank in two_ranks.run(broken):
        assert far(rank["no sampler"][0], half) < 1e-12 < 1e-4 < far(half, whole)
        assert far(rank["sum"][0], weights(twice)) < 1e-12 < 1e-4 < far(weights(twice), whole)
        # Adam divides the factor away, but for its epsilon
        assert far(rank["sum adam"][0], adam) < 1e-3 < 1e-2 < far(adam, weights(small()))
        assert rank["seeds"][1] == pytest.approx(1, rel=0.1)
        assert rank["sum"][1] == rank["no sampler"][1] == 0


def refused(group):
    rank, _ = place(group)
    for size in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match=f"bucket_bytes is {size}"):
            data_parallel(small(), group, bucket_bytes=size)
    with pytest.raises(ValueError, match="0 parameters require a gradient"):
        data_parallel(small().requires_grad_(False), group)
    with pytest.raises(ValueError, match=r"ranks 0 and 1 differ: only one has .*4[89]"):
        data_parallel(small(hidden=48 + rank), group)
    replica = data_parallel(small(), group)
    next_token_loss(replica(some_batches()[0]), some_batches()[0]).backward()
    module, alive = replica.module, weakref.ref(replica)
    del replica
    gc.collect()
    with Counted() as counted:  # what is left is an ordinary model
        next_token_loss(module(some_batches()[0]), some_batches()[0]).backward()
    return module, alive() is None and not counted.calls


def test_bad_input_is_refused_and_a_module_travels(two_ranks):
    """And a replica that is no longer needed gives its memory back, hooks or not."""
    for module, forgotten in two_ranks.run(refused):
        assert far(weights(module), weights(small())) == 0 and forgotten
