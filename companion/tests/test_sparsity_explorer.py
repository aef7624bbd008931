"""Bytes, nats and speed of each choice are those of models that are really so."""

import re
from dataclasses import replace

import pytest

from companion import cost
from companion.explorers.sparsity import (
    best,
    choices,
    sparsity_explorer,
    sparsity_figure,
)
from companion.model import ModelConfig

CONFIG = ModelConfig(vocab=50, context=32, layers=4, heads=4, kv_heads=2, width=32, hidden=40)
LOSSES = {0.0: [0.0] * 4, 0.5: [0.4, 0.1, 0.02, 0.03], 0.25: [0.1, 0.05, 0.01, 0.005]}


def test_a_choice_adds_up_by_hand():
    found = choices(CONFIG, LOSSES)
    assert len(found) == 81
    ours = found[0.25, 0.25, 0.0, 0.5]
    assert ours.nats == pytest.approx(0.1 + 0.05 + 0.0 + 0.03)
    gone = 10 + 10 + 0 + 20  # neurons of 3 x 32 numbers
    assert ours.megabytes * 1e6 == pytest.approx(4 * (cost.parameters(CONFIG) - gone * 96))
    assert ours.name == "25% 25% 0% 50%"
    whole = found[0.0, 0.0, 0.0, 0.0]
    assert whole.speed == 1 and whole.nats == 0
    assert ours.speed == pytest.approx(whole.megabytes / ours.megabytes)


def test_equal_shares_weigh_what_a_smaller_model_weighs():
    half = replace(CONFIG, hidden=20)
    for config, thin in ((CONFIG, half), *[(replace(c, tied=False) for c in (CONFIG, half))]):
        ours = choices(config, LOSSES)[0.5, 0.5, 0.5, 0.5]
        assert ours.megabytes * 1e6 == pytest.approx(cost.weight_bytes(thin))
        read, less = (4 * (c.layers * 2 + 1) * c.width + 4 * cost.matrix_parameters(c)
                      for c in (config, thin))  # fmt: skip
        assert ours.speed == pytest.approx(read / less)


def test_time_that_does_not_depend_on_bytes_stays():
    fast, slow = (choices(CONFIG, LOSSES, fixed=f)[0.5, 0.5, 0.5, 0.5].speed for f in (0.0, 0.5))
    assert 1 / slow == pytest.approx(0.5 + 0.5 / fast)


def test_the_best_are_beaten_by_none():
    found = choices(CONFIG, LOSSES)
    line = best(found)
    for choice in found.values():
        beaten = any(
            other.megabytes <= choice.megabytes and other.nats <= choice.nats and other != choice
            for other in found.values()
        )
        assert beaten != (choice in line)
    assert [c.megabytes for c in line] == sorted(c.megabytes for c in line)


def test_the_figure_shows_all_choices_the_best_and_one():
    figure = sparsity_figure(CONFIG, LOSSES, (0.0, 0.25, 0.5, 0.0))
    everything, line, one = figure.axes[0].lines
    found = choices(CONFIG, LOSSES)
    assert len(everything.get_xdata()) == 81 and len(line.get_xdata()) == len(best(found))
    ours = found[0.0, 0.25, 0.5, 0.0]
    assert (one.get_xdata()[0], one.get_ydata()[0]) == (ours.megabytes, ours.nats)
    assert str(ours) in figure.alt and "81 choices" in figure.alt
    assert figure._repr_html_().startswith("<img")


def test_the_explorer_follows_its_controls():
    explorer = sparsity_explorer(CONFIG, LOSSES)
    found = choices(CONFIG, LOSSES)
    assert (
        f"<b>{found[0.25, 0.25, 0.25, 0.25]}</b>" in explorer.result.value
    )  # the one in the middle
    for block, share in enumerate((0.5, 0.0, 0.0, 0.0)):
        explorer.controls[f"block_{block}"].value = share
    text = explorer.result.value
    assert f"<b>{found[0.5, 0.0, 0.0, 0.0]}</b>" in text
    hint = re.search(r"predicted to lose least: (.*?)</p>", text).group(1)
    better = next(choice for choice in found.values() if str(choice) == hint)
    assert better.megabytes <= found[0.5, 0.0, 0.0, 0.0].megabytes and better.nats < 0.4
    explorer.controls["block_0"].value = 0.0
    assert "no choice of this size or smaller" in explorer.result.value
    assert sparsity_figure(CONFIG, LOSSES, (0.0,) * 4)._repr_html_() in explorer.result.value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": {}}, "losses holds 0 shares"),
        ({"losses": {1.0: [0.0] * 4}}, "share 1.0 is not from 0 to below 1"),
        ({"losses": {0.5: [0.0] * 3}}, "4 finite numbers, one for each block"),
        ({"losses": {0.5: [float("nan")] * 4}}, "4 finite numbers"),
        ({"shares": (0.3, 0.0, 0.0, 0.0)}, r"share is 0.3; known are: 0.0, 0.25, 0.5"),
        ({"shares": (0.5, 0.5)}, "2 shares given; 4, one a block"),
        ({"fixed": 1.0}, "fixed is 1.0"),
        (
            {"config": replace(CONFIG, layers=12), "losses": {s: [0.0] * 12 for s in LOSSES}},
            "531441 choices, 3 shares in 12 blocks; at most 10000",
        ),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        sparsity_figure(**{"config": CONFIG, "losses": LOSSES} | change)
