"""Predicted costs against counted ones: every count comes from torch, none from a formula."""

from dataclasses import replace
from math import inf, nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from companion import cost, roofline
from companion.kept import kept_bytes
from companion.losses import next_token_loss
from companion.model import LanguageModel, ModelConfig

SMOLLM2 = ModelConfig(
    vocab=49152,
    context=2048,
    layers=30,
    heads=9,
    kv_heads=3,
    width=576,
    hidden=1536,
    rotary_base=100_000.0,
)
SMALL = ModelConfig(vocab=50, context=64, layers=2, heads=4, kv_heads=2, width=24, hidden=40)
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


@some.composite
def configs(draw):
    """Any small shape: tied or not, grouped or not, widths up to 64."""
    whole = lambda low, high: draw(some.integers(low, high))  # noqa: E731
    kv_heads = whole(1, 3)
    heads = kv_heads * whole(1, 3)
    head_width = 2 * whole(1, max(1, 32 // heads))
    return ModelConfig(
        vocab=whole(1, 70),
        context=32,
        layers=whole(1, 3),
        heads=heads,
        kv_heads=kv_heads,
        width=heads * head_width,
        hidden=whole(1, 64),
        tied=draw(some.booleans()),
    )


shapes = some.tuples(some.integers(1, 4), some.integers(2, 24))  # batch, positions
trials = settings(max_examples=15, deadline=None)


class ListCache:
    """The slow, obvious key-value cache: one list of tensors a layer."""

    def __init__(self, layers):
        self.length, self.kept = 0, [[] for _ in range(layers)]

    def extend(self, layer, key, value):
        self.kept[layer].append((key, value))
        keys, values = zip(*self.kept[layer], strict=True)
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def advance(self, positions):
        self.length += positions


def on_meta(config):
    with torch.device("meta"):
        return LanguageModel(config)


def some_tokens(config, batch, positions):
    return torch.randint(config.vocab, (batch, positions))


def stored(tensors):
    """Bytes of the distinct storages of some tensors."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def counted_flops(function):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def saved_bytes(model, tokens, attention):
    """Bytes of the distinct storages that autograd keeps, without the model's own."""
    with sdpa_kernel(BACKENDS[attention]):
        return kept_bytes(model, lambda: next_token_loss(model(tokens), tokens))


def test_smollm2_shape():
    model, tokens = on_meta(SMOLLM2), torch.zeros(1, 128, dtype=torch.int64, device="meta")
    assert cost.parameters(SMOLLM2) == 134_515_008
    assert cost.parameters(SMOLLM2) == sum(p.numel() for p in model.parameters())
    assert cost.weight_bytes(SMOLLM2) == 4 * 134_515_008
    assert cost.forward_flops(SMOLLM2, 128) == counted_flops(lambda: model(tokens))
    training = counted_flops(lambda: next_token_loss(model(tokens), tokens).backward())
    assert cost.training_flops(SMOLLM2, 128) == training


def test_published_parameter_counts():
    """Llama 3.2 1B: rasbt/LLMs-from-scratch issue 822. Llama 3.1 8B: its safetensors' header."""
    llama = dict(vocab=128_256, context=131_072, kv_heads=8, heads=32)
    one = ModelConfig(**llama, layers=16, width=2048, hidden=8192)
    assert cost.parameters(one) == 1_235_814_400
    assert cost.parameters(replace(one, tied=False)) == 1_498_482_688
    eight = ModelConfig(**llama, layers=32, width=4096, hidden=14_336, tied=False)
    assert cost.parameters(eight) == 8_030_261_248


@trials
@given(configs())
def test_bytes_of_weights_gradients_and_optimizer_are_exact(config):
    tokens = some_tokens(config, 2, 5)
    for name, expected in cost.OPTIMIZERS.items():
        model = LanguageModel(config)
        assert cost.parameters(config) == sum(p.numel() for p in model.parameters())
        assert cost.weight_bytes(config) == stored(model.parameters())
        next_token_loss(model(tokens), tokens).backward()
        assert cost.gradient_bytes(config) == stored(p.grad for p in model.parameters())
        optimizer = make_optimizer(name, model)
        optimizer.step()
        states = [state for state in optimizer.state.values() for state in state.items()]
        averages = [value for key, value in states if key != "step" and value is not None]
        steps = [value for key, value in states if key == "step"]
        assert cost.optimizer_bytes(config, name) == stored(averages)
        tensors = 9 * config.layers + (2 if config.tied else 3)
        assert stored(steps) == (4 * tensors if expected == 2 else 0)


def make_optimizer(name, model):
    make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.get(name)
    if make is not None:
        return make(model.parameters())
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9 if name == "momentum" else 0)


def test_bytes_per_number():
    model = LanguageModel(SMALL).to(torch.bfloat16)
    assert cost.weight_bytes(SMALL, 2) == stored(model.parameters())
    assert cost.weight_bytes(SMALL, 0.5) == cost.weight_bytes(SMALL) // 8


@trials
@given(configs(), shapes)
def test_flops_are_exact(config, shape):
    batch, positions = shape
    model, tokens = LanguageModel(config), some_tokens(config, batch, positions)
    forward = cost.forward_flops(config, positions, batch=batch)
    assert forward == counted_flops(lambda: model(tokens))
    training = counted_flops(lambda: next_token_loss(model(tokens), tokens).backward())
    assert cost.training_flops(config, positions, batch=batch) == training


@trials
@given(configs(), shapes, some.integers(1, 8))
def test_flops_and_bytes_with_a_cache_are_exact(config, shape, new):
    batch, past = shape
    model, cache = LanguageModel(config), ListCache(config.layers)
    model(some_tokens(config, batch, past), cache)
    tokens = some_tokens(config, batch, new)
    predicted = cost.forward_flops(config, new, batch=batch, past=past)
    assert predicted == counted_flops(lambda: model(tokens, cache))
    kept = [tensor for layer in cache.kept for pair in layer for tensor in pair]
    assert cost.cache_bytes(config, past + new, batch=batch) == sum(t.nbytes for t in kept)
    if new == 1:
        assert cost.decode_flops(config, past, batch=batch) == predicted


def test_causal_attention_counts_the_pairs_that_count():
    new, past = 7, 5
    seen = torch.ones(new, past + new).tril(past).sum().item()
    full = cost.attention_flops(SMALL, new, batch=3, past=past)
    half = cost.causal_attention_flops(SMALL, new, batch=3, past=past)
    assert half * new * (past + new) == full * seen
    assert cost.causal_attention_flops(SMALL, 1, past=past) == cost.attention_flops(
        SMALL, 1, past=past
    )


@trials
@given(configs(), shapes)
def test_activation_bytes_are_exact(config, shape):
    batch, positions = shape
    model, tokens = LanguageModel(config), some_tokens(config, batch, positions)
    for attention in cost.ATTENTIONS:
        predicted = cost.activation_bytes(config, positions, batch=batch, attention=attention)
        assert predicted == saved_bytes(model, tokens, attention)
    halves = cost.activation_bytes(config, positions, batch=batch, bytes_per_number=2)
    assert halves == saved_bytes(model.to(torch.bfloat16), tokens, "flash")


@pytest.mark.parametrize("attention", cost.ATTENTIONS)
def test_activation_bytes_of_a_longer_wider_model(attention):
    config = ModelConfig(
        vocab=1000, context=512, layers=2, heads=4, kv_heads=1, width=256, hidden=512
    )
    tokens = some_tokens(config, 2, 300)
    predicted = cost.activation_bytes(config, 300, batch=2, attention=attention)
    assert predicted == saved_bytes(LanguageModel(config), tokens, attention)


def test_rule_of_six_misses_attention_and_norms():
    positions, batch = 128, 4
    tokens = positions * batch
    exact = cost.training_flops(SMOLLM2, positions, batch=batch)
    norms = (2 * SMOLLM2.layers + 1) * SMOLLM2.width
    attention = 12 * SMOLLM2.layers * positions * SMOLLM2.width
    assert exact - cost.rule_of_six(SMOLLM2, tokens) == tokens * (attention - 6 * norms)


def test_a_decoding_step_moves_weights_and_cache():
    model, past = LanguageModel(SMALL), 9
    kept = 2 * SMALL.layers * torch.zeros(3, SMALL.kv_heads, past + 1, SMALL.head_width).nbytes
    moved = roofline.moved_bytes(SMALL, past, batch=3)
    assert moved == stored(model.parameters()) + kept
    untied = LanguageModel(replace(SMALL, tied=False))
    rest = stored(p for name, p in untied.named_parameters() if name != "embedding.weight")
    rows = untied.embedding.weight[:3].contiguous().numel() * 4
    assert roofline.moved_bytes(untied.config, past, batch=3) == rest + rows + kept
    full = roofline.moved_bytes(untied.config, 0, positions=60)  # more positions than rows
    assert full == stored(untied.parameters()) + cost.cache_bytes(SMALL, 60)


def test_training_moves_each_thing_as_often_as_said():
    bare = roofline.training_moved_bytes(SMALL, 8, optimizer="sgd")
    adamw = roofline.training_moved_bytes(SMALL, 8, optimizer="adamw")
    weights, activations = cost.weight_bytes(SMALL), cost.activation_bytes(SMALL, 8)
    assert adamw - bare == 4 * weights  # two averages, read and written
    assert bare == 6 * weights + 2 * activations


def test_roofline_takes_the_longer_wait():
    flops, moved = 8e9, 2e9
    assert roofline.intensity(flops, moved) == 4
    machine = roofline.Device(name="toy", flops={"float32": 1e11, "bfloat16": 4e11}, bandwidth=1e10)
    assert roofline.ridge(machine) == 10 and roofline.ridge(machine, "bfloat16") == 40
    slow_memory = roofline.roofline_seconds(flops, moved, 1e11, 1e10)
    slow_arithmetic = roofline.roofline_seconds(flops, moved, 1e9, 1e10)
    assert slow_memory == pytest.approx(0.2) and slow_arithmetic == pytest.approx(8)
    assert roofline.ceiling(4, 1e11, 1e10) == pytest.approx(4e10)
    assert roofline.ceiling(40, 1e11, 1e10) == 1e11


def test_defaults_are_one_sequence_and_an_empty_cache():
    one = {"batch": 1, "past": 0}
    for flops in (cost.attention_flops, cost.causal_attention_flops, cost.forward_flops):
        assert flops(SMALL, 7) == flops(SMALL, 7, **one)
    for function in (cost.training_flops, cost.decode_flops, cost.cache_bytes):
        assert function(SMALL, 7) == function(SMALL, 7, batch=1)


def test_the_edges_of_what_is_possible_are_possible():
    assert cost.cache_bytes(SMALL, SMALL.context) == SMALL.context * cost.cache_bytes(SMALL, 1)
    assert cost.decode_flops(SMALL, SMALL.context - 1) > 0
    slow = roofline.Device(name="slow", flops={"float32": 0.5}, bandwidth=0.25, memory=0.5)
    assert roofline.ridge(slow) == 2
    assert roofline.roofline_seconds(0.5, 0.5, 0.5, 0.25) == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda: cost.cache_bytes(SMALL, 0),
        lambda: cost.cache_bytes(SMALL, 65),
        lambda: cost.cache_bytes(SMALL, 4.0),
        lambda: cost.cache_bytes(SMALL, 4, batch=0),
        lambda: cost.forward_flops(SMALL, 60, past=5),
        lambda: cost.forward_flops(SMALL, 6, past=-1),
        lambda: cost.forward_flops(SMALL, True),
        lambda: cost.decode_flops(SMALL, 64),
        lambda: cost.training_flops(SMALL, 1),
        lambda: cost.activation_bytes(SMALL, 1),
        lambda: cost.activation_bytes(SMALL, 8, attention="paged"),
        lambda: cost.activation_bytes(SMALL, 8, bytes_per_number=1),
        lambda: cost.activation_bytes(SMALL, 8, bytes_per_number=2, attention="math"),
        lambda: cost.optimizer_bytes(SMALL, "lion"),
        lambda: cost.weight_bytes(SMALL, 0),
        lambda: cost.weight_bytes(SMALL, nan),
        lambda: cost.rule_of_six(SMALL, 0),
        lambda: roofline.moved_bytes(SMALL, -1, positions=2),
        lambda: roofline.moved_bytes(SMALL, 64),
        lambda: roofline.roofline_seconds(1e9, 1e9, inf, 1e9),
        lambda: roofline.roofline_seconds(1e9, 1e9, 1e9, 0),
        lambda: roofline.roofline_seconds(nan, 1e9, 1e9, 1e9),
        lambda: roofline.intensity(1e9, 0),
        lambda: roofline.Device(name="none", flops={}, bandwidth=1e9),
        lambda: roofline.Device(name="none", flops={"float32": nan}, bandwidth=1e9),
        lambda: roofline.Device(name="none", flops={"float32": 1e9}, bandwidth=1e9, memory=0),
        lambda: roofline.ridge(roofline.Device(name="1", flops={"float64": 1e9}, bandwidth=1e9)),
    ],
)
def test_impossible_input_is_refused(call):
    with pytest.raises(ValueError) as problem:
        call()
    assert problem.traceback[-1].name == "require"  # ours, not one that torch ran into


def test_work_is_its_counts_on_a_machine():
    machine = roofline.Device(name="m", flops={"float32": 100.0}, bandwidth=10.0)
    small, large = roofline.Work(20, 10), roofline.Work(2000, 10)
    assert (small.intensity, small.waits_for(machine), small.seconds(machine)) == (2, "memory", 1)
    assert (large.waits_for(machine), large.seconds(machine)) == ("arithmetic", 20)
    assert roofline.Work(100, 10).waits_for(machine) == "arithmetic"  # at the ridge
    with pytest.raises(ValueError, match="float16"):
        small.seconds(machine, "float16")
    with pytest.raises(ValueError, match="moved is 0"):
        roofline.Work(1, 0).seconds(machine)


def test_work_of_reading_and_training_is_made_of_the_counts():
    config = ModelConfig(
        vocab=50, context=32, layers=2, heads=4, kv_heads=2, width=32, hidden=48, tied=False
    )
    work = roofline.reading_work(config, 3, past=4, batch=2, bytes_per_number=2)
    assert work.flops == cost.forward_flops(config, 3, past=4, batch=2)
    moved = roofline.moved_bytes(config, 4, positions=3, batch=2, bytes_per_number=2)
    assert work.moved == moved
    step = roofline.training_work(config, 5, batch=2, optimizer="sgd", bytes_per_number=2)
    assert step.flops == cost.training_flops(config, 5, batch=2)
    options = {"batch": 2, "optimizer": "sgd", "bytes_per_number": 2}
    assert step.moved == roofline.training_moved_bytes(config, 5, **options)
