"""Mapped batches are those of a tensor, files are whole or refused, and no worker is left over."""

import threading
import time

import pytest
import torch

from companion.data import Batches
from companion.memory_mapped import (
    HEADER,
    Ahead,
    Clocked,
    MappedTokens,
    id_type,
    mapped_batches,
    write_tokens,
)
from companion.tests.test_model import small
from companion.training import train


def some_lines(vocab, lines=7, high=400):
    random = torch.Generator().manual_seed(0)
    sizes = torch.randint(high, (lines,), generator=random).tolist()
    return [torch.randint(vocab, (size,), generator=random) for size in sizes]


@pytest.mark.parametrize(("vocab", "size"), [(1024, 2), (2**16, 2), (2**16 + 1, 4), (2**32, 4)])
def test_batches_of_a_file_are_those_of_a_tensor(tmp_path, vocab, size):
    lines = [*some_lines(vocab), torch.tensor([0, vocab - 1]), torch.empty(0, dtype=torch.int64)]
    path = write_tokens(tmp_path / "tokens", iter(lines), vocab)
    whole = torch.cat(lines)
    assert path.stat().st_size == HEADER.size + size * len(whole)
    mapped = MappedTokens(path, vocab=vocab)
    assert torch.equal(mapped[torch.arange(len(whole))], whole) and len(mapped) == len(whole)
    options = {"batch": 3, "context": 16, "seed": 5}
    for step in (0, 1, 100):
        found = mapped_batches(path, vocab=vocab, **options)[step]
        expected = Batches(whole, **options)[step]
        assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_the_bytes_are_as_said(tmp_path):
    """Written out by hand for three ids of a vocabulary of 300."""
    path = write_tokens(tmp_path / "tokens", [torch.tensor([1, 2]), torch.tensor([299])], 300)
    numbers = [300, 3]
    expected = b"TOKENS1\n" + b"".join(n.to_bytes(8, "little") for n in numbers)
    assert path.read_bytes() == expected + bytes([1, 0, 2, 0, 43, 1])


@pytest.mark.parametrize(
    ("lines", "vocab", "match"),
    [
        ([torch.tensor([0, 50])], 50, "from 0 to 50; .* 0 to 49"),
        ([torch.tensor([-1])], 50, "from -1"),
        ([torch.zeros(2, 2, dtype=torch.int64)], 50, "shape"),
        ([torch.zeros(2)], 50, "float32"),
        ([], 50, "0 tokens"),
        ([torch.tensor([0])], 2**32 + 1, "4294967296 at most"),
        ([torch.tensor([0])], 0, "vocab is 0"),
    ],
)
def test_what_cannot_be_written_leaves_the_old_file(tmp_path, lines, vocab, match):
    path = write_tokens(tmp_path / "tokens", some_lines(9), 9)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=match):
        write_tokens(path, [*some_lines(min(max(vocab, 1), 9)), *lines] if lines else [], vocab)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_files_that_do_not_match_are_refused(tmp_path):
    path = write_tokens(tmp_path / "tokens", some_lines(50), 50)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="vocabulary of 50, not 51"):
        MappedTokens(path, vocab=51)
    for damaged, match in (
        (whole[:-1], "truncated or altered"),
        (whole + b"\0", "truncated or altered"),
        (b"TOKENS2" + whole[7:], "no file of tokens"),
        (whole[:10], "no file of tokens"),
        (b"", "no file of tokens"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=match):
            MappedTokens(path, vocab=50)
    with pytest.raises(FileNotFoundError, match="write_tokens"):
        MappedTokens(tmp_path / "nothing", vocab=50)
    with pytest.raises(ValueError, match="fewer than one context"):
        short = write_tokens(tmp_path / "short", [torch.arange(5)], 50)
        mapped_batches(short, vocab=50, batch=1, context=6)


def test_the_file_stays_as_it_is(tmp_path):
    mapped = MappedTokens(write_tokens(tmp_path / "tokens", some_lines(50), 50), vocab=50)
    mapped[torch.tensor([0, 1])].fill_(7)
    with pytest.raises(ValueError, match="read-only"):
        mapped._ids[0] = 7
    assert id_type(50).itemsize == 2


# --- the worker ---------------------------------------------------------------------------------


def line():
    return torch.arange(200) % 50


def workers():
    return [thread for thread in threading.enumerate() if thread.name.endswith("(_work)")]


def test_training_with_a_worker_is_the_same_training():
    batches = Batches(line(), batch=2, context=9)
    plain = train(small(), batches, steps=6, progress=False)
    with Ahead(batches, steps=6) as ready:
        assert workers()
        clocked = Clocked(ready)
        assert train(small(), clocked, steps=6, progress=False) == plain
    assert not workers() and len(clocked.seconds) == 6
    model = small()
    with Ahead(batches, steps=6, start=4) as ready:
        train(model, ready, start=4, steps=6, progress=False)
    assert not workers()


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_no_worker_is_left_after_an_exception(taken):
    with (
        pytest.raises(ZeroDivisionError),
        Ahead(Batches(line(), batch=2, context=9), steps=10**6) as ready,
    ):
        for step in range(taken):
            ready[step]
        1 / 0  # noqa: B018
    assert not workers()


def test_at_most_depth_and_one_are_made_ahead():
    made = []

    class Counted:
        def __getitem__(self, step):
            made.append(step)
            return torch.zeros(1, 2)

    with Ahead(Counted(), steps=100, depth=3) as ready:
        ready[0]
        time.sleep(0.3)
        assert made == [0, 1, 2, 3, 4]  # one taken, three waiting, one in hand
    assert not workers()


def test_what_goes_wrong_in_the_worker_is_raised_where_the_batch_is_asked_for():
    class Broken:
        def __getitem__(self, step):
            if step == 2:
                raise OSError("the disk is gone")
            return torch.zeros(1, 2)

    with Ahead(Broken(), steps=9) as ready:
        ready[0], ready[1]
        with pytest.raises(OSError, match="the disk is gone"):
            ready[2]
        with pytest.raises(ValueError, match="next is 9"):
            ready[2]
    assert not workers()


def test_a_step_waits_less_for_batches_made_ahead():
    """A loader and a step of 20 ms each: alone they add up, side by side they do not."""

    class Slow:
        def __getitem__(self, step):
            time.sleep(0.02)
            return torch.zeros(1, 2)

    def waited(batches):
        clocked = Clocked(batches)
        for step in range(10):
            clocked[step]
            time.sleep(0.025)
        return sum(clocked.seconds)

    alone = waited(Slow())
    with Ahead(Slow(), steps=10) as ready:
        assert waited(ready) < 0.5 * alone
    assert alone >= 0.2


def test_batches_out_of_order_are_refused():
    batches = Batches(line(), batch=2, context=9)
    with Ahead(batches, steps=3) as ready:
        with pytest.raises(ValueError, match=r"step 1 is asked for; .* next is 0"):
            ready[1]
        for step in range(3):
            assert torch.equal(ready[step], batches[step])
        with pytest.raises(ValueError, match="step 3"):
            ready[3]
    with pytest.raises(ValueError, match="no worker"):
        Ahead(batches, steps=3)[0]
    for options, match in (
        ({"steps": 0}, "steps"),
        ({"steps": 2, "start": 2}, "start 2"),
        ({"steps": 2, "depth": 0}, "depth"),
    ):
        with pytest.raises(ValueError, match=match):
            Ahead(batches, **options)
