"""Tensor parallelism against one process and torch's DTensor; bytes sent, held and kept counted."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from companion.cost import activation_bytes
from companion.decoding import cache_for, generate
from companion.kept import kept_bytes
from companion.losses import next_token_loss
from companion.model import LanguageModel, ModelConfig
from companion.parallel import regions
from companion.parallel.counting import Counted
from companion.parallel.cuts import joined, part_of
from companion.parallel.held import held
from companion.parallel.processes import place
from companion.parallel.replicas import apart, data_parallel, share
from companion.parallel.tensor_costs import (
    tensor_activation_bytes,
    tensor_bytes,
    tensor_collectives,
    tensor_held_bytes,
    tensor_seconds,
)
from companion.parallel.tensors import clip_gradients, gathered, tensor_parallel, tensor_step
from companion.parallel.traffic import Link
from companion.tests.equalities import OPTIMIZERS, far, gradients, weights
from companion.tests.test_model import small
from companion.training import train

STEPS = 4
GROUPED = {"vocab": 52, "heads": 8, "kv_heads": 4, "width": 32, "hidden": 48}
UNTIED = GROUPED | {"tied": False, "layers": 1}


def some_rows(steps=STEPS):
    """Batches of two rows of 8 tokens, from the whole vocabulary."""
    random = torch.Generator().manual_seed(5)
    return [torch.randint(52, (2, 8), generator=random) for _ in range(steps)]


def parts_of(model, tensors):
    """Whole tensors by the names of the LanguageModel."""
    return joined({name.removeprefix("module."): t for name, t in tensors.items()}, model.group)


def learned(group, sequence, changes):
    """What a cut model gives: logits, loss, gradients by both ways, and weights after training."""
    model, rows = small(**changes), some_rows()
    before = weights(model)
    cut = tensor_parallel(model, group, sequence=sequence)
    logits = cut(rows[0])
    next_token_loss(logits, rows[0]).backward()
    from_logits = parts_of(cut, gradients(cut))
    cut.zero_grad()
    loss = cut.loss(rows[0])
    loss.backward()
    found = {
        "logits": logits.detach(),
        "loss": loss.detach(),
        "from logits": from_logits,
        "gradients": parts_of(cut, gradients(cut)),
        "length": clip_gradients(cut, 0.5),
        "clipped": parts_of(cut, gradients(cut)),
    }
    for name in ("sgd", "adamw"):
        found[name] = trained(tensor_parallel(model, group, sequence=sequence), rows, name)
    found["untouched"] = far(before, weights(model)) == 0 and model.blocks[0].attention.heads == 8
    found["tied"] = cut.module.head.weight is cut.module.embedding.weight
    found["generated"] = None if sequence else generate(cut, rows[0][:, :5], 6)
    return found


def trained(cut, rows, name):
    """Losses, weights and logits after training, and how far the ranks' norms are apart."""
    optimizer = OPTIMIZERS[name](cut)
    losses = train(cut, rows, steps=STEPS, optimizer=optimizer, step=tensor_step, progress=False)
    norms = nn.ParameterList(p for n, p in cut.named_parameters() if "norm" in n)
    end = gathered(cut)
    return losses, weights(end), end(rows[0]).detach(), apart(norms, cut.group)


def expected(changes):
    """The same in one process."""
    model, rows = small(**changes), some_rows()
    logits = model(rows[0])
    loss = next_token_loss(logits, rows[0])
    loss.backward()
    whole = gradients(model)
    length = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    found = {"logits": logits.detach(), "loss": loss.detach(), "gradients": whole}
    found |= {"length": length, "clipped": gradients(model)}
    for name in ("sgd", "adamw"):
        other = small(**changes)
        optimizer = OPTIMIZERS[name](other)
        losses = train(other, rows, steps=STEPS, optimizer=optimizer, progress=False)
        found[name] = losses, weights(other), other(rows[0]).detach()
    found["generated"] = generate(model.eval(), rows[0][:, :5], 6)
    return found


CASES = [(2, False, GROUPED), (4, False, UNTIED), (2, True, UNTIED), (4, True, GROUPED)]


@pytest.mark.parametrize(("count", "sequence", "changes"), CASES)
def test_parts_equal_one_process(request, count, sequence, changes):
    ranks = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[count])
    alone = expected(changes)
    assert alone["length"] > 1  # so that the steps' clipping is really at work
    for found in ranks.run(learned, sequence, changes):
        assert (found["logits"] - alone["logits"]).abs().max() < 1e-12
        assert abs(found["loss"] - alone["loss"]) < 1e-12
        assert far(found["from logits"], alone["gradients"]) < 1e-12
        assert far(found["gradients"], alone["gradients"]) < 1e-12
        assert abs(found["length"] - alone["length"]) < 1e-12
        assert far(found["clipped"], alone["clipped"]) < 1e-12
        for name in ("sgd", "adamw"):
            losses, ends, logits, spread = found[name]
            assert losses == pytest.approx(alone[name][0], rel=1e-12)
            assert far(ends, alone[name][1]) < 1e-12
            assert (logits - alone[name][2]).abs().max() < 1e-12
            assert spread == 0  # the norms of all ranks, to the last bit
        assert found["untouched"] and found["tied"] == changes.get("tied", True)
        assert sequence or torch.equal(found["generated"], alone["generated"])


def torchs(model, group, sequence, prepared):
    """The same model cut by torch's `parallelize_module`.

    Where inputs are not `prepared`, each matrix is on its own in the backward pass.
    """
    shares = Shard(1) if sequence else Replicate()
    sums, columns = RowwiseParallel(output_layouts=shares), ColwiseParallel()
    plan = {"embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=shares)}
    plan["head"] = ColwiseParallel(input_layouts=shares, output_layouts=Replicate())
    plan |= {f"blocks.*.attention.{name}": columns for name in ("query", "key", "value")}
    plan |= {f"blocks.*.mlp.{name}": columns for name in ("gate", "up")}
    plan |= {f"blocks.*.{name}": sums for name in ("attention.out", "mlp.down")}
    if sequence:
        norms = ("norm", "blocks.*.attention_norm", "blocks.*.mlp_norm")
        plan |= {name: SequenceParallel() for name in norms}
    if prepared:
        plan["blocks.*.mlp"] = PrepareModuleInput(
            input_layouts=(shares,), desired_input_layouts=(Replicate(),)
        )
        rest = (None,) * 4
        plan["blocks.*.attention"] = PrepareModuleInput(
            input_layouts=(shares, *rest), desired_input_layouts=(Replicate(), *rest)
        )
    model = parallelize_module(model, DeviceMesh.from_group(group, "cpu"), plan)
    for block in model.blocks:
        block.attention.heads //= dist.get_world_size(group)
        block.attention.kv_heads //= dist.get_world_size(group)
    return model


NAMES = {"allreduce": "all_reduce", "allgather": "all_gather", "scatter": "reduce_scatter"}


def asked(mode):
    """Collectives by kind, from torch's own counter: ours and DTensor's go by different names."""
    kinds = [*NAMES.items(), *((kind, kind) for kind in NAMES.values())]
    found = {str(name): calls for name, calls in mode.get_comm_counts().items()}
    return {
        next(kind for text, kind in kinds if text in name): calls for name, calls in found.items()
    }


def one_pass(model, rows):
    """Logits, gradients, and the collectives of the forward and the backward pass."""
    with CommDebugMode() as forward:
        logits = model(rows)
    with CommDebugMode() as backward:
        next_token_loss(logits, rows).backward()
    slopes = gradients(model)
    if model.__class__ is LanguageModel:
        slopes = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in slopes.items()}
    else:
        slopes = parts_of(model, slopes)
    return logits.detach(), slopes, asked(forward), asked(backward)


def beside_torch(group):
    """Ours and torch's by (sequence, prepared)."""
    rows, found = some_rows()[0], {}
    for sequence, prepared in ((False, False), (False, True), (True, True)):
        model = small(**GROUPED, tied=False)
        ours = one_pass(tensor_parallel(model, group, sequence=sequence), rows)
        theirs = one_pass(torchs(model, group, sequence, prepared), rows)
        found[sequence, prepared] = ours, theirs
    return found


def test_parts_equal_those_of_torch(four_ranks):
    layers = 2
    for found in four_ranks.run(beside_torch):
        for (sequence, prepared), (ours, theirs) in found.items():
            assert (ours[0] - theirs[0]).abs().max() < 1e-12
            assert far(ours[1], theirs[1]) < 1e-12
            assert ours[2] == theirs[2]
            if sequence:  # torch leaves the norms' gradients apart until somebody asks for them
                assert ours[3].pop("all_reduce") == 2 * layers + 1
            if prepared:
                assert ours[3] == theirs[3]
            else:  # query, key, value, gate and up are each on their own
                assert ours[3] == {"all_reduce": 2 * layers + 1}
                assert theirs[3] == {"all_reduce": 5 * layers + 1}


def counts(group, sequence, changes):
    """Calls and bytes of one loss and its backward pass, of one step, and what is held and kept."""
    model, rows = small(**changes), some_rows()[0]
    cut = tensor_parallel(model, group, sequence=sequence)
    with Counted() as forward:
        loss = cut.loss(rows)
    with Counted() as backward:
        loss.backward()
    optimizer = OPTIMIZERS["adamw"](cut)
    with Counted() as clip:
        clip_gradients(cut)
    optimizer.step()
    kept = held(cut, optimizer)
    optimizer.zero_grad()
    with Counted() as step:
        tensor_step(cut, optimizer, rows)
    half = tensor_parallel(model.float(), group, sequence=sequence)
    activations = kept_bytes(half, lambda: half.loss(rows))
    passes = [dict(mode.calls) for mode in (forward, backward)]
    return passes, dict(clip.bytes), step.sent_bytes(place(group)[1]), kept, activations


def calls(table, *where):
    found = {}
    for row in table:
        if row.where in where:
            found[row.kind] = found.get(row.kind, 0) + row.calls
    return found


@pytest.mark.parametrize(("count", "sequence", "changes"), CASES)
def test_what_is_sent_held_and_kept_is_as_predicted(request, count, sequence, changes):
    ranks = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[count])
    config, options = small(**changes).config, {"rows": 2, "sequence": sequence}
    table = tensor_collectives(config, 16, bytes_per_number=8, **options)
    predicted = tensor_bytes(config, count, 16, bytes_per_number=8, **options)
    for passes, clip, sent, kept, activations in ranks.run(counts, sequence, changes):
        assert passes == [calls(table, "forward", "loss"), calls(table, "backward")]
        assert clip == {"all_reduce": 8}  # one number, which the prediction leaves out
        assert sent - 2 * (count - 1) / count * 8 == predicted
        assert kept == tensor_held_bytes(config, count, bytes_per_number=8)
        assert activations == tensor_activation_bytes(config, count, 8, batch=2, sequence=sequence)


def test_predictions_by_hand():
    config = small(**GROUPED).config  # 2 layers, width 32, 8 heads of 4, 4 key-value heads
    each = 2 * 3 / 4 * 16 * 32 * 4  # an all-reduce of 16 vectors in FP32 over four ranks
    loss = 3 * 2 * 3 / 4 * 14 * 4
    assert tensor_bytes(config, 4, 16, rows=2) == 10 * each + loss
    norms = 5 * 2 * 3 / 4 * 32 * 4
    assert tensor_bytes(config, 4, 16, rows=2, sequence=True) == 10 * each + loss + norms
    halves = tensor_bytes(config, 4, 16, rows=2, bytes_per_number=2)
    assert halves == 5 * each + loss  # the loss stays in FP32
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    size = 4 * ((2 * block + 52 * 32) // 4 + 5 * 32)
    held_by_four = {"weights": size, "gradients": size, "states": 2 * size}
    assert tensor_held_bytes(config, 4) == held_by_four
    assert tensor_held_bytes(config, 4, "sgd")["states"] == 0
    assert tensor_bytes(config, 1, 16, rows=2) == 0
    link = Link(1.0, 100.0)  # a second a message, 6 messages an all-reduce of four ranks
    took = 10 * 6 * (1 + 512 * 4 / 4 / 100) + 3 * 6 * (1 + 14 * 4 / 4 / 100)
    assert tensor_seconds(config, 4, 16, link, rows=2) == pytest.approx(took, rel=1e-12)
    shared = tensor_seconds(config, 4, 16, link, rows=2, sequence=True)
    assert shared == pytest.approx(took + 5 * 6 * (1 + 32 * 4 / 4 / 100), rel=1e-12)


def test_one_rank_keeps_what_one_process_does_and_more_keep_less():
    config = ModelConfig(
        vocab=1024, context=512, layers=6, heads=8, kv_heads=8, width=256, hidden=704
    )
    alone = activation_bytes(config, 512)
    assert tensor_activation_bytes(config, 1, 512) == pytest.approx(alone, rel=1e-3)
    plain, shared = (
        [tensor_activation_bytes(config, n, 512, sequence=s) for n in (1, 2, 4, 8)]
        for s in (False, True)
    )
    assert plain[0] == shared[0] and plain == sorted(plain, reverse=True)
    assert all(s < p for s, p in zip(shared[1:], plain[1:], strict=True))


def borders(group):
    """What each region makes of numbers that one can add up in one's head."""
    rank, found = dist.get_rank(group), {}
    passages = {
        "copy": lambda x: regions.copy(x, group),
        "reduce": lambda x: regions.reduce(x, group),
        "gather": lambda x: regions.gather(x, group, 1),
        "scatter": lambda x: regions.scatter(x, group, 1),
        "collect": lambda x: regions.collect(x, group, 1),
    }
    for name, passage in passages.items():
        x = torch.tensor([[1.0, 2.0]]) * (rank + 1)
        before = x.requires_grad_().clone()
        y = passage(x)
        slopes = torch.arange(1.0, y.numel() + 1).view_as(y) * (rank + 1)
        kept = slopes.clone()
        y.backward(slopes)
        assert torch.equal(x, before) and torch.equal(slopes, kept)  # nothing is done in place
        found[name] = y.tolist(), x.grad.tolist()
    return found


def test_regions_by_hand(two_ranks):
    first, second = two_ranks.run(borders)  # rank 0 has [1, 2], rank 1 has [2, 4]
    assert first["copy"] == ([[1, 2]], [[3, 6]]) and second["copy"] == ([[2, 4]], [[3, 6]])
    assert first["reduce"] == ([[3, 6]], [[1, 2]]) and second["reduce"] == ([[3, 6]], [[2, 4]])
    assert first["gather"] == ([[1, 2, 2, 4]], [[3, 6]])
    assert second["gather"] == ([[1, 2, 2, 4]], [[9, 12]])
    assert first["scatter"] == ([[3]], [[1, 2]]) and second["scatter"] == ([[6]], [[1, 2]])
    assert first["collect"] == ([[1, 2, 2, 4]], [[1, 2]])
    assert second["collect"] == ([[1, 2, 2, 4]], [[6, 8]])


def seeded(seed):
    """A model of this seed's weights, its norms included."""
    model = small(**GROUPED)  # which seeds, too
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def other_uses(group):
    """Ranks whose models differ; 2 x 2 ranks; a cache; rows and shapes that cannot be."""
    rank, _ = place(group)
    first, own = seeded(0), seeded(rank)
    assert rank == 0 or far(weights(own), weights(first)) > 1
    alike = far(weights(gathered(tensor_parallel(own, group))), weights(first))
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])]
    cut = tensor_parallel(small(**GROUPED), pairs[rank // 2])
    replica = data_parallel(cut, pairs[2 + rank % 2])
    rows = share(some_rows()[0], pairs[2 + rank % 2])
    next_token_loss(replica(rows), rows).backward()
    slopes = parts_of(replica.module, gradients(replica.module))
    cache = cache_for(cut, batch=2)
    cached = torch.cat([cut(part, cache) for part in some_rows()[0].split((5, 1, 2), 1)], 1)
    refused = {}
    for name, changes in REFUSED.items():
        with pytest.raises(ValueError) as error:
            tensor_parallel(small(**changes), group)
        refused[name] = str(error.value)
    with pytest.raises(ValueError) as error:
        tensor_parallel(small(**GROUPED), group, sequence=True).loss(some_rows()[0][:, :6])
    refused["positions"] = str(error.value)
    with pytest.raises(ValueError) as error:
        tensor_parallel(nn.Linear(4, 4), group)
    refused["model"] = str(error.value)
    other = small(**GROUPED)
    other.blocks[1].mlp.up = nn.Bilinear(1, 1, 1)
    with pytest.raises(ValueError) as error:
        tensor_parallel(other, group)
    refused["layer"] = str(error.value)
    return alike, slopes, cached.detach(), cache.keys.shape, refused


REFUSED = {
    "heads": {"heads": 6, "kv_heads": 2, "width": 24},
    "kv_heads": {"heads": 8, "kv_heads": 2, "vocab": 52},
    "hidden": GROUPED | {"hidden": 46},
    "vocab": GROUPED | {"vocab": 50},
}


def test_other_uses_and_refusals(four_ranks):
    alone = expected(GROUPED)
    for alike, slopes, cached, cache, refused in four_ranks.run(other_uses):
        assert alike == 0  # all ranks have rank 0's weights
        assert far(slopes, alone["gradients"]) < 1e-12  # two replicas of two parts each
        assert (cached - alone["logits"]).abs().max() < 1e-12
        assert cache == (2, 2, 2, 32, 4)  # layers, batch, key-value heads of a rank, context, D
        assert refused == {
            "heads": "heads 6 does not divide over 4 ranks; pad it to 8 with heads of zeros, or "
            "take fewer ranks",
            "kv_heads": "kv_heads 2 does not divide over 4 ranks; pad it to 4 with key-value "
            "heads once more, or take fewer ranks",
            "hidden": "hidden 46 does not divide over 4 ranks; pad it to 48 with neurons of "
            "zeros, or take fewer ranks",
            "vocab": "vocab 50 does not divide over 4 ranks; pad it to 52 with rows for tokens "
            "that never occur, or take fewer ranks",
            "positions": "6 positions do not divide over 4 ranks; pad them to 8, or leave "
            "`sequence` out",
            "model": "model is a Linear; a LanguageModel can be cut",
            "layer": "blocks.1.mlp.up is a Bilinear; only nn.Linear and nn.Embedding can be cut",
        }


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: tensor_bytes(small().config, 4, 16), "kv_heads 2 .* 4 ranks; pad it to 4"),
        (lambda: tensor_bytes(small().config, 2, 16, rows=3), "16 tokens do not divide into 3"),
        (
            lambda: tensor_bytes(small().config, 2, 9, sequence=True),
            "9 positions .* 2 ranks; pad .* 10",
        ),
        (lambda: tensor_bytes(small().config, 0, 16), "ranks is 0"),
        (lambda: tensor_held_bytes(small().config, 2, "lion"), "optimizer is 'lion'"),
        (lambda: tensor_held_bytes(small().config, 4), "kv_heads 2"),
        (lambda: tensor_activation_bytes(small().config, 4, 8), "kv_heads 2"),
        (lambda: part_of(small(hidden=45).config, 2), "hidden 45 .* 2 ranks; pad it to 46"),
    ],
)
def test_bad_shapes_are_refused_and_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()
