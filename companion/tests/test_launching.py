"""Ranks answer in order, say what failed, and leave no process behind, whatever happens to them.

The tests after `Faults` break their ranks, so they take ranks of their own, and each also tests
that `run` starts new ones after the fault before it.
"""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist

from companion.parallel import cluster, launching
from companion.parallel.guard import marked
from companion.parallel.launching import RankError, ranks

START = 300.0  # seconds: the machine may be busy with other tests
SOON = 60.0  # seconds that an error may take on a busy machine


def rank_and(group, value):
    return dist.get_rank(group), value


def test_values_come_in_order_of_rank(four_ranks):
    assert four_ranks.run(rank_and, "x") == [(rank, "x") for rank in range(4)]


def test_what_a_notebook_defines_travels(two_ranks):
    cell = """
class Twice:
    def __init__(self, number): self.number = 2 * number
factor = 5
def helper(rank): return Twice(factor + rank)
def function(group): return helper(group.rank())
"""
    names = {"__name__": "__main__"}
    exec(cell, names)
    values = two_ranks.run(names["function"])
    assert [value.number for value in values] == [10, 12]
    assert all(type(value) is names["Twice"] for value in values)


def state(group):
    total = torch.tensor([1.0 + group.rank()])
    dist.all_reduce(total)  # over the default group
    tiny = torch.tensor([1e-40]) * 1.0
    return total.item(), torch.rand(()).item(), tiny.item(), torch.get_num_threads(), group.size()


def test_each_run_has_a_fresh_default_group_the_seed_one_thread_and_no_denormals(two_ranks):
    torch.manual_seed(0)
    expected = (3.0, torch.rand(()).item(), 0.0, 1, 2)
    assert two_ranks.run(state) == [expected] * 2
    assert two_ranks.run(state) == [expected] * 2


def complains(group):
    raise LookupError(f"no luck on rank {group.rank()}")


def one_complains(group):
    if group.rank() == 1:
        complains(group)
    dist.all_reduce(torch.ones(1))


def leaves(group):
    sys.exit("enough")


def pid(group):
    return os.getpid()


@pytest.mark.parametrize(
    "function, text", [(complains, "no luck on rank"), (leaves, "SystemExit: enough")]
)
def test_an_exception_comes_with_its_traceback_and_the_ranks_stay(two_ranks, function, text):
    before = two_ranks.run(pid)
    with pytest.raises(RankError, match=f"(?s)in {function.__name__}.*{text}"):
        two_ranks.run(function)
    assert two_ranks.run(pid) == before


def test_an_exception_frees_those_who_wait_for_the_rank(two_ranks):
    before, began = two_ranks.run(pid), time.monotonic()
    with pytest.raises(RankError, match="LookupError: no luck on rank 1") as caught:
        two_ranks.run(one_complains)
    assert caught.value.rank == 1
    assert time.monotonic() - began < SOON
    assert two_ranks.run(pid) == before


def test_a_cells_source_stands_in_the_traceback(two_ranks):
    import linecache

    source, name = "def cell(group):\n    return 1 / 0  # here\n", "/nowhere/cell-1.py"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    names = {"__name__": "__main__"}
    exec(compile(source, name, "exec"), names)
    with pytest.raises(RankError, match="return 1 / 0  # here"):
        two_ranks.run(names["cell"])


def speaks(group):
    print("hello\nagain")


def test_what_ranks_print_is_printed_in_order(two_ranks, capsys):
    two_ranks.run(speaks)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["rank 0: hello", "rank 0: again", "rank 1: hello", "rank 1: again"]


def test_a_cell_may_use_distributed_and_an_attribute_named_config(two_ranks):
    cell = "def rank_of(group, model):\n    return dist.get_rank(group), model.config\n"
    names = {"dist": dist, "__name__": "__main__"}
    exec(cell, names)  # as a notebook would, so that it is sent whole
    thing = SimpleNamespace(config="small")
    assert two_ranks.run(names["rank_of"], thing) == [(0, "small"), (1, "small")]


def lock_value(group):
    return threading.Lock()


def test_what_cannot_be_pickled_is_named(two_ranks):
    def uses(group):
        return inner

    inner = threading.Lock()
    with pytest.raises(ValueError, match="argument 2 of rank_and, a lock, cannot be sent"):
        two_ranks.run(rank_and, 1, threading.Lock())
    with pytest.raises(ValueError, match="'inner', which uses uses, a lock, cannot be sent"):
        two_ranks.run(uses)
    with pytest.raises(RankError, match="the value, a lock, cannot be sent to the notebook"):
        two_ranks.run(lock_value)


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", True, None])
def test_ranks_are_counted_in_whole_numbers(count):
    with pytest.raises(ValueError, match=r"count is .*whole number of at least 1"):
        ranks(count)


def test_bad_settings_are_refused(two_ranks):
    with pytest.raises(ValueError, match="start_timeout is 0"):
        ranks(2, start_timeout=0)
    with pytest.raises(ValueError, match="timeout is nan"):
        ranks(2, timeout=float("nan"))
    with pytest.raises(ValueError, match="function is 3; it must be callable"):
        two_ranks.run(3)
    with pytest.raises(ValueError, match="timeout is -1"):
        two_ranks.run(pid, timeout=-1)


class Faults:
    """Ranks of one's own, and a look at what is left of them."""

    def __init__(self, count):
        self.others = psutil.Process().children(recursive=True)
        self.ranks = ranks(count, start_timeout=START)
        self.note()

    def note(self):
        guard = self.ranks._cluster._guard
        self.mark, self.folder = guard.mark, guard.folder

    def left(self):
        """The living processes and the folder of the ranks, after at most five seconds."""
        for _ in range(100):
            children = psutil.Process().children(recursive=True)
            found = [*marked(self.mark), *(one for one in children if one not in self.others)]
            found += [self.folder] if os.path.exists(self.folder) else []
            if not found:
                break
            time.sleep(0.05)
        return found

    def run_on(self):
        """The same object starts new ranks."""
        assert self.ranks.run(rank_and, 7, timeout=START) == [
            (rank, 7) for rank in range(self.ranks.count)
        ]
        self.note()


@pytest.fixture(scope="module")
def faults():
    found = Faults(2)
    yield found
    found.ranks.close()


def killed(group):
    if group.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def hung(group):
    if group.rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(1))


def failed_beside_a_hung_one(group):
    if group.rank() == 1:
        complains(group)
    time.sleep(600)


HUNG = r"""no answer within 3 s from rank 0, rank 1; all ranks were stopped
rank 0:
  File "[^"]+test_launching.py", line \d+, in hung
    dist.all_reduce\(torch.ones\(1\)\)
(?s:.*)
rank 1 does not say where it is"""


@pytest.mark.parametrize(
    "function, error, text",
    [
        (killed, RankError, r"^rank 1 failed\nits process died or was halted"),
        (hung, TimeoutError, HUNG),
        (failed_beside_a_hung_one, RankError, "LookupError: no luck on rank 1"),
    ],
)
def test_faults_are_named_soon_and_leave_no_process(faults, monkeypatch, function, error, text):
    monkeypatch.setattr(launching, "GRACE", 1.0)
    faults.run_on()
    began = time.monotonic()
    with pytest.raises(error, match=text):
        faults.ranks.run(function, timeout=3.0 if error is TimeoutError else START)
    assert time.monotonic() - began < SOON
    assert not faults.left()


def sleeps(group):
    time.sleep(600)


def test_ranks_that_never_meet_are_started_anew(faults, monkeypatch):
    """As gloo does once in ten thousand runs: it waits for ever while it connects the ranks."""
    meet, before = cluster.Cluster.meet, faults.ranks.run(pid)
    stuck = [True]

    def sometimes(one, seconds):
        if not stuck:
            return meet(one, seconds)
        stuck.clear()
        waits = [one._client[number].apply_async(time.sleep, 600) for number in one._numbers]
        return {waiting: rank for rank, waiting in enumerate(waits)}

    monkeypatch.setattr(cluster.Cluster, "meet", sometimes)
    monkeypatch.setattr(launching, "MEETING", 0.5)
    assert faults.ranks.run(rank_and, 7, timeout=START) == [(0, 7), (1, 7)]
    faults.note()
    assert not {*before} & {*faults.ranks.run(pid)}
    stuck.append(True)
    with pytest.raises(TimeoutError, match=r"no answer within 0.4 s from rank 0, rank 1"):
        faults.ranks.run(rank_and, 7, timeout=0.4)  # too short for a second meeting
    assert not faults.left()
    faults.run_on()


def test_an_interrupt_stops_the_ranks(faults):
    faults.run_on()
    began = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job's shell ignores it
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            faults.ranks.run(sleeps)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < SOON
    assert not faults.left()


def test_closed_ranks_leave_no_process_and_say_so(faults):
    with faults.ranks as closed:
        faults.run_on()
    assert not faults.left()
    closed.close()
    with pytest.raises(RuntimeError, match="closed; start new ones"):
        closed.run(pid)


def test_forgotten_ranks_leave_no_process():
    faults = Faults(1)
    faults.ranks = None
    gc.collect()
    assert not faults.left()


@pytest.mark.parametrize(
    "command, seconds, error, text",
    [
        ("import time; time.sleep(600)", 5.0, TimeoutError, "5 s|5.0s"),
        ("raise SystemExit('no engine today')", START, RuntimeError, "no engine today"),
    ],
)
def test_engines_that_never_start(monkeypatch, command, seconds, error, text):
    others = psutil.Process().children(recursive=True)
    monkeypatch.setattr(cluster, "ENGINE", [sys.executable, "-c", command])
    began = time.monotonic()
    with pytest.raises(error, match=text):
        ranks(1, start_timeout=seconds)
    assert time.monotonic() - began < 5.0 + SOON
    time.sleep(0.2)
    assert set(psutil.Process().children(recursive=True)) <= set(others)


SCRIPT = """
import os, signal
from companion.parallel.launching import ranks
found = ranks(1, start_timeout=300)
print(found._cluster._guard.mark, flush=True)
"""


def test_the_end_of_python_stops_the_ranks():
    """Both ends at a time, which saves seconds: a plain one and a SIGKILL."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ends = ("", "os.kill(os.getpid(), signal.SIGKILL)")
    scripts = [subprocess.Popen([sys.executable, "-c", SCRIPT + end], **pipes) for end in ends]
    for script in scripts:
        said, complaints = script.communicate(timeout=START)
        mark = said.strip()
        assert (len(mark), complaints) == (32, "")
        deadline = time.monotonic() + SOON
        while marked(mark) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not marked(mark)


def test_a_profile_says_where_ranks_run(monkeypatch, tmp_path):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    others = psutil.Process().children(recursive=True)
    with pytest.raises(ValueError, match=r"profile is 'here'.*ipython profile create"):
        ranks(2, profile="here")
    (tmp_path / "profile_here").mkdir()
    with ranks(2, profile="here", start_timeout=START) as found:
        before = found.run(pid)
        with pytest.raises(RankError, match="LookupError: no luck on rank 1"):
            found.run(one_complains)
        assert found.run(pid) == before
        with pytest.raises(RankError, match="its process died"):
            found.run(killed)
    assert set(psutil.Process().children(recursive=True)) <= set(others)
