"""Pure BF16 against torch.optim.AdamW, torchao's stochastic rounding, and counting by hand."""

import pytest
import torch

from companion.losses import next_token_loss
from companion.precision.formats import FORMATS
from companion.precision.pure import PureAdamW, pure, pure_adamw, pure_step, would_be_lost
from companion.tests.equalities import far, refusals, some_batches, unclipped_step, weights
from companion.tests.test_model import small
from companion.training import adamw, load_checkpoint, save_checkpoint, train


def one_step(weight, gradient, **options):
    """A weight of one value each after one update, and the optimizer."""
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = gradient.clone()
    optimizer = PureAdamW([parameter], **{"decay": 0.0} | options)
    optimizer.step()
    return parameter.detach(), optimizer


@pytest.mark.parametrize("stochastic", [False, True])
def test_in_fp64_it_is_torchs_adamw(stochastic):
    ours, theirs = small(), small()
    generator = torch.Generator().manual_seed(0)
    optimizer = pure_adamw(ours, 1e-2, stochastic=stochastic, generator=generator)
    found = train(ours, some_batches(), steps=5, optimizer=optimizer, progress=False)
    expected = train(theirs, some_batches(), steps=5, optimizer=adamw(theirs, 1e-2), progress=False)
    assert found == pytest.approx(expected, abs=1e-12)
    assert far(weights(ours), weights(theirs)) < 1e-12
    assert optimizer.lost_share == 0


def test_everything_is_stored_in_bf16():
    model = pure(small())
    optimizer = pure_adamw(model)
    train(model, some_batches(), steps=2, step=unclipped_step, optimizer=optimizer, progress=False)
    states = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    assert {t.dtype for t in [*model.state_dict().values(), *states]} == {torch.bfloat16}
    assert small().embedding.weight.dtype == torch.float64  # a copy


def test_a_step_on_fp32_copies_is_plain_but_for_the_rounded_gradients():
    ours, exact = pure(small()), small().float()
    for p, q in zip(ours.parameters(), exact.parameters(), strict=True):
        q.data.copy_(p.data)
    exact.cos, exact.sin = ours.cos.float(), ours.sin.float()
    tokens = some_batches()[0]
    loss = next_token_loss(exact(tokens), tokens)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(exact.parameters(), 1.0)

    class Keep(torch.optim.SGD):
        def step(self):
            self.seen = [p.grad.clone() for g in self.param_groups for p in g["params"]]

    keep = Keep(ours.parameters(), lr=1.0)
    assert pure_step(ours, keep, tokens) == loss.detach()
    for seen, parameter in zip(keep.seen, exact.parameters(), strict=True):
        assert seen.dtype == torch.bfloat16
        torch.testing.assert_close(seen.float(), parameter.grad, rtol=2**-6, atol=1e-30)


def test_one_rounded_update_is_the_fp32_update_cast():
    generator = torch.Generator().manual_seed(1)
    weight, gradient = (torch.randn(5_000, generator=generator).bfloat16() for _ in range(2))
    exact = torch.nn.Parameter(weight.float())
    exact.grad = gradient.float()
    torch.optim.AdamW([exact], lr=0.01, weight_decay=0.0).step()
    found, optimizer = one_step(weight, gradient, rate=0.01, betas=(0.9, 0.999))
    away = (found.float() - exact.detach().bfloat16().float()).abs()
    # the two FP32 updates differ in the last digit, which now and then decides a rounding
    assert (away <= FORMATS["BF16"].spacing(weight.float())).all()
    assert (away > 0).float().mean() < 1e-3
    assert optimizer.lost_share == (found == weight).double().mean().item() > 0


def test_updates_below_half_a_spacing_are_lost_and_counted():
    # Adam's first update is the rate, 0.001, whatever the gradient; half spacings at 0.25, 0.3,
    # 0.5 and 1 are 2^-10, 2^-10, 2^-9 and 2^-8: 0.00098, 0.00098, 0.00195, 0.0039
    weight = torch.tensor([0.25, 0.3, 0.5, 1.0]).bfloat16()
    found, optimizer = one_step(weight, -torch.ones(4).bfloat16(), rate=1e-3)
    assert (found == weight).tolist() == [False, False, True, True]
    assert optimizer.lost_share == 0.5
    predicted = would_be_lost(weight.float(), torch.full((4,), 1e-3))
    assert predicted.tolist() == [False, False, True, True]
    assert not would_be_lost(weight.float(), torch.zeros(4)).any()


def test_an_update_of_zero_is_not_lost():
    _, optimizer = one_step(torch.ones(4).bfloat16(), torch.zeros(4).bfloat16())
    assert optimizer.lost_share == 0


def test_stochastic_updates_are_right_on_average():
    numbers = 40_000
    weight, gradient = (torch.full((numbers,), value).bfloat16() for value in (1.0, -3.0))
    generator = torch.Generator().manual_seed(2)
    found, _ = one_step(weight, gradient, rate=1e-3, stochastic=True, generator=generator)
    assert found.unique().tolist() == [1.0, 1.0078125]
    spread = 0.0078125 * (0.128 * 0.872) ** 0.5 / numbers**0.5  # of the mean, chance 0.128
    assert abs(found.double().mean().item() - 1.001) < 4 * spread


def test_stochastic_states_are_right_on_average():
    gradient = torch.full((40_000,), 1.2345).bfloat16()  # 1.234375
    generator = torch.Generator().manual_seed(2)
    _, optimizer = one_step(gradient, gradient, stochastic=True, generator=generator)
    ((state),) = optimizer.state.values()
    for name, exact in (("mean", 0.1 * 1.234375), ("square", 0.05 * 1.234375**2)):
        values = state[name].double()
        assert len(values.unique()) == 2
        assert abs(values.mean().item() / exact - 1) < 4 * 2**-8 / 40_000**0.5


def test_stochastic_rounding_has_torchaos_chances():
    torchao = pytest.importorskip("torchao.optim.quant_utils")
    exact = torch.tensor([1.001, -0.3, 2.5e-5, 123.456])
    many = exact.repeat_interleave(20_000)
    torch.manual_seed(3)
    theirs = torchao._fp32_to_bf16_sr(many).float().view(4, -1)
    place = torch.empty_like(many, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(4)
    PureAdamW([place], stochastic=True, generator=generator)._store(place, many)
    ours = place.float().view(4, -1)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.unique(), other.unique())
        chances = [(row == mine.unique()[0]).float().mean().item() for row in (mine, other)]
        assert abs(chances[0] - chances[1]) < 4 * (0.5 / 20_000) ** 0.5


def test_the_same_generator_gives_the_same_training():
    def ends(seed):
        model = pure(small())
        generator = torch.Generator().manual_seed(seed)
        optimizer = pure_adamw(model, stochastic=True, generator=generator)
        return train(model, some_batches(), steps=3, optimizer=optimizer, progress=False)

    assert ends(0) == ends(0) != ends(1)


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path):
    whole, part, again = (pure(small()) for _ in range(3))
    train(whole, some_batches(), steps=4, optimizer=pure_adamw(whole), progress=False)
    optimizer, path = pure_adamw(part), tmp_path / "x.safetensors"
    train(part, some_batches(), steps=2, optimizer=optimizer, progress=False)
    save_checkpoint(path, part, optimizer, step=2)
    optimizer = pure_adamw(again)
    load_checkpoint(path, again, optimizer)
    train(again, some_batches(), steps=4, start=2, optimizer=optimizer, progress=False)
    assert far(weights(whole), weights(again)) == 0


def test_bad_input():
    one = [torch.nn.Parameter(torch.ones(2))]
    found = refusals(
        [
            lambda: PureAdamW(one, 0.0),
            lambda: PureAdamW(one, betas=(0.9, 1.0)),
            lambda: PureAdamW(one, epsilon=0.0),
            lambda: PureAdamW(one, decay=-0.1),
            lambda: pure(small(), torch.float32),
        ]
    )
    for message, word in zip(found, ("rate", "1.0", "epsilon", "-0.1", "float32"), strict=True):
        assert word in message
