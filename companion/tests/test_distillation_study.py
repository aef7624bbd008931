"""Every setting of the study runs, judges by what it says, and looks early at the same training."""

import pytest
import torch

from companion.data import documents, passage
from companion.distillation import new_student
from companion.losses import token_divergences
from companion.model import LanguageModel, ModelConfig
from companion.quality import judge
from companion.studies import distillation as study
from companion.studies import size
from companion.tokenization import train_tokenizer

TINIER = {"layers": 1, "heads": 2, "kv_heads": 1, "width": 16, "hidden": 24}
CACHED = ("_teacher", "_written", "_guide", "_read", "_stored", "_text", "_judge_of_students")
STEPS = {study.LONG: 5, study.SHORT: 4, study.FEW: 3}


@pytest.fixture
def quick(monkeypatch):
    """The study cut down: little text, few steps, a small untrained teacher."""
    text = "\n\n".join(list(documents("prose", "train").values())[:8])
    tokenizer = train_tokenizer([text], 300)
    config = ModelConfig(vocab=300, context=64, **TINIER | {"layers": 2, "width": 32})
    torch.manual_seed(0)
    teacher = LanguageModel(config).eval()
    sizes = {"SHORT": 4, "OWN": 1, "WARMUP": 1, "EARLY": 2, "LABELLED": 3, "PROMPT": 4, "NEW": 8}
    values = {
        "SHAPES": {"quarter": TINIER, "tenth": TINIER},
        **{"TEXTS": 12, "KEPT": 4, "JUDGED": 600, "GLANCE": 300, **sizes},
        "tiny": lambda: teacher,
        "validation": lambda _, kind, characters: passage(text[:characters], tokenizer, window=31),
    }
    for module in (study, size):
        monkeypatch.setattr(module, "training_text", lambda: text)
        monkeypatch.setattr(module, "tiny_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(size, "CONTEXT", 32)
    for name, value in values.items():
        monkeypatch.setattr(study, name, value)
    forget()
    yield teacher
    forget()


def forget():
    """Empty what the study keeps from one point to the next."""
    for name in CACHED:
        getattr(study, name).cache_clear()


@pytest.mark.parametrize("name", study.STUDY.settings)
def test_each_setting_runs_and_its_early_look_is_the_same_training(quick, name):
    setting = study.STUDY.settings[name]
    setting = setting | {"steps": STEPS.get(setting["steps"], 6)}
    before, random = {k: v.clone() for k, v in quick.state_dict().items()}, torch.get_rng_state()
    results = study.run(seed=1, **setting)
    assert study.early(seed=1, **setting) == {"early source": results["early source"]}
    assert results["source"] != results["early source"] and results["seconds"] > 0
    ahead = setting.get("text") in ("written", "read")
    assert (results["teacher seconds"] > 0) == ahead
    assert all(torch.equal(before[k], v) for k, v in quick.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_runs_depend_on_their_seed_alone(quick):
    setting = study.STUDY.settings["few labels, teacher's text"] | {"steps": 4}
    one, other, again = (study.run(seed=seed, **setting) for seed in (1, 2, 1))
    timed = {"seconds", "teacher seconds"}
    assert all(one[k] == again[k] for k in one.keys() - timed)
    assert one["source"] != other["source"] and one["teacher"] == other["teacher"]


def test_a_student_is_judged_against_the_teacher(quick):
    student = new_student(quick, TINIER, seed=3)
    found, text = study._judged(student), study._text(study.JUDGED)
    expected = judge(text, {"teacher": quick, "student": student})
    assert found["source"] == pytest.approx(expected["student"].bits_per_byte().estimate)
    assert found["teacher"] == pytest.approx(expected["teacher"].bits_per_byte().estimate)
    divergences = [
        token_divergences(student(tokens), quick(tokens))[:, :-1].flatten()
        for tokens in text.batches(1)
    ]
    assert found["divergence"] == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-4)
    assert study._judged(quick)["own divergence"] == pytest.approx(0, abs=1e-6)
    assert found["own divergence"] > 0.01
