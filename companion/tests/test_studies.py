"""Studies resume, refuse to clash, notice changed code, and their records are whole or refused."""

import importlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from companion.checks import require
from companion.cost import parameters
from companion.data import documents
from companion.model import ModelConfig
from companion.studies import Study, __main__, find_study, load, run_study, size, study_names
from companion.studies.recording import Agreement
from companion.studies.running import AnotherStudyRuns, DeviceIsMissing
from companion.studies.study import FOLDER
from companion.tokenization import train_tokenizer

FAKE = """
from pathlib import Path

from companion.studies import Study

LOG = Path(__file__).with_name("log")
OFFSET = 10


def point(*, seed, factor):
    with LOG.open("a") as log:
        log.write(f"{factor}/{seed}\\n")
    if LOG.with_name("stop").exists() and (factor, seed) == (2, 1):
        HALT
    return {"value": OFFSET + factor * seed, "curve": [seed, factor]}


STUDY = Study(
    title="A quick one",
    point=point,
    settings={"once": {"factor": 1}, "twice": {"factor": 2}},
    seeds=(0, 1, 2),
)
"""
ALL = ["1/0", "2/0", "1/1", "2/1", "1/2", "2/2"]


class Fake:
    """A study in a folder of its own, which writes down the points it runs."""

    def __init__(self, folder):
        self.folder, self.scratch = folder, folder / "scratch"
        self.path = folder / "fake_study.py"
        self.record = folder / "fake_study.json"
        self.write()

    def write(self, old="", new="", halt="raise KeyboardInterrupt"):
        assert old in FAKE
        self.path.write_text(FAKE.replace("HALT", halt).replace(old, new))

    @property
    def study(self):
        sys.modules.pop("fake_study", None)
        importlib.invalidate_caches()
        return importlib.import_module("fake_study").STUDY

    def run(self, **options):
        options = {"folder": self.folder, "scratch": self.scratch, "progress": False} | options
        return run_study(self.study, **options)

    def load(self):
        return load(self.study, self.folder)

    def interrupt(self, at=None):
        """From now on the fourth point ends the run; `at=None`: no longer."""
        (self.folder / "stop").write_text("") if at else (self.folder / "stop").unlink()

    def log(self):
        """The points run since the last look."""
        log = self.folder / "log"
        lines = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # sources change within one second
    yield Fake(tmp_path)
    sys.modules.pop("fake_study", None)


# --- running and resuming -----------------------------------------------------------------------


def test_a_study_runs_once_and_is_recorded(fake):
    recorded = fake.run()
    assert fake.log() == ALL
    assert recorded == fake.load() and not recorded.stale
    assert recorded.values("twice", "value") == [10, 12, 14]
    assert recorded.values("twice", "curve") == [[0, 2], [1, 2], [2, 2]]
    assert recorded.settings == {"once": {"factor": 1}, "twice": {"factor": 2}}
    assert recorded.seconds == sum(point.seconds for point in recorded.points)
    assert fake.run() == recorded and fake.log() == []  # up to date: nothing runs
    fake.run(again=True)
    assert fake.log() == ALL


def test_a_list_can_be_pooled_over_its_entries_and_seeds(fake):
    recorded = fake.run()
    found = recorded.pooled("twice", "curve")  # [0, 2], [1, 2], [2, 2]
    assert found.estimate == 1.5
    reach = 2.5706 * statistics.stdev([0, 2, 1, 2, 2, 2]) / 6**0.5  # Student, 5 degrees
    assert found.high - found.estimate == pytest.approx(reach, rel=1e-3)
    with pytest.raises(ValueError, match="value of twice is one number a seed"):
        recorded.pooled("twice", "value")
    with pytest.raises(ValueError, match="curve of twice is a list a seed; ask for it pooled"):
        recorded.interval("twice", "curve")  # once its entries counted as seeds


def test_ctrl_c_costs_the_running_point_only(fake):
    fake.interrupt(at="fourth")
    with pytest.raises(KeyboardInterrupt):
        fake.run()
    assert fake.log() == ALL[:4]
    assert not fake.record.exists()
    fake.interrupt()
    recorded = fake.run()
    assert fake.log() == ALL[3:]
    assert recorded.values("twice", "value") == [10, 12, 14]
    assert [path.name for path in fake.scratch.iterdir()] == ["lock"]


def test_an_interrupted_rerun_leaves_the_old_record(fake):
    before = fake.run()
    fake.interrupt(at="fourth")
    with pytest.raises(KeyboardInterrupt):
        fake.run(again=True)
    assert fake.load() == before


def test_a_killed_run_keeps_its_points(fake):
    fake.write(halt="__import__('time').sleep(60)")
    fake.interrupt(at="fourth")
    code = (
        "import fake_study; from companion.studies import run_study;"
        f"run_study(fake_study.STUDY, folder={str(fake.folder)!r}, scratch={str(fake.scratch)!r})"
    )
    environment = {**os.environ, "PYTHONPATH": f"{fake.folder}{os.pathsep}{Path.cwd()}"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE
    )
    log, deadline = fake.folder / "log", time.monotonic() + 120
    while not (log.exists() and len(log.read_text().split()) == 4):
        assert process.poll() is None and time.monotonic() < deadline, "the run did not start"
        time.sleep(0.05)
    with pytest.raises(AnotherStudyRuns, match="lock"):
        fake.run()
    process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    process.communicate()
    fake.log()
    fake.interrupt()
    assert fake.run().values("twice", "value") == [10, 12, 14]
    assert fake.log() == ALL[3:]


def test_points_of_other_code_or_another_processor_are_not_taken_over(fake):
    fake.interrupt(at="fourth")
    with pytest.raises(KeyboardInterrupt):
        fake.run()
    fake.interrupt()
    partial = fake.scratch / "fake_study.json"
    kept = json.loads(partial.read_text())
    kept["card"]["cpu"] = "abacus"
    partial.write_text(json.dumps(kept))
    fake.log()
    fake.run()
    assert fake.log() == ALL
    fake.write("OFFSET = 10", "OFFSET = 11")
    assert fake.run().values("once", "value") == [11, 12, 13]
    assert fake.log() == ALL


def test_a_study_of_a_device_that_is_not_here_leaves_its_record_alone(fake, capsys):
    recorded = fake.run()
    fake.write("seeds=(0, 1, 2)", 'seeds=(0, 1, 2), needs="abacus"')
    with pytest.raises(DeviceIsMissing, match="fake_study needs a abacus device"):
        fake.run(again=True)
    assert fake.load() == recorded


def test_a_record_names_the_accelerator_it_is_about(fake):
    fake.run()
    kept = json.loads(fake.record.read_text())
    kept["card"]["device"] = "NVIDIA Abacus"
    fake.record.write_text(json.dumps(kept))
    assert fake.load().label.startswith("recorded on NVIDIA Abacus, ")
    fake.log()
    fake.write("seeds=(0, 1, 2)", "seeds=(0, 1, 2, 3)")
    fake.run()  # on the processor, whose points those are not
    assert fake.log() == [*ALL, "1/3", "2/3"]


def test_another_seed_runs_alone(fake):
    fake.run()
    fake.log()
    fake.write("seeds=(0, 1, 2)", "seeds=(0, 1, 2, 3)")
    with pytest.raises(ValueError, match="lacks 2 points"):
        fake.load()
    assert fake.run().values("twice", "value") == [10, 12, 14, 16]
    assert fake.log() == ["1/3", "2/3"]


def test_two_runs_do_not_clash(fake):
    fake.scratch.mkdir()
    with FileLock(fake.scratch / "lock"), pytest.raises(AnotherStudyRuns, match="wait for it"):
        fake.run()
    assert fake.log() == []
    fake.run()


def test_a_full_disk_keeps_the_old_record(fake, monkeypatch):
    fake.run()
    content = fake.record.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        fake.run(again=True)
    assert fake.record.read_bytes() == content
    assert sorted(path.name for path in fake.scratch.iterdir()) == ["lock"]


# --- what is recorded ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("OFFSET = 10", "OFFSET = 11"),
        ("factor * seed", "factor + seed"),
        ('"twice": {"factor": 2}', '"twice": {"factor": 3}'),
    ],
)
def test_a_changed_study_is_stale(fake, old, new):
    fake.run()
    fake.write(old, new)
    recorded = fake.load()
    assert recorded.stale and "out of date" in recorded.label


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("OFFSET = 10", "OFFSET = 10  # a comment"),
        ("def point(*, seed, factor):", 'def point(*, seed, factor):\n    """Words."""'),
        ("from pathlib import Path\n", '"""Words."""\nfrom pathlib import Path\n'),
        ('title="A quick one"', 'title="Another title"'),
    ],
)
def test_other_words_are_not(fake, old, new):
    fake.run()
    fake.write(old, new)
    recorded = fake.load()
    assert not recorded.stale
    assert recorded.label == f"recorded on {recorded.card['cpu']}, {recorded.card['date']}"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-30],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: text.replace('"points"', '"pints"'),
        lambda text: text.replace('"seed"', '"seat"'),
        lambda text: text.replace('"cpu"', '"cup"'),
        lambda text: text.replace('"fake_study"', '"another"'),
    ],
)
def test_a_damaged_record_is_refused_with_advice(fake, damage):
    fake.run()
    fake.record.write_text(damage(fake.record.read_text()))
    with pytest.raises(ValueError, match=r"fake_study\.json.*re"):
        fake.load()
    fake.log()
    assert not fake.run().stale  # and can be made anew
    assert fake.log() == ALL


def test_a_missing_record_says_how_to_make_it(fake):
    with pytest.raises(FileNotFoundError, match=r"python -m companion\.studies fake_study"):
        fake.load()


def test_a_live_point_is_checked_against_a_further_seeds_interval(fake):
    recorded = fake.run()  # "twice" gave 10, 12, 14: mean 12, standard deviation 2
    reach = 4.302652729911275 * 2 * math.sqrt(1 + 1 / 3)  # Student's t at 97.5 %, two degrees
    for live, holds in ((12 + 0.999 * reach, True), (12 + 1.001 * reach, False), (12, True)):
        found = recorded.check("twice", "value", live)
        assert bool(found) == found.holds == holds
        assert ("OUTSIDE" in str(found)) != holds
    assert recorded.check("twice", "value", 12 + reach + 0.9, slack=1)
    assert not recorded.check("twice", "value", 12 - reach - 1.1, slack=1)
    mean = recorded.interval("twice", "value")
    assert mean.estimate == statistics.mean([10, 12, 14])
    assert mean.high == pytest.approx(12 + 4.302652729911275 * 2 / math.sqrt(3), rel=1e-9)


def test_an_entry_of_a_list_is_checked_alike(fake):
    recorded = fake.run()  # "curve" of "twice" gave [0, 2], [1, 2], [2, 2]: first entries 0, 1, 2
    reach = 4.302652729911275 * math.sqrt(1 + 1 / 3)  # mean 1, standard deviation 1
    for live, holds in ((1 + 0.999 * reach, True), (1 + 1.001 * reach, False)):
        assert recorded.check("twice", "curve", live, entry=0).holds == holds
    assert recorded.check("twice", "curve", 2, entry=1)
    with pytest.raises(ValueError, match="curve of twice is a list a seed"):
        recorded.check("twice", "curve", 1)


def test_nine_in_ten_further_seeds_agree(fake):
    """Of values drawn alike, a 90 % interval for one more holds about 90 %."""
    generator = torch.Generator().manual_seed(0)
    recorded = fake.run()
    inside = 0
    for _ in range(1000):
        *seen, live = torch.randn(4, generator=generator, dtype=torch.float64).tolist()
        points = [
            type(point)(point.setting, point.seed, 0.0, {"value": value})
            for point, value in zip(recorded.points[::2], seen, strict=True)
        ]
        drawn = type(recorded)(**{**vars(recorded), "points": tuple(points)})
        inside += drawn.check("once", "value", live, level=0.9).holds
    assert 870 <= inside <= 930  # three standard errors


def test_bad_questions_are_refused(fake):
    recorded = fake.run()
    with pytest.raises(ValueError, match="thrice"):
        recorded.values("thrice", "value")
    with pytest.raises(ValueError, match="valu"):
        recorded.values("once", "valu")
    with pytest.raises(ValueError, match="nan"):
        recorded.check("once", "value", math.nan)
    with pytest.raises(ValueError, match="slack"):
        recorded.check("once", "value", 1.0, slack=-1)
    with pytest.raises(ValueError, match="no_such_study"):
        load("no_such_study")
    with pytest.raises(ValueError, match="thrice"):
        fake.study.run("thrice", 0)


def test_it_renders_with_its_label_and_escaped(fake):
    fake.write('"once"', '"<b>"')
    recorded = fake.run()
    assert recorded.label in str(recorded) and "value 12" in str(recorded)
    assert "<b>" not in recorded._repr_html_() and "&lt;b&gt;" in recorded._repr_html_()
    agreement = recorded.check("<b>", "value", 11)
    assert isinstance(agreement, Agreement) and "<b>" not in agreement._repr_html_()


@pytest.mark.parametrize(
    "results", [{}, [1.0], {"a": math.nan}, {"a": "b"}, {1: 2.0}, {"a": [math.inf]}]
)
def test_a_point_must_give_finite_numbers_by_name(results):
    study = Study(title="", point=lambda *, seed: results, settings={"only": {}}, seeds=(0,))
    with pytest.raises(ValueError, match="numbers"):
        study.run("only", 0)


@pytest.mark.parametrize(
    "wrong", [{"settings": {}}, {"seeds": ()}, {"seeds": (1, 1)}, {"seeds": (-1,)}]
)
def test_an_impossible_study_is_refused(wrong):
    with pytest.raises(ValueError):
        Study(**{"title": "", "point": require, "settings": {"only": {}}, "seeds": (0,)} | wrong)


# --- the command and the studies of the course --------------------------------------------------


def test_the_command_names_unknown_studies(capsys):
    with pytest.raises(SystemExit) as exit:
        __main__.main(["no_such_study"])
    assert exit.value.code == 2 and "size" in capsys.readouterr().err


def test_the_command_says_how_to_go_on(fake, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "run_study", interrupted)
    assert __main__.main(["size"]) == 130
    assert "go on" in capsys.readouterr().err


def test_records_belong_to_studies_and_every_study_says_what_it_is():
    assert {path.stem for path in FOLDER.glob("*.json")} <= set(study_names())
    for name in study_names():
        assert find_study(name).name == name and find_study(name).title


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.json")))
def test_no_record_is_stale(name):
    recorded = load(name)
    assert not recorded.stale, f"run `python -m companion.studies {name}`"


def test_sizes_are_named_after_their_parameters():
    for name, setting in size.STUDY.settings.items():
        shape = {key: value for key, value in setting.items() if key != "rate"}
        count = parameters(ModelConfig(vocab=1024, context=size.CONTEXT, **shape))
        assert float(name.removesuffix(" M")) == pytest.approx(count / 1e6, rel=0.02)


@pytest.fixture
def quick_size(monkeypatch):
    """The size study cut down: little text, few steps, a tokenizer learned on the spot."""
    text = "\n\n".join(list(documents("prose", "train").values())[:8])
    tokenizer = train_tokenizer([text], 300)
    for name, value in {
        "tiny_tokenizer": lambda: tokenizer,
        "training_text": lambda: text,
        "STEPS": 60,
        "EARLY": 4,
        "WARMUP": 2,
        "CONTEXT": 32,
        "JUDGED": 300,
        "KINDS": ("prose",),  # reading the whole library takes a while
    }.items():
        monkeypatch.setattr(size, name, value)
    return {"layers": 1, "heads": 2, "kv_heads": 1, "width": 16, "hidden": 24, "rate": 3e-3}


def test_an_early_point_is_the_same_run(quick_size):
    before = torch.random.get_rng_state()
    whole = size.run(seed=1, **quick_size)
    early = size.early(seed=1, **quick_size)
    assert early == {"early prose": whole["early prose"]}
    assert early != size.early(seed=2, **quick_size)
    assert torch.equal(before, torch.random.get_rng_state())
    assert whole["prose"] != whole["early prose"]
    assert len(whole["losses"]) == 3 and whole["losses"][2] < whole["losses"][0] - 0.1


def test_windows_depend_on_seed_and_step_alone(quick_size):
    tokenizer, text = size.tiny_tokenizer(), size.training_text()
    windows, again = (size.TextWindows(text, tokenizer, seed) for seed in (0, 0))
    assert windows[3].shape == (size.BATCH, 32)
    assert torch.equal(windows[3], again[3]) and not torch.equal(windows[3], windows[4])
    assert not torch.equal(windows[3], size.TextWindows(text, tokenizer, 1)[3])
    for row in windows[0]:
        assert tokenizer.decode(row.tolist()) in text or "\ufffd" in tokenizer.decode(row.tolist())
