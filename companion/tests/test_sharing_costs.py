"""What sharing saves: every formula against a count."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from companion import cost
from companion.kept import kept_bytes
from companion.losses import next_token_loss
from companion.memory import storage_bytes, stored_bytes, unique_parameters
from companion.model import LanguageModel, ModelConfig
from companion.sharing import average, costs, cycle, learned, lora, share
from companion.training import adamw

SHAPE = {"vocab": 61, "context": 32, "heads": 4, "kv_heads": 4, "width": 32, "hidden": 40}
CONFIG = ModelConfig(**SHAPE, layers=4, tied=False)
BATCH, POSITIONS = 2, 9

SHARINGS = {
    "none": {},
    "tied": {"tied": True},
    "repeat": {"layers": 2},
    "cycle": {"layers": 2, "order": cycle, "take": average},
    "one block": {"layers": 1},
    "grouped": {"kv_heads": 2},
    "one head": {"kv_heads": 1},
    "factors": {"inner": 5},
    "wide factors": {"inner": 20},  # 20 (32 + 32) is above 32 x 32: nothing saved
    "all": {"tied": True, "layers": 2, "kv_heads": 1, "inner": 3},
}
every_sharing = pytest.mark.parametrize("name", SHARINGS)


def model_of(name):
    torch.manual_seed(0)
    options = SHARINGS[name]
    return share(LanguageModel(CONFIG), **options) if options else LanguageModel(CONFIG)


def tokens():
    return torch.randint(61, (BATCH, POSITIONS), generator=torch.Generator().manual_seed(0))


def picked(name, *options):
    return {key: value for key, value in SHARINGS[name].items() if key in options}


def counted_flops(model):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens())
    return counter.get_total_flops()


def loss(model):
    return next_token_loss(model(tokens()), tokens())


@every_sharing
def test_parameters_count_once(name):
    model = model_of(name)
    expected = costs.parameters(model.config, **picked(name, "layers", "inner"))
    assert unique_parameters(model) == expected
    assert stored_bytes(model) == 4 * expected
    assert (expected < cost.parameters(CONFIG)) == (name not in ("none", "wide factors"))


@every_sharing
def test_flops_follow_uses_not_parameters(name):
    model = model_of(name)
    how = {"batch": BATCH, **picked(name, "inner")}
    assert counted_flops(model) == costs.forward_flops(model.config, POSITIONS, **how)
    if name in ("tied", "repeat", "cycle", "one block"):
        assert counted_flops(model) == cost.forward_flops(CONFIG, POSITIONS, batch=BATCH)


@every_sharing
def test_saved_activations_follow_uses_too(name):
    model = model_of(name)
    how = {"batch": BATCH, **picked(name, "inner")}
    kept = kept_bytes(model, lambda: loss(model))
    assert kept == costs.activation_bytes(model.config, POSITIONS, **how)


@every_sharing
def test_gradients_and_states_follow_parameters(name):
    model = model_of(name)
    optimizer = adamw(model)
    loss(model).backward()
    optimizer.step()
    states = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    how = picked(name, "layers", "inner")
    assert storage_bytes(states) == costs.optimizer_bytes(model.config, "adamw", **how)
    gradients = storage_bytes(p.grad for p in model.parameters())
    assert 2 * gradients == storage_bytes(states)
    assert costs.optimizer_bytes(model.config, "sgd", **how) == 0


def test_some_matrices_alone():
    torch.manual_seed(0)
    model = share(LanguageModel(CONFIG), inner=6, where=lambda name, _: name[9:] in costs.MLP)
    how = {"inner": 6, "factors": costs.MLP}
    assert unique_parameters(model) == costs.parameters(CONFIG, **how)
    assert counted_flops(model) == costs.forward_flops(CONFIG, POSITIONS, batch=BATCH, **how)
    kept = kept_bytes(model, lambda: loss(model))
    assert kept == costs.activation_bytes(CONFIG, POSITIONS, batch=BATCH, **how)


@pytest.mark.parametrize("layers", [4, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_lora_in_numbers(layers, tied):
    torch.manual_seed(0)
    base = share(LanguageModel(CONFIG), layers=layers, tied=tied) if layers < 4 or tied else None
    base = base or LanguageModel(CONFIG)
    model = lora(base, 5)
    own = sum(p.numel() for p in learned(model))
    assert own == costs.lora_parameters(CONFIG, 5, layers=layers)
    assert unique_parameters(model) == unique_parameters(base) + own
    for rows, positions in ((BATCH, POSITIONS), (1, POSITIONS), (BATCH, 2), (3, 3)):
        ids = tokens().repeat(2, 1)[:rows, :positions].clone()
        kept = kept_bytes(model, lambda ids=ids: next_token_loss(model(ids), ids))
        assert kept == costs.lora_activation_bytes(base.config, positions, 5, batch=rows)


def test_what_no_model_has_is_refused():
    with pytest.raises(ValueError, match="inner width 33 is above 32"):
        costs.parameters(CONFIG, inner=33)
    with pytest.raises(ValueError, match="inner width 33 is above 32"):
        costs.lora_parameters(CONFIG, 33)
    with pytest.raises(ValueError, match="layers is 0"):
        costs.parameters(CONFIG, layers=0)
    with pytest.raises(ValueError, match=r"matrix is 'up'; known are: attention.query"):
        costs.forward_flops(CONFIG, 4, inner=2, factors=("up",))
    with pytest.raises(ValueError, match="optimizer is 'lion'; known are: sgd"):
        costs.optimizer_bytes(CONFIG, "lion")
